"""Susceptibility of components to a shift of the data: one call without a Trainer, and what the monitor shares."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_slt.estimate import ChainSettings, default_localization, run_chains, state_dict_of
from lightning_slt.functional.influence import group_means
from lightning_slt.functional.posterior import LocalPosterior, default_nbeta
from lightning_slt.functional.susceptibility import MIXED, Response, susceptibility
from lightning_slt.sampling.arguments import check_count, check_data
from lightning_slt.sampling.batches import DatasetSource, source_of
from lightning_slt.sampling.calibration import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.collective import Alone, Collective
from lightning_slt.sampling.metric import Curvature, LowRankMetric, curvature_at
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.probe import Probe
from lightning_slt.sampling.readings import diverged
from lightning_slt.sampling.restriction import Restriction
from lightning_slt.sampling.rng import PROBE, generator, preserve_rng
from lightning_slt.sampling.samplers import KineticLangevin, Sampler, as_sampler
from lightning_slt.sampling.samples import Samples, choose_samples
from lightning_slt.sampling.steps import LossFn, NoLossError
from lightning_slt.susceptibility_record import SusceptibilityEstimate

log = logging.getLogger(__name__)

MAX_BASE = 2048
"""Samples of the original data whose loss is read at every draw; more are represented by two random subsets."""
LARGE_BATCH = 512
MAX_SHIFTED = 1000
MIN_READS = 8
NAMED = 5
"""Samples that a note names."""
STEP = 0.7
"""Time step in the coordinates in which the posterior is round; shortened where chains leave it."""
MAX_SHORTENINGS = 6
BURNIN, COLD_BURNIN, BETWEEN = 8, 40, 2
NO_INDEX = (
    "susceptibility needs samples that can be asked for by number. Give a map-style Dataset (with __len__ and "
    "__getitem__), or a DataLoader over one without a batch sampler of its own."
)


@dataclass(frozen=True)
class Shift:
    """The samples that are read: those of the original data, and those it is shifted to.

    Attributes:
        observed, base: original samples behind the integrand and behind the loss difference. The same ones where all
            are read; else two disjoint random subsets, since one would have its own sampling error squared.
        shifted: samples of the shifted data.
        group: of each shifted sample, None where there are none.
    """

    observed: Samples
    base: Optional[Samples]
    shifted: Samples
    group: Optional[list[Optional[str]]] = None

    @staticmethod
    def of(source: DatasetSource, shifted: Samples, seed: int, group: Optional[list[Optional[str]]] = None) -> Shift:
        """With samples of the original data chosen from ``source``."""
        n = source.num_indexed
        chosen = choose_samples(n, MAX_BASE, seed)
        if n <= MAX_BASE:
            return Shift(Samples.of(source, chosen), None, shifted, group)
        # in order of position, which may carry meaning, every second one: two samples of the whole
        return Shift(Samples.of(source, chosen[::2]), Samples.of(source, chosen[1::2]), shifted, group)


class ShiftReader:
    """``[chains, d]`` weights to ``[chains, 2 + m]``: mean losses of both original sets, and losses of m samples."""

    def __init__(self, objective: Objective, shift: Shift, seed: int) -> None:
        self._observed = Probe(objective, shift.observed, seed=seed)
        self._base = Probe(objective, shift.base, seed=seed) if shift.base is not None else None
        self.shifted = Probe(objective, shift.shifted, seed=seed)

    def __call__(self, weights: Tensor, slopes: Optional[Tensor] = None) -> Tensor:
        observed = self._observed(weights).double().mean(dim=1, keepdim=True)
        base = observed if self._base is None else self._base(weights).double().mean(dim=1, keepdim=True)
        return torch.cat([observed, base, self.shifted(weights).double()], dim=1)


@dataclass(frozen=True, eq=False)
class _Component:
    """What one component's chains showed."""

    whole: Response
    single: Response
    by_group: Optional[Response]
    per_chain: Tensor
    llc: float
    posterior: LocalPosterior
    num_weights: int
    num_draws: int
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    index: Tensor


