"""Which measures a monitor takes, and the susceptibilities it measures beside the learning coefficient."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from torch import nn

from lightning_slt.callbacks.arguments import plain
from lightning_slt.estimate import ChainSettings
from lightning_slt.influence import ProbeSet
from lightning_slt.publish import RunPublisher
from lightning_slt.publish.sink import Page
from lightning_slt.sampling.batches import DatasetSource, MinibatchSource
from lightning_slt.sampling.chains import Progress
from lightning_slt.sampling.collective import Collective
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.restriction import Restriction, select_parameters
from lightning_slt.susceptibility import MIN_READS, Shift, chain_batch, measure_susceptibility
from lightning_slt.susceptibility_record import SusceptibilityEstimate, SusceptibilityRecord
from lightning_slt.warned import warn

NAMES = ("llc", "influence", "susceptibility")
ALL = "all"
EXAMPLE = {"name": "susceptibility", "components": {"head": ["fc.*"]}}


class Measures:
    """What ``SLTMonitor(measures=...)`` asks for.

    Args:
        measures: None for the LLC, and influence where samples are probed; else a name or a list of names, out of
            ``"llc"``, ``"influence"``, ``"susceptibility"``, and of mappings ``{"name": "susceptibility",
            "components": {name: patterns}}``. The LLC is always measured.
        probed: whether there are samples to look at.

    Raises:
        ValueError: for an unknown measure, one that needs samples where none are given, or a component that has no
            weights or no name that a key can have; names the remedy.
        TypeError: for what is no list of names and mappings.

    Example:
        >>> Measures(["llc", {"name": "susceptibility", "components": {"head": ["fc.*"]}}], True).components
        {'head': ['fc.*']}
    """

    def __init__(self, measures: Optional[Sequence[Any]], probed: bool) -> None:
        self._given = None if measures is None else _listed(measures)
        self._probed = probed
        self.components: dict[str, Restriction] = {}
        names = set()
        for entry in self._given or []:
            name = entry.get("name") if isinstance(entry, Mapping) else entry
            names.add(name)
            if name == "susceptibility" and isinstance(entry, Mapping):
                self.components |= _components_of(entry.get("components"))
        self.influence = probed and (self._given is None or "influence" in names)
        self.susceptibility = "susceptibility" in names
        self._check()

    def _check(self) -> None:
        for entry in self._given or []:
            name = entry.get("name") if isinstance(entry, Mapping) else entry
            if name not in NAMES:
                near = difflib.get_close_matches(str(name), NAMES, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"measures: there is no {name!r}{hint}; there are {', '.join(NAMES)}.")
            if name != "llc" and not self._probed:
                raise ValueError(f"measures: {name!r} needs samples to look at: give probe=, such as probe=True.")
            if isinstance(entry, Mapping):
                allowed = {"name", "components"} if name == "susceptibility" else {"name"}
                unknown = sorted(map(str, set(entry) - allowed))
                if unknown:
                    raise ValueError(f"measures: {name!r} has no {', '.join(unknown)}; it has {sorted(allowed)}.")
        for name in self.components:
            if not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(
                    f"measures: component {name!r}: only lower-case letters, digits and underscores (a log key)."
                )

    def check_data(self, indexed: bool) -> None:
        """Before training: whether the training data has what is asked of it.

        Raises:
            ValueError: where samples cannot be asked for by number and that is needed; names the remedy.
        """
        if self.susceptibility and not indexed:
            raise ValueError(
                "measures: 'susceptibility' reads the loss of the training data sample by sample, and this cannot be "
                "asked for a sample by number (an iterable dataset, a sampler of its own, or several loaders). Leave "
                "it out, or train on a map-style Dataset."
            )

    def check_weights(self, module: nn.Module) -> None:
        """Once the module has its weights.

        Raises:
            ValueError: for a component that no weight is of; names it and the remedy.
            AllFrozenError: for one whose weights are frozen, at the moment.
        """
        for name, patterns in self.components.items():
            select_parameters(module, patterns, _called(name))

    def describe(self) -> Optional[list[Any]]:
        """For the run's settings."""
        return None if self._given is None else [dict(e) if isinstance(e, Mapping) else e for e in self._given]


def _listed(measures: Any) -> list[Any]:
    """Names and mappings that have one.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(measures, (str, Mapping)):
        measures = [measures]
    remedy = f"Give a list of names out of {', '.join(NAMES)}, or of mappings such as {EXAMPLE}."
    if not isinstance(measures, Iterable):
        raise TypeError(f"measures={measures!r}: expected a list, got {type(measures).__name__}. {remedy}")
    entries = list(measures)
    for entry in entries:
        if not isinstance(entry.get("name") if isinstance(entry, Mapping) else entry, str):
            kind = "a mapping without a name" if isinstance(entry, Mapping) else type(entry).__name__
            raise TypeError(f"measures={entries!r}: got {entry!r} in it, which is {kind}. {remedy}")
    return entries


def _components_of(components: Any) -> dict[str, Restriction]:
    """Which weights each component has, as plain lists.

    Raises:
        TypeError: for anything but a mapping; for weights as ``restrict`` refuses them.
    """
    if components is None:
        return {}
    if not isinstance(components, Mapping):
        kind = type(components).__name__
        raise TypeError(f"measures: components={components!r}: expected a mapping, got {kind}. Give {EXAMPLE}.")
    return {str(name): plain(patterns, _called(str(name))) for name, patterns in components.items()}


def _called(component: str) -> str:
    """A component's weights, as errors name them."""
    return f"measures: components[{component!r}]"


