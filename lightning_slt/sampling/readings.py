"""What a stretch of steps says about the chains: heat of the step, arrival, transient, and which chains have left.

Pure functions of a :class:`~lightning_slt.sampling.chains.Segment`; the equations are those of
:mod:`lightning_slt.sampling.calibration`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.chains import Segment

DIVERGED = 10.0
"""A chain whose mean excess over the anchor is this many times the number of weights has left the posterior."""


def diverged(segment: Segment, nbeta: float, d: int) -> Tensor:
    """``[chains]`` bool: non-finite, or further up in its second half than any chain of the posterior could be."""
    level = nbeta * segment.second_half().difference.mean(dim=1)
    return ~segment.finite | (level > DIVERGED * d + 100.0)


def heat_share(segment: Segment, lr: float, posterior: LocalPosterior, keep: Tensor | None = None) -> float:
    """Share of the LLC that is heat of the finite step, pooled over the chains that are kept (all finite ones).

    Returns:
        NaN where no chain is finite or the chains have not moved against the gradient yet.
    """
    keep = segment.finite if keep is None else keep
    grad_dot = float(segment.grad_dot[keep].mean())
    if not grad_dot > 0:
        return math.nan
    return 0.25 * lr * float(force_of(segment, posterior)[keep].mean()) / grad_dot


def heat_share_error(segment: Segment, lr: float, posterior: LocalPosterior, keep: Tensor) -> float:
    """Standard error of :func:`heat_share` between chains; 0 where one chain is all there is."""
    rows = keep.nonzero().flatten()
    if len(rows) < 2:
        return 0.0
    force, gu = force_of(segment, posterior)[rows].mean(dim=1), segment.grad_dot[rows].mean(dim=1)
    # of a ratio of means, to first order
    residual = 0.25 * lr * force - heat_share(segment, lr, posterior, keep) * gu
    return float(residual.std() / math.sqrt(len(rows)) / gu.mean().abs())


def force_of(segment: Segment, posterior: LocalPosterior) -> Tensor:
    """``grad . P G``, reading by reading."""
    pulled = segment.pulled_dot if segment.pulled_dot is not None else segment.grad_dot
    return posterior.nbeta * segment.grad_square + posterior.localization * pulled


def virial_ratio(segment: Segment, lr: float, posterior: LocalPosterior, d: int, keep: Tensor | None = None) -> float:
    """``(E[G.u] - eps/4 E[G.P G]) / d``: 1 at stationarity, less where directions have not been reached yet.

    Args:
        lr: 0 for a sampler whose step does not heat.
    """
    keep = segment.finite if keep is None else keep
    gu, uu = (float(x[keep].mean()) for x in (segment.grad_dot, segment.square))
    pulled_dot = segment.pulled_dot if segment.pulled_dot is not None else segment.grad_dot
    pulled_square = segment.pulled_square if segment.pulled_square is not None else segment.square
    nbeta, gamma = posterior.nbeta, posterior.localization
    force = nbeta * float(force_of(segment, posterior)[keep].mean())
    force += gamma * (nbeta * float(pulled_dot[keep].mean()) + gamma * float(pulled_square[keep].mean()))
    return (nbeta * gu + gamma * uu - 0.25 * lr * force) / d


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
    left = torch.arange(1, count + 1, dtype=blocks.dtype)
    mean = blocks.cumsum(0) / left
    squared_error = ((blocks.square().cumsum(0) / left - mean.square()) / left).clamp(min=0)
    best = int(squared_error[count // 2 - 1 :].argmin()) + count // 2 - 1
    return 0 if best == count - 1 else steps - (best + 1) * size