def measure_susceptibility(
    components: Mapping[str, Callable[[], Objective]],
    source: DatasetSource,
    shift: Shift,
    settings: ChainSettings,
    collective: Optional[Collective] = None,
    prepare: Optional[Callable[[Objective], None]] = None,
    localization: Optional[Mapping[str, float]] = None,
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

    Raises:
        ValueError: as :func:`~lightning_slt.estimate.measure_llc`, and for a loss that couples samples.
    """
    start = time.perf_counter()
    collective = collective or Alone()
    found: dict[str, _Component] = {}
    for name, make in components.items():
        made: list[Objective] = []
        collective.exchange(lambda make=make, made=made: made.append(make()))  # type: ignore[misc]
        if prepare is not None:
            prepare(made[0])
        source.forget()
        gamma = (localization or {}).get(name, settings.localization)
        asked = dataclasses.replace(settings, localization=gamma)
        found[name] = _measure(name, made[0], source, shift, asked, collective)
    first, parts = next(iter(found.values())), list(found.values())
    group = _known(shift, first.index)
    names = _names(group)
    nothing = torch.zeros(len(parts), 0, dtype=torch.float64)
    notes = [note for part in parts for note in part.notes]
    if shift.base is not None:
        notes.append(
            f"the loss of the original data is that of two random subsets of {len(shift.observed.index)}: their own "
            "sampling error is not in se"
        )
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
        llc=torch.tensor([p.llc for p in parts], dtype=torch.float64),
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


def _known(shift: Shift, index: Tensor) -> Optional[list[Optional[str]]]:
    """The groups of the samples that have a loss."""
    if shift.group is None:
        return None
    group = dict(zip(shift.shifted.index, shift.group, strict=True))
    return [group[int(i)] for i in index]


def _names(group: Optional[list[Optional[str]]]) -> tuple[str, ...]:
    return tuple(sorted({g for g in group if g is not None})) if group is not None else ()


def _measure(
    name: str,
    objective: Objective,
    source: DatasetSource,
    shift: Shift,
    settings: ChainSettings,
    collective: Collective,
) -> _Component:
    readers: list[ShiftReader] = []

    def make_reader() -> ShiftReader:
        readers.append(ShiftReader(objective, shift, settings.seed))
        return readers[-1]

    drawn, chains = _run(objective, source, settings, collective, make_reader)
    read = drawn.segment.read
    assert read is not None
    posterior = chains.posterior
    losses_read = torch.isfinite(read[:, :, :2]).all(2).all(1)
    good = ~diverged(drawn.segment, posterior.nbeta, len(objective.anchor)) & losses_read
    reasons: list[str] = []
    notes: list[str] = []
    if not bool(good.all()):
        reasons.append(f"{name}: {int((~good).sum())} of {len(good)} chains have diverged")
    draws, m = read.shape[1], read.shape[2] - 2
    if draws < MIN_READS:
        reasons.append(f"{name}: {draws} readings of a chain are too few")
    per_chain = torch.full((settings.num_chains,), math.nan, dtype=torch.float64)
    index = readers[-1].shifted.index
    group = _known(shift, index)
    names = _names(group)
    # a sample without a number is no fault of the chains
    usable = torch.isfinite(read[good][:, :, 2:]).all(1).all(0)
    if bool(good.any()) and not bool(usable.all()):
        left_out = index[~usable].tolist()
        some = ", ".join(map(str, left_out[:NAMED])) + (", ..." if len(left_out) > NAMED else "")
        said = f"{name}: the loss of {len(left_out)} of {m} shifted samples is not finite: left out ({some})"
        (notes if bool(usable.any()) else reasons).append(said)
    whole, single, grouped = (_nothing(k) for k in (1, m, len(names)))
    llc = math.nan
    if bool(good.any()) and bool(usable.any()) and draws >= 2:
        kept = read[good].double()
        phi, base, losses = posterior.nbeta * kept[:, :, 0], kept[:, :, 1:2], kept[:, :, 2:][:, :, usable]
        whole = susceptibility(phi, losses.mean(dim=2, keepdim=True) - base)
        single = _among(susceptibility(phi, losses - base), usable)
        if group:
            own = [g for g, kept_one in zip(group, usable.tolist(), strict=True) if kept_one]
            grouped = susceptibility(phi, group_means(losses, own, names) - base)
        per_chain[good] = whole.per_chain[:, 0]
        llc = float(phi.mean())
        if whole.share > MIXED:
            reasons.append(f"{name}: {whole.share:.0%} of the integrand's variance lies between chains: not mixed")
    return _Component(
        whole,
        single,
        grouped if names else None,
        per_chain,
        llc,
        posterior,
        len(objective.anchor),
        draws,
        tuple(reasons),
        tuple(notes),
        index,
    )


def _among(response: Response, usable: Tensor) -> Response:
    """The response to every sample, NaN for those that are not usable."""
    if bool(usable.all()):
        return response
    chi, se = (torch.full((len(usable),), math.nan, dtype=torch.float64) for _ in range(2))
    per_chain = torch.full((len(response.per_chain), len(usable)), math.nan, dtype=torch.float64)
    chi[usable], se[usable], per_chain[:, usable] = response.chi, response.se, response.per_chain
    return Response(chi, se, per_chain, response.share)


def _nothing(m: int) -> Response:
    empty = torch.full((m,), math.nan, dtype=torch.float64)
    return Response(empty, empty, empty.unsqueeze(0), math.nan)


def _run(
    objective: Objective,
    source: DatasetSource,
    settings: ChainSettings,
    collective: Collective,
    make_reader: Callable[[], ShiftReader],
) -> tuple[Drawn, Chains]:
    """The sampler that was asked for; else kinetic Langevin, with a shorter step where chains leave the region."""
    between = settings.num_steps_bw_draws or BETWEEN
    if settings.sampler is not None:
        settings = dataclasses.replace(settings, num_steps_bw_draws=between)
        return run_chains(objective, source, settings, collective, make_reader=make_reader, read_every=between)
    n = source.num_samples
    nbeta = settings.nbeta if settings.nbeta is not None else default_nbeta(n or 0)
    gamma = settings.localization if settings.localization is not None else default_localization(objective.anchor)
    posterior = LocalPosterior(nbeta, gamma)
    burnin = settings.num_burnin_steps if settings.num_burnin_steps is not None else BURNIN
    curvatures: list[Curvature] = []
    for shortenings in range(MAX_SHORTENINGS + 1):
        lr = (STEP * 0.5**shortenings) ** 2

        def make_sampler(chains: Chains, lr: float = lr) -> tuple[LocalPosterior, Sampler]:
            batches = list(source.window(0).anchor_loss)
            stream = generator(settings.seed, PROBE, device=objective.device)
            # a shorter step is tried in the same metric
            if not curvatures:
                curvatures.append(curvature_at(objective.anchor, lambda w: chains.gradients(w, batches), stream))
            return posterior, KineticLangevin(lr, metric=LowRankMetric.of(curvatures[0], posterior))

        chosen = dataclasses.replace(
            settings,
            sampler=KineticLangevin(lr),
            nbeta=nbeta,
            localization=gamma,
            num_steps_bw_draws=between,
            num_burnin_steps=max(burnin, COLD_BURNIN) if shortenings else burnin,
        )
        drawn, chains = run_chains(
            objective,
            source,
            chosen,
            collective,
            make_reader=make_reader,
            read_every=between,
            make_sampler=make_sampler,
            # the Gaussian of the curvature at w* may reach out to where the loss is far steeper
            spread=shortenings == 0,
        )
        if not bool(diverged(drawn.segment, nbeta, len(objective.anchor)).any()):
            break
        log.info(f"chains left the region at time step {lr**0.5:.2g}: shortened")
        source.forget()
    return drawn, chains


def estimate_susceptibility(
    module: nn.Module,
    data: Any,
    shifted_data: Any,
    loss_fn: Optional[LossFn] = None,
    *,
    components: Optional[Mapping[str, Restriction]] = None,
    sampler: Optional[Union[Sampler, Mapping[str, Any]]] = None,
    nbeta: Optional[float] = None,
    localization: Optional[float] = None,
    num_chains: int = 16,
    num_draws: int = 200,
    num_burnin_steps: Optional[int] = None,
    num_steps_bw_draws: Optional[int] = None,
    batch_size: Optional[int] = None,
    weights: Optional[Mapping[str, Any]] = None,
    restrict: Restriction = None,
    seed: int = 0,
    device: Optional[torch.device | str] = None,
    full_batch: bool = False,
    max_shifted: Optional[int] = MAX_SHIFTED,
    groups: Optional[Sequence[Optional[str]]] = None,
    num_samples: Optional[int] = None,
    method: str = "auto",
) -> SusceptibilityEstimate:
    """How the LLC of each component answers to a shift of the data, ``-Cov_w(nbeta (L(w) - L(w*)), Delta L(w))``.

    Baker et al. 2025, arXiv 2504.18274; ``Delta L`` is the mean loss on the shifted data minus that on ``data``, and
    only the component's weights move. In units of the loss; ``response`` is ``nbeta`` times it, the derivative of the
    LLC by the share of the shift. The module is not changed, nor is any global random state.

    Args:
        module: a LightningModule (its ``training_step`` is the loss), or any module with ``loss_fn``.
        data: the original data: a map-style Dataset, or a DataLoader over one.
        shifted_data: the same of the shifted data; each sample is a shift of its own besides.
        loss_fn: ``loss_fn(module, batch)`` -> scalar or ``[batch]``.
        components: by name, which weights move, as in ``restrict``; None for one component, ``"all"``, of ``restrict``.
        sampler: None for :class:`~lightning_slt.sampling.samplers.KineticLangevin` in a metric that is measured, which
            a finite step does not heat on a quadratic loss; SGLD's step adds to the covariance.
        nbeta: None for ``n / log n``.
        localization: None for ``d / |w*|²`` of the component within [1, 100].
        num_chains: independent chains of each component.
        num_draws: readings of each.
        num_burnin_steps: None for 8 (with a sampler given: until the trace is flat).
        num_steps_bw_draws: steps between readings; None for 2.
        batch_size: None for all the data up to 2,048 samples, else 512.
        weights: a ``state_dict`` (or a Lightning checkpoint with one) to study in place of the module's weights.
        restrict: which weights move, where there is one component.
        seed: determines the estimate and the subsets.
        device: None for where the module is.
        full_batch: every step sees all the data.
        max_shifted: samples of the shifted data at the most, a reproducible subset; None for all.
        groups: the group of each sample of ``shifted_data``, for ``group_chi``.
        num_samples: n, where it is not the length of ``data``.
        method: see :func:`~lightning_slt.estimate_llc`.

    Returns:
        A :class:`~lightning_slt.susceptibility_record.SusceptibilityEstimate`: ``chi``, ``se`` ``[components]``,
        ``per_chain``, ``matrix`` ``[components, samples]``; look at ``valid`` and ``reasons`` first.

    Raises:
        ValueError: for an argument out of range, ``components`` beside ``restrict``, no data, data without an index, a
            coupled loss, a component that matches no weight. The message names the argument and the remedy.
        TypeError: for an argument of another kind, likewise.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(60, 3, generator=g)
        >>> net = nn.Linear(3, 1, bias=False)
        >>> y = net(x).detach()
        >>> square = lambda m, b: (m(b[0]) - b[1]).square().mean() / 2
        >>> found = estimate_susceptibility(net, TensorDataset(x, y), TensorDataset(2 * x, 2 * y), square)
        >>> found.valid, bool(found.chi[0] < -5 * found.se[0]), found.matrix.shape
        (True, True, torch.Size([1, 60]))
    """
    if components is not None and restrict is not None:
        raise ValueError("components and restrict are both given: name the weights of each component in components.")
    if components is not None and not components:
        raise ValueError("components is empty: leave it None for all weights, or give {name: patterns}.")
    for name, value in (("batch_size", batch_size), ("max_shifted", max_shifted)):
        check_count(name, value)
    check_count("num_samples", num_samples, otherwise=", or None to take it from the data")
    sampler = as_sampler(sampler)
    settings = ChainSettings(
        sampler=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin_steps=num_burnin_steps,
        num_steps_bw_draws=num_steps_bw_draws,
        nbeta=nbeta,
        localization=localization,
        seed=seed,
        method=method,
    )
    seed = settings.seed
    state = state_dict_of(weights)
    wanted: Mapping[str, Restriction] = components if components is not None else {"all": restrict}

    def made(restriction: Restriction) -> Callable[[], Objective]:
        return lambda: Objective(module, loss_fn, restriction, device, weights=state)

    with torch.inference_mode(False), preserve_rng(seed):
        # all of them once, so that a name that matches nothing is not found after an hour of chains
        objectives = {name: made(restriction)() for name, restriction in wanted.items()}
        target = next(iter(objectives.values())).device
        full = full_batch or (sampler is not None and sampler.full_batch)
        source = _indexed("data", data, batch_size, target, seed, full)
        source.num_samples = num_samples or source.num_samples
        other = _indexed("shifted_data", shifted_data, 1, target, seed, False)
        total = other.num_indexed
        if groups is not None and len(groups) != total:
            raise ValueError(f"groups: {len(groups)} of them for {total} samples of shifted_data; give one a sample.")
        numbers = choose_samples(total, max_shifted, seed)
        group = [groups[i] for i in numbers] if groups is not None else None
        shift = Shift.of(source, Samples.of(other, numbers), seed, group)
        try:
            return measure_susceptibility(
                {name: lambda o=o: o for name, o in objectives.items()},  # type: ignore[misc]
                source,
                shift,
                settings,
            )
        except NoLossError as error:
            raise ValueError(f"{error} Give loss_fn(module, batch) -> loss.") from error


def chain_batch(n: int) -> int:
    """Minibatch of the chains: all the data where that is not much, for momentum keeps the minibatches' noise.

    Example:
        >>> chain_batch(100), chain_batch(50_000)
        (100, 512)
    """
    return max(n, 1) if n <= MAX_BASE else LARGE_BATCH


def _indexed(
    name: str, data: Any, batch_size: Optional[int], device: torch.device, seed: int, full: bool
) -> DatasetSource:
    check_data(name, data)
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(f"{name}: {NO_INDEX}")
    if len(dataset) == 0:
        raise ValueError(f"{name}: the dataset is empty.")
    full = full or (batch_size is None and len(dataset) <= MAX_BASE)
    source = source_of(data, len(dataset) if full else batch_size or LARGE_BATCH, device, seed, None, full)
    if not isinstance(source, DatasetSource):
        raise ValueError(f"{name}: {NO_INDEX}")
    return source


__all__ = ["Shift", "chain_batch", "estimate_susceptibility", "measure_susceptibility"]
