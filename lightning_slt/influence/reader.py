"""Losses of single samples along chains, and the estimate that they make."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from lightning_slt.functional.between_chains import MIXED, between_share, factor_of
from lightning_slt.functional.block_errors import LONG_BLOCK_DRAWS, blocks_per_chain, mean_and_error
from lightning_slt.functional.influence import LinearParts, correlation, shrink
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.influence.columns import Columns, usable
from lightning_slt.influence.probes import ProbeSet
from lightning_slt.influence.sides import Sides, by_group
from lightning_slt.influence_record import Dropped, InfluenceEstimate
from lightning_slt.sampling.control import SteinControl
from lightning_slt.sampling.kinetic import KineticSampling
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.probe import MAX_GRADIENTS, Probe

log = logging.getLogger(__name__)

MIN_DEGREES = 8
"""Degrees of freedom of a covariance within chains (readings less one, of all chains) below which it is not valid."""
NOTED_FACTOR = 1.5
"""What a variance within chains is multiplied by for what it lacks, beyond which a note says so."""


def least_readings(num_chains: int) -> int:
    """Of a chain, for influence to be valid.

    Example:
        >>> [least_readings(chains) for chains in (1, 2, 4, 8, 16)]
        [9, 5, 3, 2, 2]
    """
    return 1 + math.ceil(MIN_DEGREES / max(num_chains, 1))


class InfluenceReader:
    """Losses of the samples of a :class:`ProbeSet` along chains, and what they say.

    Args:
        objective: the loss.
        probes: the samples.
        seed: of random numbers inside the step.
        progress: told of no steps, again and again while losses are read: what it raises ends that.
    """

    def __init__(
        self,
        objective: Objective,
        probes: ProbeSet,
        seed: int,
        progress: Optional[Callable[[int], None]] = None,
    ) -> None:
        self.probes = probes
        self._anchor = objective.anchor
        self._gradients: Optional[Tensor] = None
        self._train = Probe(objective, probes.train, False, seed, progress)
        self._query: Optional[Probe] = None
        if probes.query is not None:
            self._query = Probe(objective, probes.query, probes.per_token, seed, progress)
        self._without_control = ""
        self._control: Optional[SteinControl] = None
        log.debug(f"losses of single samples: {self._train.method} ({self._train.reason})")

    @property
    def slow(self) -> str:
        """What a user should know where losses are computed one by one; empty for other ways."""
        return self._train.slow or (self._query.slow if self._query is not None else "")

    def take_gradients(self) -> Optional[Tensor]:
        """``[n_train, d]`` at ``w*``, kept for control variates with those of the queries; None where these do not
        fit, or are not to be had at once."""
        room, found = MAX_GRADIENTS, list[Tensor]()
        for probe in (self._train, self._query):
            if probe is None:
                continue
            gradients = probe.gradients(room)
            if gradients is None:
                self._without_control = (
                    "no control variates: the gradients of all samples do not fit, or are not to be had at once"
                )
                return None
            found.append(gradients)
            room -= gradients.numel()
        self._gradients = torch.cat(found) if len(found) > 1 else found[0]
        return self._gradients[: self._train.n]

    def control_with(self, sampling: KineticSampling) -> None:
        """Read control variates for this posterior and the metric of its sampler from now on."""
        if self._gradients is not None and sampling.sampler.metric is not None:
            self._control = SteinControl(self._gradients, self._anchor, sampling.posterior, sampling.sampler.metric)

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
        self,
        trace: Tensor,
        good: Tensor,
        posterior: LocalPosterior,
        num_samples: Optional[int],
        shrinkage: Optional[float] = 1.0,
    ) -> InfluenceEstimate:
        """What the readings say.

        Args:
            trace: ``[num_chains, reads, ...]``, what was read.
            good: ``[num_chains]`` bool, chains to use.
            posterior: that was sampled.
            num_samples: n.
            shrinkage: 1 for the plain covariance, above 1 see :func:`~lightning_slt.functional.influence.shrink`; None
                to weight what is not known to first order by its James-Stein factor.
        """
        x, y, linear = self._split(trace[good])
        dropped = (*x.dropped, *(y.dropped if y is not x else ()))
        chains, reads = x.losses.shape[:2]
        reasons = [] if chains else ["no chain has stayed finite and local"]
        if x.empty or y.empty:
            reasons.append("no sample has finite losses")
        if 0 < chains * (reads - 1) < MIN_DEGREES or reads < 2:
            reasons.append(f"{reads} readings of {chains} chains are too few")
        if x.empty or y.empty or not chains or reads < 2:
            return self._nothing(posterior, num_samples, tuple(reasons), dropped)
        share = between_share(x.losses)
        if share > MIXED:
            reasons.append(f"{share:.0%} of the losses' variance lies between chains: they have not mixed")
        # a chain's own mean takes a part of the variance with it, the more the longer its memory: what lies between
        # chains that sample the same posterior says how much
        whole = factor_of(share, reads)
        sides = self._sides(x, y, linear)
        pairs = _pairs(sides, whole, shrinkage, y is x)
        mean, mean_se = mean_and_error(x.losses)
        train_group = x.groups(self.probes.train_group, self.probes.train)
        query_group = train_group if y is x else y.groups(self.probes.query_group, self.probes.query)
        names, group_matrix, group_se = by_group(sides, train_group, query_group, whole)
        return InfluenceEstimate(
            matrix=pairs.matrix,
            correlation=pairs.correlation,
            se=pairs.se,
            self_influence=pairs.own,
            self_influence_se=pairs.own_se,
            init_loss=x.anchor,
            mean_loss=x.anchor + mean,
            mean_loss_se=mean_se,
            query_init_loss=y.anchor,
            query_mean_loss=y.anchor + pairs.mean_y,
            train_index=x.index,
            query_index=y.index,
            query_token=y.token if self.probes.per_token else None,
            train_group=train_group,
            query_group=query_group,
            groups=names,
            group_matrix=group_matrix,
            group_se=group_se,
            nbeta=posterior.nbeta,
            localization=posterior.localization,
            num_samples=num_samples,
            num_chains=chains,
            num_draws=reads,
            num_blocks=pairs.num_blocks,
            rest_weight=pairs.rest_weight,
            between_share=share,
            dropped=dropped,
            valid=not reasons,
            reasons=tuple(reasons),
            notes=(
                *self.probes.notes,
                *_of_few(chains, reads, whole),
                *_of_power(pairs.shrinkage),
                *((self._without_control,) if self._without_control else ()),
            ),
            shrinkage=pairs.shrinkage,
            queries_are_train=y is x,
        )

    def _split(self, trace: Tensor) -> tuple[Columns, Columns, list[Tensor]]:
        """Readings ``[chains, reads, ...]`` as the columns of both sides, which are one where the training samples are
        the queries, and the linear parts ``[chains, reads, n]`` where there are any."""
        n = self._train.n + (self._query.n if self._query is not None else 0)
        losses, *linear = trace.split(n, dim=2)
        x = usable("train", losses[:, :, : self._train.n], self._train)
        y = usable("query", losses[:, :, self._train.n :], self._query) if self._query is not None else x
        return x, y, linear

    def _sides(self, x: Columns, y: Columns, linear: list[Tensor]) -> Sides:
        """The losses of both sides, with their control variates where there are any."""
        if self._control is None or not linear:
            return Sides(x.losses, y.losses)
        # where the samples of each side lie among the gradients, those of training first
        columns = x.keep.nonzero().flatten()
        rows = columns if y is x else y.keep.nonzero().flatten() + self._train.n
        x_parts, x_down, x_across = LinearParts(*(part[:, :, columns] for part in linear)).fitted(x.losses)
        y_parts, y_down, y_across = x_parts, x_down, x_across
        if y is not x:
            y_parts, y_down, y_across = LinearParts(*(part[:, :, rows] for part in linear)).fitted(y.losses)

        def known(of: Tensor, down: Tensor, across: Tensor, others: Tensor, slopes: tuple[Tensor, Tensor]) -> Tensor:
            assert self._control is not None
            scale = torch.outer(across, slopes[0]).addr_(down, slopes[1]) / 2
            return scale.mul_(self._control.expected(of, others))

        return Sides(
            x.losses,
            y.losses,
            x_parts,
            y_parts,
            known(rows, y_down, y_across, columns, (x_down, x_across)),
            x_down * x_across * self._control.diagonal(columns),
            y_down * y_across * self._control.diagonal(rows),
        )

    def _nothing(
        self, posterior: LocalPosterior, n: Optional[int], reasons: tuple[str, ...], dropped: tuple[Dropped, ...]
    ) -> InfluenceEstimate:
        none, pairs, long = (
            torch.empty(0, device="cpu").double(),
            torch.empty(0, 0, device="cpu").double(),
            torch.empty(0, dtype=torch.long, device="cpu"),
        )
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


@dataclass(frozen=True, eq=False)
class _Pairs:
    """What the losses of both sides say of each pair, of each training sample and of each query's mean."""

    matrix: Tensor
    correlation: Tensor
    se: Tensor
    own: Tensor
    own_se: Tensor
    mean_y: Tensor
    num_blocks: int
    rest_weight: float
    shrinkage: float


