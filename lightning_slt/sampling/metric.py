"""A metric of low rank for chains: steep directions are known one by one, all others share one scale.

The curvature of a trained network is a few steep directions over a broad floor. With ``H V = V diag(h)`` for the
steepest and ``h_0`` for the rest, chains in the coordinates y of ``w = w* + P y``,

    P = (n beta h_0 + gamma)^(-1/2) (I - V V') + V diag((n beta h + gamma)^(-1/2)) V',

see a posterior that is round, and reach all of it in a few steps. P changes how they move, not what they sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior

MAX_RANK = 96
"""Directions that are kept; two thirds of them are multiplied at once."""
BLOCK_SHARE = 2 / 3
MAX_BYTES = 2**28
"""Of the directions; where even a few do not fit, there is one scale for all."""
ITERATIONS = 2
PROBES = 16
"""Random directions for the mean curvature."""

Gradient = Callable[[Tensor], Tensor]
"""``[k, d]`` weights to ``[k, d]`` gradients of the mean loss."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """What is known of the Hessian of the mean loss at ``w*``.

    Attributes:
        values: ``[k]``, its largest eigenvalues, descending; positive ones only.
        vectors: ``[d, k]``, their directions.
        mean: its trace over d.
    """

    values: Tensor
    vectors: Tensor
    mean: float

    @property
    def largest(self) -> float:
        return float(self.values[0]) if len(self.values) else self.mean


@dataclass(frozen=True, eq=False)
class LowRankMetric:
    """The P of this module's equation, applied to rows.

    Attributes:
        scale: of all directions that are not in ``vectors``.
        vectors: ``[d, k]``, orthonormal.
        extra: ``[k]``, what P has along each of them beyond ``scale``.
    """

    scale: float
    vectors: Tensor
    extra: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """``P x`` for every row of ``[..., d]``."""
        if not len(self.extra):
            return self.scale * rows
        return torch.addmm(rows, (rows @ self.vectors) * self.extra, self.vectors.T, beta=self.scale)

    def __repr__(self) -> str:
        return f"LowRankMetric(rank={len(self.extra)}, scale={self.scale:.3g})"

    @staticmethod
    def of(curvature: Curvature, posterior: LocalPosterior) -> LowRankMetric:
        """The metric in which this posterior is round."""
        nbeta, gamma = posterior.nbeta, posterior.localization
        floor = float(curvature.values[-1]) if len(curvature.values) else max(curvature.mean, 0.0)
        scale = (nbeta * floor + gamma) ** -0.5
        extra = (nbeta * curvature.values + gamma) ** -0.5 - scale
        return LowRankMetric(scale, curvature.vectors, extra)


def curvature_at(
    anchor: Tensor,
    gradient: Gradient,
    generator: torch.Generator,
    max_rank: int = MAX_RANK,
    radius: Optional[float] = None,
    single: Optional[Tensor] = None,
) -> Curvature:
    """The steepest directions and the mean curvature, from differences of gradients: block Krylov iteration (Musco and
    Musco 2015, *Randomized block Krylov methods*, arXiv 1504.05477), two multiplications with H.

    Both blocks stay in the space that is searched, so that twice as many directions are looked at for as many
    gradients as in a subspace iteration; a third of those, the least settled ones, are left out. The gradients of
    single samples, where they are at hand, are where to begin: the Hessian of a mean loss is, but for what the
    residuals weigh, a sum over such directions.

    Args:
        anchor: ``[d]``, ``w*``.
        gradient: of the mean loss, the same minibatches at every call.
        generator: of the random directions.
        max_rank: directions at the most.
        radius: of the differences; None for a hundredth of the weights' norm.
        single: ``[n, d]``, gradients of single samples at ``w*``; None to begin with random directions.
    """
    d = len(anchor)
    radius = radius or 0.01 * max(float(anchor.norm()), 1e-3)
    room = MAX_BYTES // max(4 * d * anchor.element_size(), 1)
    rank = min(max_rank, d, math.floor(room / BLOCK_SHARE))

    def product(directions: Tensor) -> Tensor:
        """``H v`` for every row of unit length."""
        return (gradient(anchor + radius * directions) - gradient(anchor - radius * directions)) / (2 * radius)

    signs = torch.randint(0, 2, (PROBES, d), generator=generator, device=anchor.device).to(anchor) * 2 - 1
    signs /= math.sqrt(d)
    mean = float((product(signs) * signs).sum(dim=1).mean())
    nothing = Curvature(anchor.new_zeros(0), anchor.new_zeros(d, 0), mean)
    if rank < 1:
        return nothing
    block = torch.randn(d, math.ceil(BLOCK_SHARE * rank), generator=generator, device=anchor.device, dtype=anchor.dtype)
    if single is not None:
        among = single.T @ (single @ block)
        # with few samples, or without any slope, some of the directions are random all the same
        block = among / among.norm().clamp_min(torch.finfo(among.dtype).tiny) + 1e-3 * block / block.norm()
    basis, image = nothing.vectors, nothing.vectors
    for _ in range(ITERATIONS):
        block = _beside(basis, block)[:, : d - basis.shape[1]]
        if not block.shape[1]:
            break
        multiplied = product(block.T.contiguous()).T
        if not bool(torch.isfinite(multiplied).all()):
            return nothing
        basis, image = torch.cat([basis, block], dim=1), torch.cat([image, multiplied], dim=1)
        block = multiplied
    small = basis.T @ image
    values, turn = torch.linalg.eigh((small + small.T) / 2)
    values, vectors = values.flip(0)[:rank], (basis @ turn).flip(1)[:, :rank]
    steep = values > 0
    return Curvature(values[steep], vectors[:, steep].contiguous(), mean)


def _beside(basis: Tensor, block: Tensor) -> Tensor:
    """An orthonormal basis of the part of ``block`` that is orthogonal to ``basis``; twice, to the last digits."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block
