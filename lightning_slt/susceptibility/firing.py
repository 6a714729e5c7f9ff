"""The susceptibility of every component, from its own chains: behind every road to an estimate."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Optional

import torch

from lightning_slt.estimate import ChainSettings
from lightning_slt.sampling.anchor import weighs_together
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.chains import Progress
from lightning_slt.sampling.collective import Alone, Collective
from lightning_slt.sampling.coupled import ALONE
from lightning_slt.sampling.eval_mode import misfit_of_eval
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.sums import misfit_of_sum
from lightning_slt.susceptibility.chains import run_component
from lightning_slt.susceptibility.reading import Component, names_of, read_component
from lightning_slt.susceptibility.shift import Shift, ShiftReader
from lightning_slt.susceptibility_record import SusceptibilityEstimate
from lightning_slt.verdict import fit_for_covariances


def measure_susceptibility(
    components: Mapping[str, Callable[[], Objective]],
    source: DatasetSource,
    shift: Shift,
    settings: ChainSettings,
    collective: Optional[Collective] = None,
    prepare: Optional[Callable[[Objective], None]] = None,
    localization: Optional[Mapping[str, float]] = None,
    progress: Optional[Progress] = None,
) -> SusceptibilityEstimate:
    """Run the chains of each component and read its susceptibility off them: behind every road to an estimate.

    Args:
        components: by name, what makes the loss with that component's weights moving.
        source: minibatches of the original data.
        shift: the samples.
        settings: with ``sampler=None``: kinetic Langevin chains in the metric of the curvature.
        collective: ranks that share the chains.
        prepare: called with each loss on every rank, where ranks have to agree on it.
        localization: gamma of each component, where a curve has begun with one; else that of ``settings``.
        progress: told about chain-steps done; what it raises ends the chains.

    Raises:
        ValueError: as :func:`~lightning_slt.estimate.measure_llc`, and for a loss that couples samples.
    """
    start = time.perf_counter()
    collective = collective or Alone()
    found: dict[str, Component] = {}
    together: list[bool] = []
    for name, make in components.items():
        made: list[Objective] = []
        collective.exchange(lambda make=make, made=made: made.append(make()))  # type: ignore[misc]
        if prepare is not None:
            prepare(made[0])
        source.forget()
        gamma = (localization or {}).get(name, settings.localization)
        asked = dataclasses.replace(settings, localization=gamma)
        found[name] = _measure(name, made[0], source, shift, asked, collective, together, progress)
    first, parts = next(iter(found.values())), list(found.values())
    names = names_of(shift.groups_of(first.index))
    nothing = torch.zeros(len(parts), 0, dtype=torch.float64, device="cpu")
    notes = [note for part in parts for note in part.notes]
    if shift.base is not None:
        notes.append(
            f"the loss of the original data is that of two random subsets of {len(shift.observed.index)}: their own "
            "sampling error is in se"
        )
    if any(together):
        notes.append(f"{ALONE}; the integrand is of such losses too")
    reasons = tuple(reason for part in parts for reason in part.reasons)
    return SusceptibilityEstimate(
        components=tuple(found),
        chi=torch.stack([p.whole.chi[0] for p in parts]),
        se=torch.stack([p.whole.se[0] for p in parts]),
        per_chain=torch.stack([p.per_chain for p in parts]),
        matrix=torch.stack([p.single.chi for p in parts]),
        matrix_se=torch.stack([p.single.se for p in parts]),
        sample_index=first.index,
        groups=names,
        group_chi=torch.stack([p.by_group.chi for p in parts if p.by_group is not None]) if names else nothing,
        group_se=torch.stack([p.by_group.se for p in parts if p.by_group is not None]) if names else nothing,
        llc=torch.tensor([p.llc for p in parts], dtype=torch.float64, device="cpu"),
        nbeta=first.posterior.nbeta,
        localization=tuple(p.posterior.localization for p in parts),
        num_weights=tuple(p.num_weights for p in parts),
        num_samples=source.num_samples,
        num_chains=settings.num_chains,
        num_draws=first.num_draws,
        valid=not reasons,
        reasons=reasons,
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
    )


def _measure(
    name: str,
    objective: Objective,
    source: DatasetSource,
    shift: Shift,
    settings: ChainSettings,
    collective: Collective,
    together: list[bool],
    progress: Optional[Progress],
) -> Component:
    """One component; ``together`` has an answer for each try: whether its loss weighs samples together."""
    readers: list[ShiftReader] = []

    def make_reader() -> ShiftReader:
        readers.append(ShiftReader(objective, shift, settings.seed, progress))
        if readers[-1].slow and collective.rank == 0:
            objective.say("one by one", readers[-1].slow)
        together.append(weighs_together(objective, source))
        return readers[-1]

    drawn, chains, ran = run_component(objective, source, settings, collective, make_reader, progress)
    index = readers[-1].shifted.index
    group = shift.groups_of(index)
    unread = 1 - len(shift.observed.index) / source.num_indexed if readers[-1].parts else 0.0
    found = read_component(
        name, drawn.segment, chains.posterior, len(objective.anchor), index, group, readers[-1].parts, unread
    )
    if ran is not None:
        reasons, notes = ran.reasons(), ran.cooled.notes(source.batch_size)
    else:
        reasons, notes = fit_for_covariances(drawn, chains)
    misfits = (*misfit_of_eval(objective), *misfit_of_sum(objective, source, chains.posterior.nbeta))
    reasons = (*reasons, *misfits)
    return dataclasses.replace(
        found,
        reasons=(*found.reasons, *(f"{name}: {reason}" for reason in reasons)),
        notes=(*found.notes, *(f"{name}: {note}" for note in notes)),
    )
