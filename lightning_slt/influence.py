"""Per-sample influence at the weights of a module: one call without a Trainer, and what the monitor shares with it."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_slt.estimate import ChainSettings, default_localization, read_llc, run_chains, state_dict_of
from lightning_slt.functional.influence import (
    Covariance,
    LinearParts,
    between_share,
    correlation,
    covariance,
    group_means,
    mean_and_error,
    shrink,
    variance,
)
from lightning_slt.functional.posterior import LocalPosterior, default_nbeta
from lightning_slt.influence_record import Dropped, InfluenceEstimate
from lightning_slt.record import Estimate
from lightning_slt.sampling.batches import DatasetSource, MinibatchSource, source_of
from lightning_slt.sampling.chains import STATS_EVERY, Chains, Progress
from lightning_slt.sampling.collective import Collective
from lightning_slt.sampling.control import SteinControl
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.metric import Curvature, LowRankMetric, curvature_at
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.probe import MAX_GRADIENTS, GroupFn, Probe, Samples, choose_samples, default_group
from lightning_slt.sampling.readings import diverged
from lightning_slt.sampling.restriction import Restriction
from lightning_slt.sampling.rng import PROBE, generator, preserve_rng
from lightning_slt.sampling.samplers import KineticLangevin, Sampler
from lightning_slt.sampling.steps import LossFn, NoLossError

log = logging.getLogger(__name__)

MAX_TRAIN = 10_000
"""Training samples of a one-call estimate where nothing else is said."""
FULL_BATCH = 2048
"""Data sets up to this size are seen whole at every step."""
LARGE_BATCH = 512
"""Minibatch of larger ones: momentum does not take the minibatches' heat off."""
WIDTH = 0.35
"""Size of the region that influence is measured in, as a share of the weights' own norm."""
DAMPING = 2.5
"""Localisation in units of ``nbeta`` times the mean curvature of the loss."""
STEP = 0.7
"""Time step in the coordinates in which the posterior is round; 2 is unstable there, and where the loss bends more
sharply away from ``w*`` a smaller one may be."""
MAX_SHORTENINGS = 6
SHORTENING = 0.5
WIDE_DRAWS, WIDE_BURNIN = 10, 8
"""Readings of each chain, and steps before them, for the mean losses over the posterior of the learning coefficient."""
COLD_BURNIN = 40
"""Steps from ``w*``, where the Gaussian of the curvature is no start."""
READ_COST = 0.4
"""Cost of reading the samples' losses, in units of that of moving the chains, in a firing of the monitor."""
CALLS = 3_000_000
"""Products that would take as long as the calls of a step do by themselves."""
MIN_READS = 8
"""Readings of a chain without which influence is not valid."""
MIXED = 0.5
"""Between-chain share of the variance above which chains have not seen the same posterior."""
NO_INDEX = (
    "influence needs samples that can be asked for by number. Give a map-style Dataset (with __len__ and __getitem__), "
    "or a DataLoader over one without a batch sampler of its own."
)