def _pairs(sides: Sides, whole: float, shrinkage: Optional[float], same: bool) -> _Pairs:
    """Covariances and variances times what chains miss within themselves; ``same`` where queries are the training
    samples."""
    rest = sides.rest(whole)
    # where nothing is known to first order there is nothing to lean on
    weight = rest.stein_weight if shrinkage is None and sides.known is not None else 1.0
    power = 1.0 if shrinkage is None else shrinkage
    result, plain = rest.plus(sides.known, weight), rest.plus(sides.known)
    own, own_se = sides.variance(whole, of_train=True)
    own_query = own if same else sides.variance(whole, of_train=False)[0]
    # both sides of a quotient from the same draws
    rho = correlation(plain.matrix, own, own_query)
    if same:
        result.matrix.diagonal().copy_(own)  # the square of a loss is known better than products of two
    matrix = shrink(result.matrix, rho, power)
    return _Pairs(matrix, rho, result.se, own, own_se, result.mean_y, result.num_blocks, weight, power)


def _of_few(num_chains: int, reads: int, whole: float) -> list[str]:
    """What is to be known of so few readings that no error can say it."""
    notes = []
    if num_chains == 1 and reads < LONG_BLOCK_DRAWS * blocks_per_chain(1, reads):
        notes.append(
            f"{reads} readings of one chain: what is correlated over more than "
            f"{reads // blocks_per_chain(1, reads)} of them is not in the errors: more chains"
        )
    if whole > NOTED_FACTOR:
        notes.append(
            f"chains of {reads} readings are short for their memory: influences are {whole:.2g} times what each chain "
            "shows, from what lies between the chains: more draws, or more steps between them"
        )
    return notes


def _of_power(power: float) -> list[str]:
    return [f"shrunk with power {power:g}: no longer the plain covariance"] if power != 1 else []