def measure_beside(
    measures: Measures,
    restrict: Restriction,
    make: Callable[[Restriction], Objective],
    source: MinibatchSource,
    transfer: Callable[[Any], Any],
    probes: ProbeSet,
    settings: ChainSettings,
    collective: Collective,
    prepare: Callable[[Objective], None],
    before: Sequence[SusceptibilityEstimate] = (),
    progress: Optional[Progress] = None,
) -> SusceptibilityEstimate:
    """Susceptibility of every component to a shift towards the queries, or the probed samples where there are none.

    Chains of their own: kinetic Langevin ones on large batches, since the heat of small ones would enter twice.

    Args:
        before: the estimates of this run so far, whose first one has chosen gamma for all: points of one curve are of
            one posterior.
        progress: told about chain-steps done.

    Raises:
        ValueError: where the training data cannot be asked for a sample by number.
    """
    if not isinstance(source, DatasetSource):
        raise ValueError("susceptibility: the training data cannot be asked for a sample by number.")
    original = source.with_batches(chain_batch(source.num_indexed), transfer, settings.seed)
    queries = probes.query is not None
    samples, group = (probes.query, probes.query_group) if queries else (probes.train, probes.train_group)
    assert samples is not None
    shifts: list[Shift] = []
    collective.exchange(lambda: shifts.append(Shift.of(original, samples, settings.seed, group)))
    chains = ChainSettings(
        num_chains=settings.num_chains,
        num_draws=max(settings.num_draws, MIN_READS),
        nbeta=settings.nbeta,
        localization=settings.localization,
        seed=settings.seed,
        # which path is faster only the clock knows, and they round otherwise: a trial at each firing would make a run
        # that is resumed differ in the last bits
        method="sequential" if settings.method == "sequential" else "auto",
    )
    components = measures.components or {ALL: restrict}
    return measure_susceptibility(
        {name: lambda r=r: make(r) for name, r in components.items()},  # type: ignore[misc]
        original,
        shifts[0],
        chains,
        collective,
        prepare,
        dict(zip(before[0].components, before[0].localization, strict=True)) if before else None,
        progress,
    )


def keys_of(estimate: SusceptibilityEstimate, prefix: str) -> dict[str, float]:
    """``{prefix}/susceptibility/<component>/<group>`` in units of the loss; the whole shift is the group ``all``.

    What is not finite is left out; ``{prefix}/susceptibility/valid`` is always there.
    """
    values = {f"{prefix}/susceptibility/valid": float(estimate.valid)}
    labels = labels_of(estimate.groups)
    for row, component in enumerate(estimate.components):
        columns = [(ALL, float(estimate.chi[row]), float(estimate.se[row]))]
        for column, label in enumerate(labels):
            columns.append((label, float(estimate.group_chi[row, column]), float(estimate.group_se[row, column])))
        for label, chi, se in columns:
            values[f"{prefix}/susceptibility/{component}/{label}"] = chi
            values[f"{prefix}/susceptibility/{component}/{label}_se"] = se
    return {key: value for key, value in values.items() if abs(value) < float("inf")}


def labels_of(groups: Sequence[str]) -> list[str]:
    """Groups as parts of keys, which have few characters; numbered where names are told apart by others.

    Example:
        >>> labels_of(["Cat", "dog 2"]), labels_of(["猫", "犬"])
        (['group_cat', 'group_dog_2'], ['group___0', 'group___1'])
    """
    labels = ["group_" + re.sub(r"[^a-z0-9_]", "_", group.lower()) for group in groups]
    if len({*labels, *(f"{label}_se" for label in labels)}) < 2 * len(labels):
        return [f"{label}_{number}" for number, label in enumerate(labels)]
    return labels


def warn_of(error: Exception, step: int, who: str, goes_on: bool = True) -> None:
    """The learning coefficient of this step stands.

    Args:
        error: why.
        step: that is left out.
        who: speaks.
        goes_on: whether training is known to go on; what answers a signal may end it.
    """
    kept = "the learning coefficient is kept" + ("; training goes on" if goes_on else "")
    warn(f"{who}: susceptibility at step {step} failed and is left out; {kept}. {type(error).__name__}: {error}")


def publish(
    estimate: SusceptibilityEstimate,
    publisher: Optional[RunPublisher],
    folder: Optional[Path],
    prefix: str,
    first_rank: bool,
    who: str,
) -> None:
    """Into the local record and the loggers; what fails is warned about by ``who``."""
    if not first_rank or publisher is None:
        return
    if folder is not None:
        try:
            SusceptibilityRecord(folder).save(estimate)
        except OSError as error:
            warn(f"{who}: the record of susceptibility could not be written: {error}")
    x = estimate.x if estimate.x is not None else estimate.step
    publisher.page(Page(keys_of(estimate, prefix), step=estimate.step), x or 0)


def restore_susceptibilities(
    folder: Path, last_step: int, history: Sequence[SusceptibilityEstimate], who: str
) -> list[SusceptibilityEstimate]:
    """The record of a resumed run: what came after the checkpoint is forgotten, what is missing written.

    Returns:
        What the record has and the history lacks.
    """
    record = SusceptibilityRecord(folder)
    try:
        record.drop_after(last_step)
        for estimate in history:
            if not record.path(estimate.step).exists():
                record.save(estimate)
    except OSError as error:
        warn(f"{who}: the record of susceptibility could not be restored: {error}")
        return []
    known = {estimate.step for estimate in history}
    return [estimate for estimate in record.read() if estimate.step not in known]
