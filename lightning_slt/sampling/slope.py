r"""How far the weights under study are from a minimum, in units of the LLC.

The LLC is that of a minimum. Weights that an optimiser holds beside one, by weight decay, by the noise of a large
learning rate, or since it is still on its way, have a slope, chains go down it, and the loss that they gain by that is
missing in the estimate. For a quadratic loss ``L(w*) + g.u + u.H u / 2``, u = w - w*, chains stand at ``nbeta H E[u] =
-nbeta g`` in the mean where localisation is weak, so that

.. math:: n\beta\, E[L(w) - L(w^*)] = \tfrac12 n\beta\, \mathrm{tr}(H\, \mathrm{Cov}(w))
          + \tfrac12 n\beta\, g \cdot E[w - w^*]

The first term is what the estimate is at the minimum, the second one, with its sign turned, is the slope here. With a
stronger pull it is more by ``gamma/2 |E[u]|²``. It is zero at a minimum whatever the loss is like there, and so are its
readings: where ``g`` is zero they have no noise. Of chains that have not come down yet it is a part of what it will be.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.rng import preserve_rng

SHARE = 0.02
"""What it may cost, as a share of the engine's steps for the draws."""
MOST = 32
"""Minibatches that are asked at the most."""
LEAST = 4
"""Of more minibatches than that; with fewer their noise may be all there is."""


class Slope(NamedTuple):
    """In LLC units; NaN where it was not measured.

    Attributes:
        mean: what the LLC lacks.
        se: its error: how the chains differ, and the minibatches.
    """

    mean: float = math.nan
    se: float = math.nan


class _OfRank(NamedTuple):
    """``[own chains kept]``, of each the mean over the minibatches; and the squared error of their mean that comes from
    which minibatches these were."""

    each: Tensor
    of_batches: float


def slope_of(chains: Chains, drawn: Drawn, good: Tensor) -> Slope:
    """What the estimate lacks for the slope of the loss at ``w*``, from where the chains have ended.

    To be called on all ranks at once. It costs a gradient at ``w*`` for each of a few minibatches, at most
    :data:`SHARE` of the draws' own: of short draws, and of data that passes by and would have to be read for it,
    nothing is known.

    Args:
        chains: where the draws have ended.
        drawn: the draws.
        good: ``[chains]`` bool, which of them count.
    """
    most = int(SHARE * drawn.segment.steps * chains.calls_a_step)
    fine = {number for number, is_good in zip(drawn.segment.chains, good.tolist(), strict=True) if is_good}
    told = chains.collective.exchange(lambda: _of_rank(chains, fine, most))
    known = [of_rank for of_rank in told if of_rank is not None and len(of_rank.each)]
    if not known:
        return Slope()
    each = torch.cat([of_rank.each for of_rank in known])
    # ranks may have the same minibatches: their errors are not independent
    of_batches = sum(len(of_rank.each) * of_rank.of_batches for of_rank in known) / len(each)
    of_chains = float(each.var()) / len(each) if len(each) > 1 else math.nan
    return Slope(float(each.mean()), math.sqrt(of_chains + of_batches))


def _of_rank(chains: Chains, fine: set[int], most: int) -> _OfRank | None:
    """Of this rank's chains; None where that would cost too much."""
    rows = [k for k, number in enumerate(chains.numbers) if number in fine]
    if not rows or not chains.has_window:
        return None
    available = len(chains.window)
    most = min(most, MOST, available)
    if most < min(LEAST, available):
        return None
    with preserve_rng(chains.seed), chains.objective.active():
        table, shares = chains.slopes(most)
    table = -0.5 * chains.posterior.nbeta * table[rows]
    weights = shares / shares.sum()
    each = table @ weights
    count = len(weights)
    if count < 2:
        return _OfRank(each, 0.0)
    off = table.mean(dim=0) - each.mean()
    # of all the minibatches there are the mean has no error
    left = 1.0 - min(count / available, 1.0)
    return _OfRank(each, left * count / (count - 1) * float((weights * off).square().sum()))