@dataclass(frozen=True)
class ProbeSet:
    """The samples whose influence is read: training samples, and queries or none.

    Attributes:
        train, query: the samples; without queries, the training samples are the queries.
        train_group, query_group: their groups; None where there are none.
        per_token: every token of a query is a row of its own.
    """

    train: Samples
    query: Optional[Samples] = None
    train_group: Optional[list[Optional[str]]] = None
    query_group: Optional[list[Optional[str]]] = None
    per_token: bool = False

    @property
    def num_samples(self) -> int:
        """All of them."""
        return len(self.train.index) + (len(self.query.index) if self.query is not None else 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of how the samples were read."""
        notes = []
        for kind, samples in (("training samples", self.train), ("queries", self.query)):
            if samples is not None and samples.changed:
                notes.append(
                    f"the dataset gives other {kind} when read again (random augmentation?), such as numbers "
                    f"{samples.changed[:3]}: each is measured as it was read once"
                )
        return tuple(notes)


def groups_of(
    source: DatasetSource,
    index: Sequence[int],
    group_fn: Optional[GroupFn],
    classes: Optional[Sequence[Optional[str]]] = None,
) -> Optional[list[Optional[str]]]:
    """The group of each sample; None where no sample has one.

    Args:
        source, index: the samples.
        group_fn: None for the class, where there is one: as many labels as samples are no classes.
        classes: labels that are known to be classes.

    Raises:
        ValueError: where ``group_fn`` raises, naming the sample.
    """
    function = group_fn or default_group
    with preserve_rng():
        told = source.read_items(index, partial(_tried, function))
    for i, (_, error) in zip(index, told, strict=True):
        if error is not None:
            if group_fn is None:
                return None
            raise ValueError(f"group_fn failed on sample {i}: {error}")
    found: list[Optional[str]] = [group for group, _ in told]
    known = {g for g in found if g is not None}
    few = len(known) <= max(len(found) // 2, 1) or known <= set(classes or ())
    return found if known and (group_fn is not None or few) else None


def _tried(function: GroupFn, sample: Any) -> tuple[Optional[str], Optional[str]]:
    """The group of a sample, or what is wrong with it: an exception of another process would not say which sample."""
    try:
        group = function(sample)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    # half characters are no text: neither files nor loggers take them
    return None if group is None else str(group).encode(errors="replace").decode(), None


def probe_set(
    train: DatasetSource,
    query: Optional[DatasetSource],
    max_train: Optional[int],
    max_query: Optional[int],
    seed: int,
    group_fn: Optional[GroupFn] = None,
    per_token: bool = False,
) -> ProbeSet:
    """Choose and read the samples: all of a source up to the limit, else a reproducible subset.

    Raises:
        ValueError: for a limit below 1; for ``per_token`` without queries; where ``group_fn`` fails.
    """
    for name, limit in (("max_train", max_train), ("max_query", max_query)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name}={limit}: must be at least 1, or None for all samples.")
    if per_token and query is None:
        raise ValueError("per_token=True: give query_data, whose tokens become the rows.")
    parts: list[tuple[Samples, Optional[list[Optional[str]]]]] = []
    for source, limit in ((train, max_train), (query, max_query)):
        if source is None:
            continue
        n = len(source.indices) if source.indices is not None else len(source.dataset)  # type: ignore[arg-type]
        samples = Samples.of(source, choose_samples(n, limit, seed))
        # queries may be few: what is a class is seen by the training samples
        known = parts[0][1] if parts else None
        parts.append((samples, groups_of(source, samples.index, group_fn, known)))
    first, *rest = parts
    if not rest:
        return ProbeSet(first[0], train_group=first[1], per_token=per_token)
    return ProbeSet(first[0], rest[0][0], first[1], rest[0][1], per_token)


class InfluenceReader:
    """Losses of the samples of a :class:`ProbeSet` along chains, and what they say.

    Args:
        objective: the loss.
        probes: the samples.
        seed: of random numbers inside the step.
        sampling: the posterior, and a sampler with a metric: control variates are read as well, where the gradients of
            the samples fit. None for the losses alone.
    """

    def __init__(
        self, objective: Objective, probes: ProbeSet, seed: int, sampling: Optional[InfluenceSampling] = None
    ) -> None:
        self.probes = probes
        self._train = Probe(objective, probes.train, seed=seed)
        self._query = Probe(objective, probes.query, probes.per_token, seed) if probes.query is not None else None
        self._without_control = ""
        self._control = self._make_control(objective, sampling)
        log.debug(f"losses of single samples: {self._train.method} ({self._train.reason})")

    def _make_control(self, objective: Objective, sampling: Optional[InfluenceSampling]) -> Optional[SteinControl]:
        if sampling is None or sampling.sampler.metric is None:
            return None
        room = MAX_GRADIENTS - self._train.n * len(objective.anchor)
        gradients = [p.gradients(room) if room > 0 else None for p in (self._train, self._query) if p is not None]
        found = [g for g in gradients if g is not None]
        if len(found) < len(gradients):
            self._without_control = (
                "no control variates: the gradients of all samples do not fit, or are not to be had at once"
            )
            return None
        return SteinControl(torch.cat(found), objective.anchor, sampling.posterior, sampling.sampler.metric)

    @property
    def wants_gradients(self) -> bool:
        """Whether the chains' gradients are of use: for control variates alone."""
        return self._control is not None

    @property
    def products(self) -> int:
        """Multiplications that the loss of one sample takes."""
        return self._train.products

    @property
    def train_index(self) -> Tensor:
        """``[n_train]`` long, which training sample each column is."""
        return self._train.index

    def train_losses(self, weights: Tensor) -> Tensor:
        """``[chains, d]`` to the ``[chains, n_train]`` losses of the training samples above those at ``w*``."""
        return self._train(weights)

    def __call__(self, weights: Tensor, slopes: Optional[Tensor] = None) -> Tensor:
        """``[chains, d]`` weights, and gradients there, to ``[chains, n]`` losses of all samples above those at ``w*``;
        to ``[chains, 3 n]`` with control variates: the losses, and both of their linear parts."""
        parts = [self._train(weights)]
        if self._query is not None:
            parts.append(self._query(weights))
        if self._control is not None:
            here = weights if slopes is None else slopes
            linear = self._control(weights, here)
            # without a gradient at these weights there is nothing to compare with
            parts += [part.cpu() if slopes is not None else torch.zeros_like(part).cpu() for part in linear]
        return torch.cat(parts, dim=1)

    def read(
        self, trace: Tensor, good: Tensor, posterior: LocalPosterior, num_samples: Optional[int], shrinkage: float = 1.0
    ) -> InfluenceEstimate:
        """What the readings say.

        Args:
            trace: ``[num_chains, reads, ...]``, what was read.
            good: ``[num_chains]`` bool, chains to use.
            posterior: that was sampled.
            num_samples: n.
            shrinkage: see :func:`~lightning_slt.functional.influence.shrink`.
        """
        train, query = self._train, self._query or self._train
        n = train.n + (query.n if self._query is not None else 0)
        losses, *linear = trace[good].split(n, dim=2)
        x_all, y_all = losses[:, :, : train.n], losses[:, :, train.n :]
        y_all = x_all if self._query is None else y_all
        reasons = [] if len(x_all) else ["no chain has stayed finite and local"]
        keep_x, dropped = _usable("train", x_all, train)
        keep_y, more = _usable("query", y_all, query) if self._query is not None else (keep_x, [])
        if not bool(keep_x.any()) or not bool(keep_y.any()):
            reasons.append("no sample has finite losses")
        reads = x_all.shape[1]
        if reads < MIN_READS:
            reasons.append(f"{reads} readings of a chain are too few")
        if not bool(keep_x.any()) or not bool(keep_y.any()) or not len(x_all) or reads < 2:
            return self._nothing(posterior, num_samples, tuple(reasons), (*dropped, *more))
        x, y = x_all[:, :, keep_x], y_all[:, :, keep_y]
        share = between_share(x)
        # a chain's own mean takes a part of the variance with it, the more the longer its memory: what lies between
        # chains that sample the same posterior says how much
        whole = 1.0 / (1.0 - share) if share <= MIXED else 1.0
        sides = self._sides(x, y, linear, keep_x, keep_y)
        result = sides.covariance(whole)
        own, own_se = sides.variance(whole, of_train=True)
        own_query = own if self._query is None else sides.variance(whole, of_train=False)[0]
        rho = correlation(result.matrix, own, own_query)
        mean, mean_se = mean_and_error(x)
        anchor, query_anchor = train.anchor[keep_x], query.anchor[keep_y]
        if share > MIXED:
            reasons.append(f"{share:.0%} of the losses' variance lies between chains: they have not mixed")
        train_group = _kept(self.probes.train_group, keep_x, self.probes.train, train)
        query_group = train_group
        if self._query is not None:
            query_group = _kept(self.probes.query_group, keep_y, self.probes.query, query)
        names, group_matrix, group_se = _by_group(sides, train_group, query_group, whole)
        power = f"shrunk with power {shrinkage:g}: no longer the plain covariance"
        return InfluenceEstimate(
            matrix=shrink(result.matrix, rho, shrinkage),
            correlation=rho,
            se=result.se,
            self_influence=own,
            self_influence_se=own_se,
            init_loss=anchor,
            mean_loss=anchor + mean,
            mean_loss_se=mean_se,
            query_init_loss=query_anchor,
            query_mean_loss=query_anchor + result.mean_y,
            train_index=train.index[keep_x],
            query_index=query.index[keep_y],
            query_token=query.token[keep_y] if self.probes.per_token else None,
            train_group=train_group,
            query_group=query_group,
            groups=names,
            group_matrix=group_matrix,
            group_se=group_se,
            nbeta=posterior.nbeta,
            localization=posterior.localization,
            num_samples=num_samples,
            num_chains=len(x),
            num_draws=reads,
            num_blocks=result.num_blocks,
            between_share=share,
            dropped=(*dropped, *more),
            valid=not reasons,
            reasons=tuple(reasons),
            notes=(
                *self.probes.notes,
                *((power,) if shrinkage != 1 else ()),
                *((self._without_control,) if self._without_control else ()),
            ),
            shrinkage=shrinkage,
            queries_are_train=self._query is None,
        )

    def _sides(self, x: Tensor, y: Tensor, linear: list[Tensor], keep_x: Tensor, keep_y: Tensor) -> _Sides:
        """The losses of both sides, with their control variates where there are any."""
        if self._control is None or not linear:
            return _Sides(x, y)
        n = self._train.n
        train = LinearParts(*(part[:, :, :n][:, :, keep_x] for part in linear))
        query = train
        if self._query is not None:
            query = LinearParts(*(part[:, :, n:][:, :, keep_y] for part in linear))
        columns, rows = keep_x.nonzero().flatten(), keep_y.nonzero().flatten()
        rows = rows if self._query is None else rows + n
        x_parts, x_down, x_across = train.fitted(x)
        y_parts, y_down, y_across = (x_parts, x_down, x_across) if self._query is None else query.fitted(y)

        def known(of: Tensor, down: Tensor, across: Tensor, others: Tensor, slopes: tuple[Tensor, Tensor]) -> Tensor:
            assert self._control is not None
            scale = torch.outer(across, slopes[0]).addr_(down, slopes[1]) / 2
            return scale.mul_(self._control.expected(of, others))

        return _Sides(
            x,
            y,
            x_parts,
            y_parts,
            known(rows, y_down, y_across, columns, (x_down, x_across)),
            x_down * x_across * self._control.diagonal(columns),
            y_down * y_across * self._control.diagonal(rows),
        )

    def _nothing(
        self, posterior: LocalPosterior, n: Optional[int], reasons: tuple[str, ...], dropped: tuple[Dropped, ...]
    ) -> InfluenceEstimate:
        none, pairs, long = torch.empty(0).double(), torch.empty(0, 0).double(), torch.empty(0, dtype=torch.long)
        return InfluenceEstimate(
            *(pairs, pairs, pairs, none, none, none, none, none, none, none, long, long),
            nbeta=posterior.nbeta,
            localization=posterior.localization,
            num_chains=0,
            num_draws=0,
            num_samples=n,
            dropped=dropped,
            valid=False,
            reasons=reasons,
            notes=self.probes.notes,
            queries_are_train=self._query is None,
        )


def _usable(kind: str, losses: Tensor, probe: Probe) -> tuple[Tensor, list[Dropped]]:
    """``[n]`` bool: the loss is finite at ``w*`` and at every reading; and the others by name."""
    at_anchor = torch.isfinite(probe.anchor)
    along = torch.isfinite(losses).all(dim=1).all(dim=0) if len(losses) else torch.zeros_like(at_anchor)
    dropped = [Dropped(kind, i, "the step gives no loss for it") for i in probe.without]
    if len(losses):
        for k in (~(at_anchor & along)).nonzero().flatten().tolist():
            where = "along the chains" if bool(at_anchor[k]) else "at the current weights"
            dropped.append(Dropped(kind, int(probe.index[k]), f"its loss is not finite {where}"))
    return at_anchor & along, dropped


def _kept(
    groups: Optional[list[Optional[str]]], keep: Tensor, samples: Optional[Samples], probe: Probe
) -> Optional[tuple[str, ...]]:
    """The groups of the columns that are kept; a sample without one is in the group ``""``."""
    if groups is None or samples is None:
        return None
    of = dict(zip(samples.index, groups, strict=True))
    return tuple(of[i] or "" for i in probe.index[keep].tolist())


@dataclass(frozen=True, eq=False)
class _Sides:
    """Losses along the draws, of training samples (x) and queries (y), what they are to first order, and the known
    covariances of that."""

    x: Tensor
    y: Tensor
    x_parts: Optional[LinearParts] = None
    y_parts: Optional[LinearParts] = None
    known: Optional[Tensor] = None
    known_x: Optional[Tensor] = None
    known_y: Optional[Tensor] = None

    def covariance(self, whole: float) -> Covariance:
        found = covariance(self.x, self.y, x_parts=self.x_parts, y_parts=self.y_parts)
        return found.scaled(whole).plus(self.known)

    def variance(self, whole: float, of_train: bool) -> tuple[Tensor, Tensor]:
        """``[n]``, and its error."""
        losses, parts, known = (
            (self.x, self.x_parts, self.known_x) if of_train else (self.y, self.y_parts, self.known_y)
        )
        value, error = variance(losses, parts)
        return (value * whole if known is None else value * whole + known).clamp_(min=0), error * whole

    def by_group(self, train: tuple[str, ...], query: tuple[str, ...], names: tuple[str, ...]) -> _Sides:
        """The same of the groups' mean losses."""
        known = self.known
        if known is not None:
            known = group_means(group_means(known[None], train, names).mT, query, names).mT[0]
        return _Sides(
            group_means(self.x, train, names),
            group_means(self.y, query, names),
            self.x_parts.by_group(train, names) if self.x_parts is not None else None,
            self.y_parts.by_group(query, names) if self.y_parts is not None else None,
            known,
        )


def _by_group(
    sides: _Sides, train: Optional[tuple[str, ...]], query: Optional[tuple[str, ...]], whole: float
) -> tuple[tuple[str, ...], Optional[Tensor], Optional[Tensor]]:
    if train is None or query is None:
        return (), None, None
    names = tuple(sorted({*train, *query} - {""}, key=_natural))
    if not 1 <= len(names) <= 100:
        return (), None, None
    result = sides.by_group(train, query, names).covariance(whole)
    return names, result.matrix, result.se


def _natural(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def reading_interval(num_probed: int, batch_size: int, products: int) -> int:
    """Steps between readings, so that reading costs about 0.4 of what moving the chains does.

    A reading is one forward pass of all the samples; a step is three of a minibatch, and calls that take as long as
    some millions of products. No clock is asked: the same run reads at the same steps on every machine.

    Args:
        num_probed: samples.
        batch_size: of the chains.
        products: multiplications that the loss of one sample takes.

    Example:
        >>> [reading_interval(1000, 64, 26_122), reading_interval(1000, 64, 10**8), reading_interval(100, 64, 26_122)]
        [12, 16, 4]
    """
    step = 3 * max(batch_size, 1) * products + CALLS
    return STATS_EVERY * max(1, math.ceil(num_probed * products / step / READ_COST / STATS_EVERY))


def measure_both(
    objective: Objective,
    source: MinibatchSource,
    settings: ChainSettings,
    probes: ProbeSet,
    collective: Optional[Collective] = None,
    progress: Optional[Progress] = None,
    memory: Optional[ChainMemory] = None,
    read_every: Optional[int] = None,
) -> tuple[Estimate, InfluenceEstimate]:
    """The learning coefficient and the influence of samples, from the same chains.

    Arguments and errors are those of :func:`~lightning_slt.estimate.measure_llc`.

    Args:
        probes: the samples.
        read_every: steps between readings; None for :func:`reading_interval`, and never so many that a chain is left
            with fewer than 8 readings.
    """
    start = time.perf_counter()
    readers: list[InfluenceReader] = []

    def interval() -> int:
        if read_every is not None:
            return read_every
        cheap = reading_interval(probes.num_samples, source.batch_size, readers[0].products)
        # a firing may be over in as many steps as it has draws: its readings must be enough to say something
        return min(cheap, STATS_EVERY * max(1, settings.num_draws // (MIN_READS * STATS_EVERY)))

    def make_reader() -> InfluenceReader:
        readers.append(InfluenceReader(objective, probes, settings.seed))
        return readers[0]

    drawn, chains = run_chains(
        objective, source, settings, collective, progress, memory, make_reader, read_every=interval
    )
    estimate = read_llc(drawn, chains, settings)
    segment = drawn.segment
    assert segment.read is not None
    good = ~diverged(segment, chains.posterior.nbeta, len(objective.anchor))
    influence = readers[0].read(segment.read, good, chains.posterior, source.num_samples)
    seconds = time.perf_counter() - start
    return estimate.replace(seconds=seconds), influence.replace(seconds=seconds)


@dataclass(frozen=True, eq=False)
class InfluenceSampling:
    """Posterior and sampler for influence, from the curvature at ``w*``.

    The damped influence function ``g_i' (H + gamma / nbeta)^-1 g_q`` predicts retraining best at a damping of a few
    times the mean curvature; a posterior that is cooled until it stays near ``w*`` (``gamma = d / (0.35 |w*|)²``) reads
    it off without the curvature changing on the way. docs/influence.md has the figures.

    Attributes:
        posterior: ``gamma`` sets the width, ``nbeta = gamma / damping`` the temperature.
        sampler: kinetic Langevin in the metric of the curvature.
        curvature: at ``w*``.
    """

    posterior: LocalPosterior
    sampler: KineticLangevin
    curvature: Curvature

    @staticmethod
    def of(
        anchor: Tensor, curvature: Curvature, nbeta: Optional[float], localization: Optional[float], lr: float = STEP**2
    ) -> InfluenceSampling:
        """What is not given is chosen by the rule above."""
        square = max(float(anchor.double().square().sum()), 1e-12)
        mean = max(curvature.mean, 1e-3 * curvature.largest, 1e-12)
        if localization is None:
            localization = len(anchor) / (WIDTH**2 * square) if nbeta is None else DAMPING * mean * nbeta
        if nbeta is None:
            nbeta = localization / (DAMPING * mean)
        posterior = LocalPosterior(nbeta, localization)
        return InfluenceSampling.with_posterior(posterior, curvature, lr)

    @staticmethod
    def with_posterior(posterior: LocalPosterior, curvature: Curvature, lr: float) -> InfluenceSampling:
        """Of this posterior, in the metric in which the curvature makes it round."""
        metric = LowRankMetric.of(curvature, posterior)
        return InfluenceSampling(posterior, KineticLangevin(lr, metric=metric), curvature)


def estimate_influence(
    module: nn.Module,
    train_data: Any,
    query_data: Any = None,
    loss_fn: Optional[LossFn] = None,
    *,
    sampler: Optional[Sampler] = None,
    nbeta: Optional[float] = None,
    localization: Optional[float] = None,
    num_chains: int = 16,
    num_draws: int = 50,
    num_burnin_steps: int = 6,
    num_steps_bw_draws: int = 2,
    batch_size: Optional[int] = None,
    weights: Optional[Mapping[str, Any]] = None,
    restrict: Restriction = None,
    seed: int = 0,
    device: Optional[torch.device | str] = None,
    full_batch: Optional[bool] = None,
    max_train: Optional[int] = MAX_TRAIN,
    max_query: Optional[int] = None,
    group_fn: Optional[GroupFn] = None,
    per_token: bool = False,
    shrinkage: float = 1.0,
    control_variates: bool = True,
    num_samples: Optional[int] = None,
    method: str = "auto",
) -> InfluenceEstimate:
    """Influence of training samples on queries: the covariance of their losses over the local posterior.

    ``matrix[q, i] = Cov_w(l_i(w), l_q(w))``, the negative of the local Bayesian influence function (Kreer et al. 2025,
    arXiv 2509.26544): positive where more weight on training sample i lowers the loss of query q. The module is not
    changed, nor is any global random state.

    By default the chains are kinetic Langevin ones in the metric of the curvature, on a posterior whose damping
    ``localization / nbeta`` and width are those that predict retraining best (see docs/influence.md); it is cooler than
    that of the learning coefficient, since it is to be read near ``w*``. ``mean_loss``, by which suspects are ranked,
    is read over the latter's posterior, from a few more draws (with ``nbeta`` or ``localization`` given, over theirs).

    Args:
        module: a LightningModule (its ``training_step`` is the loss), or any module with ``loss_fn``.
        train_data: a map-style Dataset, or a DataLoader over one.
        query_data: the same for the queries; None for the training samples themselves.
        loss_fn: ``loss_fn(module, batch)`` -> scalar, ``[batch]`` or ``[batch, tokens]``.
        sampler: None for :class:`~lightning_slt.sampling.samplers.KineticLangevin` in a metric that is measured; any
            other with its ``lr`` calibrated where it is None.
        nbeta: None for ``localization / (2.5 x mean curvature)``; with a sampler given, for ``n / log n``.
        localization: None for ``d / (0.35 |w*|)²`` (with nbeta given: ``2.5 x mean curvature x nbeta``).
        num_chains: independent chains.
        num_draws: readings of each.
        num_burnin_steps: steps before the first.
        num_steps_bw_draws: steps between them.
        batch_size: of the chains; None for all the data up to 2,048 samples, else 512 or the DataLoader's where larger.
        weights: a ``state_dict`` (or a Lightning checkpoint with one) to study in place of the module's weights.
        restrict: which weights move.
        seed: determines the estimate and the subset of samples.
        device: None for where the module is.
        full_batch: True for all the data at every step, whatever its size.
        max_train, max_query: samples at the most; a reproducible subset of larger data. None for all.
        group_fn: the group of a sample, for ``group_matrix``; None takes the class where there is one.
        per_token: every token of a query is a row, ``query_token`` says which; ``loss_fn`` must give
            ``[batch, tokens]``.
        shrinkage: 1 for the plain covariance; 1.25 to 1.5 weighs weak correlations, mostly noise, down.
        control_variates: take the part of the covariance that is known out of the noise, see
            :mod:`lightning_slt.sampling.control`. Needs the gradients of all samples at ``w*``: done without where they
            are more than 67 million numbers, or the samples' losses are computed one by one; with a sampler given; and
            where there is no metric. ``notes`` says so.
        num_samples: n, where it is not the length of ``train_data``.
        method: ``"auto"``, ``"sequential"`` or ``"batched"``, see :func:`~lightning_slt.estimate_llc`.

    Returns:
        An :class:`~lightning_slt.influence_record.InfluenceEstimate`: ``matrix``, ``correlation`` and ``se``
        ``[n_query, n_train]``, ``self_influence`` ``[n_train]``, ``top(query, k)``, ``bottom(query, k)``.

    Raises:
        ValueError: for an argument out of range, no data, data without an index, a coupled loss, a module without a
            usable loss, a non-finite starting loss. The message names the argument and the remedy.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(40, 3, generator=g)
        >>> net = nn.Linear(3, 1, bias=False)
        >>> y = net(x).detach() + 0.1 * torch.randn(40, 1, generator=g)
        >>> inf = estimate_influence(net, TensorDataset(x, y), None, lambda m, b: (m(b[0]) - b[1]).square().mean())
        >>> inf.matrix.shape, inf.valid, bool((inf.matrix.diagonal() - inf.self_influence).abs().max() < 1e-9)
        (torch.Size([40, 40]), True, True)
    """
    start = time.perf_counter()
    shrink(torch.zeros(()), torch.zeros(()), shrinkage)
    settings = ChainSettings(
        sampler=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin_steps=num_burnin_steps,
        num_steps_bw_draws=num_steps_bw_draws,
        nbeta=nbeta if sampler is not None else nbeta or 1.0,
        localization=localization if sampler is not None else localization or 1.0,
        seed=seed,
        method=method,
    )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1.")
    if sampler is None and localization == 0 and nbeta is None:
        raise ValueError(f"localization={localization}: gives no nbeta. Give nbeta= too, or a positive localization.")
    with preserve_rng(seed):
        objective = Objective(module, loss_fn, restrict, device, weights=state_dict_of(weights))
        train = _indexed("train_data", train_data, batch_size, objective, seed, num_samples, full_batch)
        query = None
        if query_data is not None:
            query = _indexed("query_data", query_data, 1, objective, seed, None, False)
        probes = probe_set(train, query, max_train, max_query, seed, group_fn, per_token)
        readers: list[InfluenceReader] = []
        samplings: list[InfluenceSampling] = []

        def make_reader() -> InfluenceReader:
            known = samplings[-1] if samplings and control_variates else None
            readers.append(InfluenceReader(objective, probes, seed, known))
            return readers[0]

        try:
            for shortenings in range(MAX_SHORTENINGS + 1):
                lr = (STEP * SHORTENING**shortenings) ** 2

                def make_sampler(chains: Chains, lr: float = lr) -> tuple[LocalPosterior, Sampler]:
                    batches = list(train.window(0).anchor_loss)
                    curvature = curvature_at(
                        objective.anchor,
                        lambda w: chains.gradients(w, batches),
                        generator(seed, PROBE, device=objective.device),
                    )
                    samplings.append(InfluenceSampling.of(objective.anchor, curvature, nbeta, localization, lr))
                    return samplings[-1].posterior, samplings[-1].sampler

                chosen = dataclasses.replace(settings, sampler=KineticLangevin(lr)) if sampler is None else settings
                if shortenings:
                    # the Gaussian of the curvature at w* reaches out to where the loss is far steeper: not a start
                    chosen = dataclasses.replace(chosen, num_burnin_steps=max(num_burnin_steps, COLD_BURNIN))
                drawn, chains = run_chains(
                    objective,
                    train,
                    chosen,
                    make_reader=make_reader,
                    read_every=num_steps_bw_draws,
                    make_sampler=make_sampler if sampler is None else None,
                    spread=shortenings == 0,
                )
                good = ~diverged(drawn.segment, chains.posterior.nbeta, len(objective.anchor))
                if sampler is not None or bool(good.all()) or shortenings == MAX_SHORTENINGS:
                    break
                log.info(f"{int((~good).sum())} chains left the region at time step {lr**0.5:.2g}: shortened")
                train.forget()
                readers.clear()
        except NoLossError as error:
            raise ValueError(f"{error} Give loss_fn(module, batch) -> loss.") from error
        assert drawn.segment.read is not None
        found = readers[0].read(drawn.segment.read, good, chains.posterior, train.num_samples, shrinkage)
        if samplings and nbeta is None and localization is None:
            found = _with_wide_means(found, readers[0], samplings[-1], objective, train, settings, chains.method)
    return found.replace(seconds=time.perf_counter() - start)


def _with_wide_means(
    found: InfluenceEstimate,
    reader: InfluenceReader,
    sampling: InfluenceSampling,
    objective: Objective,
    train: DatasetSource,
    settings: ChainSettings,
    method: str,
) -> InfluenceEstimate:
    """With the mean losses over the posterior of the learning coefficient, from a few draws in the same metric.

    That of the matrix is cool: near ``w*``, and a wrong label that has been memorised is cheap there. They stay as they
    are where the wider one cannot be sampled at this step, or n is not known.
    """
    n = train.num_samples
    if n is None or n < 2 or not len(found.train_index):
        return found
    posterior = LocalPosterior(default_nbeta(n), default_localization(objective.anchor))
    assert sampling.sampler.lr is not None
    for shortenings in range(MAX_SHORTENINGS):
        lr = sampling.sampler.lr * SHORTENING ** (2 * shortenings)
        wide = InfluenceSampling.with_posterior(posterior, sampling.curvature, lr)
        burnin = COLD_BURNIN if shortenings else WIDE_BURNIN
        drawn, _ = run_chains(
            objective,
            train,
            dataclasses.replace(
                settings, sampler=wide.sampler, num_draws=WIDE_DRAWS, num_burnin_steps=burnin, method=method
            ),
            make_reader=lambda: lambda weights, slopes: reader.train_losses(weights),
            read_every=settings.num_steps_bw_draws or 1,
            make_sampler=lambda chains, wide=wide: (wide.posterior, wide.sampler),  # type: ignore[misc]
            spread=shortenings == 0,
        )
        if not bool(diverged(drawn.segment, posterior.nbeta, len(objective.anchor)).any()):
            break
        train.forget()
    else:
        return found
    read = drawn.segment.read
    assert read is not None
    place = {int(i): k for k, i in enumerate(reader.train_index.tolist())}
    losses = read[:, :, [place[int(i)] for i in found.train_index.tolist()]]
    if not bool(torch.isfinite(losses).all()):
        return found
    mean, error = mean_and_error(losses)
    return found.replace(
        mean_loss=found.init_loss + mean,
        mean_loss_se=error,
        mean_nbeta=posterior.nbeta,
        mean_localization=posterior.localization,
    )


def _indexed(
    name: str,
    data: Any,
    batch_size: Optional[int],
    objective: Objective,
    seed: int,
    num_samples: Optional[int],
    full_batch: Optional[bool],
) -> DatasetSource:
    """The source of data whose samples can be asked for by number.

    Raises:
        ValueError: where they cannot.
    """
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(f"{name}: {NO_INDEX}")
    n = len(dataset)
    if n == 0:
        raise ValueError(f"{name}: the dataset is empty.")
    if full_batch or (full_batch is None and batch_size is None and n <= FULL_BATCH):
        batch_size, full_batch = max(n, 1), True
    elif batch_size is None:
        batch_size = max(getattr(data, "batch_size", None) or 1, LARGE_BATCH)
    source = source_of(data, batch_size, objective.device, seed)
    if not isinstance(source, DatasetSource):
        raise ValueError(f"{name}: {NO_INDEX}")
    source.num_samples = num_samples or source.num_samples
    return source
