"""What a stretch of steps says about the chains: heat of the step, arrival, transient, and which chains have left.

Pure functions of a :class:`~lightning_slt.sampling.segment.Segment`; the equations are those of
:mod:`lightning_slt.sampling.step_size`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slt.functional.convergence import standard_error
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.segment import STATS_EVERY, Segment

DIVERGED = 10.0
"""A chain whose mean excess over the anchor is this many times the number of weights has left the posterior."""
SURE = 3.0
"""Errors by which a loss must rise more slowly than a square for its steepness to be above 1."""
BLOCKS = 8
"""Parts of a chain that this error is taken from."""


def diverged(segment: Segment, nbeta: float, d: int) -> Tensor:
    """``[chains]`` bool: non-finite, or further up in its second half than any chain of the posterior could be."""
    level = nbeta * segment.second_half().difference.mean(dim=1)
    return ~segment.finite | (level > DIVERGED * d + 100.0)


@dataclass(frozen=True, eq=False)
class Heat:
    """What a finite step adds to the LLC, in its units.

    Attributes:
        discretisation: of the step alone, ``(eps/8) E[nbeta g . P (nbeta g + gamma u)]`` with g the gradient of all
            the data: exact on a quadratic; right to within 2 % of the LLC up to a third of it on singular models; times
            the steepness where that is above 1.
        noise: of the minibatches, ``weight * (eps/8) nbeta² E[xi . P xi]``, xi a gradient's part that is its batch's
            own.
        weight: how much of that reaches the loss, see :func:`heat_of`.
        steepness: :func:`steepness_of` the potential, 1 on a quadratic: the further below, the less surely the whole of
            the heat is in the loss (on ``w1 w2²``, where it is 1/3, about half of it is); 2 where all of it is kinks.
        each: ``[chains kept]``, the sum of each chain by itself; its mean is ``total``.
        shared: the sampler shares noise between steps, and discretisation adds nothing at first order.
    """

    discretisation: float
    noise: float
    weight: float
    steepness: float
    each: Tensor
    shared: bool = False

    @property
    def total(self) -> float:
        """What the estimate has of it."""
        return self.noise if self.shared else self.of_sgld

    @property
    def of_sgld(self) -> float:
        """What it would have of it where no noise is shared."""
        return self.discretisation + self.noise


def heat_of(
    segment: Segment,
    lr: float,
    posterior: LocalPosterior,
    keep: Tensor | None = None,
    shared: bool = False,
    thermostat_of: int = 0,
) -> Heat:
    r"""The heat of the step, pooled over the chains that are kept (all finite ones); NaN where there are none.

    Noise along a direction that localisation holds, not the loss, warms the pull ``gamma |u|²`` and leaves the loss
    alone. With noise in proportion to curvature the share that reaches the loss is
    ``g.P nbeta g / (g.P nbeta g + gamma g.P u)``. And a loss that rises faster than a square,
    ``nbeta E[g.u] > 2 LLC``, rises by ``2 LLC / nbeta E[g.u]`` of what ``g.u / 2`` does. Their product is ``weight``.
    That ratio is below 1 on a square as well where ``w*`` lies beside the minimum, since chains run down to it first:
    what the scatter of the loss says in its place (:func:`_steepness_by_scatter`) holds where it is larger.

    Where the steepness is above 1, discretisation and noise are both multiplied by it. Below 1 discretisation is left
    whole, see ``Heat.steepness``.

    Args:
        thermostat_of: d, where a thermostat holds the mean temperature of so many directions: friction is then larger
            by ``1 + t``, t the mean of the noise's heat over them, and of the loss ``E`` in it ``E t`` is taken off
            already (:class:`~lightning_slt.SGNHT`).
    """
    keep = segment.finite if keep is None else keep
    rows = keep.nonzero().flatten()
    if not len(rows):
        return Heat(math.nan, math.nan, math.nan, math.nan, torch.empty(0, dtype=torch.float64, device="cpu"))
    nbeta, gamma = posterior.nbeta, posterior.localization
    total = 0.125 * lr * nbeta * force_of(segment, posterior)[rows].mean(dim=1)
    noise = torch.zeros_like(total)
    if segment.noise_square is not None and segment.noise_square.shape[1]:
        noise = 0.125 * lr * nbeta**2 * _known(segment.noise_square[rows]).mean(dim=1)
    noise = noise * (min(max(float(noise.mean()), 0.0), float(total.mean())) / (float(noise.mean()) or 1.0))
    pulled = segment.pulled_dot if segment.pulled_dot is not None else segment.grad_dot
    pull = 0.125 * lr * nbeta * gamma * float(pulled[rows].mean())
    own = float((total - noise).mean()) - pull
    by_loss = own / (own + pull) if own > 0 and pull > 0 else 1.0
    level, steepness = nbeta * float(segment.difference[rows].mean()), steepness_of(segment, posterior, keep)
    reached = steepness
    if steepness < 1.0 and segment.noise_square is not None:
        reached = max(steepness, min(_steepness_by_scatter(segment, posterior, keep), 1.0))
    weight = by_loss * reached
    own_heat = (total - noise) * max(steepness, 1.0)
    each = weight * noise if shared else own_heat + weight * noise
    reaches = weight * float(noise.mean())
    if thermostat_of:
        each = each - 2.0 * noise / thermostat_of * nbeta * segment.difference[rows].mean(dim=1)
        reaches -= 2.0 * float(noise.mean()) / thermostat_of * level
    return Heat(float(own_heat.mean()), reaches, weight, steepness, each, shared)


def steepness_of(segment: Segment, posterior: LocalPosterior, keep: Tensor) -> float:
    """``2 LLC / nbeta E[g.u]``, which is 1 on a quadratic, where it is below 1; 1 where either is not positive; up to 2
    where the loss has kinks.

    A kink ``|u|`` (an L1 loss that is fitted exactly, weights that an L1 penalty holds at 0) carries twice the heat of
    a square: to first order in eps a chain of SGLD adds ``(eps/8) (2 E[f'U'] - Cov(f, U'²))`` to the mean of f, where
    all directions are as fast as each other. Of that the first is twice the heat, and the second once on a square and
    nothing on a kink, whose force is the same everywhere. Both are read from the same readings. Noise of the
    minibatches that loss and force share makes the covariance larger and the steepness smaller, never the other way.
    It counts where the LLC is beyond ``nbeta E[g.u] / 2`` by :data:`SURE` errors, and from there on the more the surer;
    on a quadratic that is so by chance once in 740 times (the error is that of a mean over :data:`BLOCKS` parts of
    every chain, a tenth to a third too large). A network whose loss saturates far from ``w*`` is not kinked for that,
    and has the covariance of a square.

    Args:
        keep: ``[chains]`` bool, which are pooled.
    """
    level, half_virial = float(segment.difference[keep].mean()), 0.5 * float(segment.grad_dot[keep].mean())
    if half_virial > level > 0:
        return level / half_virial
    if not level > half_virial > 0 or segment.grad_dot.shape[1] < BLOCKS:
        return 1.0
    excess = _block_means(segment.difference[keep]) - 0.5 * _block_means(segment.grad_dot[keep])
    sure = SURE * standard_error(excess) / (level - half_virial)
    return 1.0 + (1.0 - sure**2) * _share_of_kinks(segment, posterior, keep) if sure < 1.0 else 1.0


def _steepness_by_scatter(segment: Segment, posterior: LocalPosterior, keep: Tensor) -> float:
    """``2 Cov(f, U) / nbeta E[g.u]`` with ``f = nbeta (L - L(w*))`` and ``U = f + gamma/2 |u|²``, at the lower end of
    its error; 0 where there is but one chain.

    ``Cov(f, U)`` is what the LLC gains by where all directions become warmer by the same share: ``d/2`` on a quadratic
    wherever ``w*`` is, the LLC itself on a sum of homogeneous potentials at their minimum. Around the mean over the
    chains at each step, so that what they have in common on their way up from ``w*`` is no scatter; and from products
    of neighbouring steps, whose minibatches are independent, carried on from two steps apart and one to none.
    """
    loss = posterior.nbeta * segment.difference[keep]
    chains, steps = loss.shape
    if chains < 2 or steps < 3:
        return 0.0
    loss = loss - loss.mean(dim=0)
    near, far = ((loss[:, lag:] * loss[:, :-lag]).mean(dim=1) for lag in (1, 2))
    each = 2.0 * near - far
    square = segment.square[keep]
    if steps == square.shape[1] * STATS_EVERY:
        pull = 0.5 * posterior.localization * (square - square.mean(dim=0))
        each = each + (loss.reshape(chains, -1, STATS_EVERY).mean(dim=2) * pull).mean(dim=1)
    surely = float(each.mean() - each.std() / math.sqrt(chains)) * chains / (chains - 1)
    return 2.0 * surely / (posterior.nbeta * float(segment.grad_dot[keep].mean()))


def _share_of_kinks(segment: Segment, posterior: LocalPosterior, keep: Tensor) -> float:
    """``1 - Cov(f, |G|²) / E[nbeta |g|² + gamma g.u]``, within 0 and 1, with the covariance at the upper end of its
    error; 0 where the readings are not every so many steps, or there is but one chain."""
    nbeta = posterior.nbeta
    force, whole = force_of(segment, posterior)[keep], whole_force_of(segment, posterior)[keep]
    chains, readings = force.shape
    level = float(force.mean())
    if chains < 2 or segment.steps != readings * STATS_EVERY or not level > 0:
        return 0.0
    loss = nbeta * segment.difference[keep].reshape(chains, readings, STATS_EVERY)
    loss, whole = loss - loss.mean(), whole / nbeta - float(whole.mean()) / nbeta
    # at which of the steps the readings were is not known where pieces were cut: it is where the two agree most
    each = (loss * whole.unsqueeze(2)).mean(dim=1)
    each = each[:, int(each.mean(dim=0).argmax())]
    covariance = float(each.mean()) + float(each.std()) / math.sqrt(chains)
    return min(max(1.0 - covariance / level, 0.0), 1.0)


def _block_means(table: Tensor) -> Tensor:
    return torch.stack([part.mean(dim=1) for part in table.tensor_split(BLOCKS, dim=1)], dim=1)


def force_of(segment: Segment, posterior: LocalPosterior) -> Tensor:
    """``grad . P G``, reading by reading."""
    pulled = segment.pulled_dot if segment.pulled_dot is not None else segment.grad_dot
    return posterior.nbeta * segment.grad_square + posterior.localization * pulled


def whole_force_of(segment: Segment, posterior: LocalPosterior) -> Tensor:
    """``G . P G``, reading by reading."""
    nbeta, gamma = posterior.nbeta, posterior.localization
    dot = segment.pulled_dot if segment.pulled_dot is not None else segment.grad_dot
    square = segment.pulled_square if segment.pulled_square is not None else segment.square
    return nbeta * force_of(segment, posterior) + gamma * (nbeta * dot + gamma * square)


def virial_readings(
    segment: Segment,
    lr: float,
    posterior: LocalPosterior,
    d: int,
    keep: Tensor | None = None,
    shared: bool = False,
) -> Tensor:
    """``[chains kept, readings]``, whose mean over a chain is its virial ratio ``(E[G.u] - eps/4 E[G.P G]) / d``: 1 at
    stationarity, less where directions have not been reached yet, more where chains are hotter than the posterior.

    Args:
        lr: 0 for a sampler whose step does not heat.
        keep: ``[chains]`` bool; None for those that are finite.
        shared: of a sampler that shares noise between steps it is the minibatches' part of G alone that heats.
    """
    rows = (segment.finite if keep is None else keep).nonzero().flatten()
    gu, uu = segment.grad_dot[rows], segment.square[rows]
    nbeta, gamma = posterior.nbeta, posterior.localization
    force = whole_force_of(segment, posterior)[rows]
    if shared:
        noise = segment.noise_square
        if noise is None or noise.shape[1] == 0:
            force = torch.zeros_like(force)
        else:
            # a difference of two readings, which may come out below zero where there is little of it
            own, whole = nbeta**2 * _known(noise[rows]).mean(dim=1), float(force.mean())
            force = (own + min(max(float(own.mean()), 0.0), whole) - own.mean()).unsqueeze(1)
    return (nbeta * gu + gamma * uu - 0.25 * lr * force) / d


def _known(noise: Tensor) -> Tensor:
    """Readings, those that a minibatch without a loss left open at the mean of their chain's others."""
    if not bool(noise.isnan().any()):
        return noise
    return noise.where(~noise.isnan(), noise.nanmean(dim=1, keepdim=True)).nan_to_num(nan=0.0)


def transient(trace: Tensor) -> int:
    """Steps to leave out at the front: the cut that makes the standard error of the rest smallest, half at the most.

    White 1997, *An effective truncation heuristic for bias reduction in simulation output* (MSER), on the mean over
    the chains, in at most 200 blocks.

    Args:
        trace: ``[num_chains, steps]``; none of them where no chain is finite.
    """
    steps = trace.shape[1]
    if len(trace) == 0 or steps < 8:
        return 0
    size = max(1, steps // 200)
    count = steps // size
    # from the end: what is left over is at the front
    blocks = trace.mean(dim=0)[steps - count * size :].reshape(count, size).mean(dim=1).flip(0)
    left = torch.arange(1, count + 1, dtype=blocks.dtype, device="cpu")
    mean = blocks.cumsum(0) / left
    squared_error = ((blocks.square().cumsum(0) / left - mean.square()) / left).clamp(min=0)
    best = int(squared_error[count // 2 - 1 :].argmin()) + count // 2 - 1
    return 0 if best == count - 1 else steps - (best + 1) * size
