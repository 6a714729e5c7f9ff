r"""How far the weights under study are from a minimum, in units of the LLC.

The LLC is that of a minimum. Weights that an optimiser holds beside one, by weight decay, by the noise of a large
learning rate, or since it is still on its way, have a slope, chains go down it, and the loss that they gain by that is
missing in the estimate. For a quadratic loss ``L(w*) + g.u + u.H u / 2``, u = w - w*, chains stand at ``nbeta H E[u] =
-nbeta g`` in the mean where localisation is weak, so that

.. math:: n\beta\, E[L(w) - L(w^*)] = \tfrac12 n\beta\, \mathrm{tr}(H\, \mathrm{Cov}(w))
          + \tfrac12 n\beta\, g \cdot E[w - w^*]

The first term is what the estimate is at the minimum, the second one, with its sign turned, is the slope here. With a
stronger pull ``gamma/2 |E[u]|²`` more is missing. It is zero at a minimum, whatever the loss is like there, and so are
its readings: where ``g`` is zero they have no noise. Of chains that have not come down yet it is a part of what it will
be.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.rng import preserve_rng

log = logging.getLogger(__name__)

SHARE = 0.05
"""Minibatches that are asked, as a share of the steps of one chain."""
MOST = 32
"""Of them at the most."""
LEAST = 4
"""At the least, where there are as many; with fewer their noise may be all there is."""


class Slope(NamedTuple):
    """In LLC units; NaN where it was not measured.

    Attributes:
        mean: what the LLC lacks.
        se: its error: how the chains differ, and the minibatches.
    """

    mean: float = math.nan
    se: float = math.nan


class _Readings(NamedTuple):
    """What a rank has seen.

    Attributes:
        rows: by chain, ``-nbeta/2 grad L_B(w*) . (w - w*)`` on each of some minibatches.
        shares: what each of these weighs, ``[batches]``; together 1.
        available: how many there are of which these are some.
        owner: whose they are: the first rank's, where all have the same.
    """

    rows: dict[int, Tensor]
    shares: Tensor
    available: float
    owner: int


def slope_of(chains: Chains, drawn: Drawn, good: Tensor) -> Slope:
    """What the estimate lacks for the slope of the loss at ``w*``, from where the chains have ended.

    To be called on all ranks at once. It costs a gradient at ``w*`` for each of a few minibatches: of short draws, and
    of data that passes by and would have to be read for it, nothing is known. It is the same to the last bit on however
    many ranks the chains are.

    Args:
        chains: where the draws have ended.
        drawn: the draws.
        good: ``[chains]`` bool, which of them count.
    """
    fine = {number for number, is_good in zip(drawn.segment.chains, good.tolist(), strict=True) if is_good}
    most = min(int(SHARE * drawn.segment.steps), MOST)
    told = chains.collective.exchange(lambda: _of_rank(chains, fine, most))
    tables = _by_owner([readings for readings in told if readings is not None])
    if not tables:
        return Slope()
    each = torch.cat([(rows * shares).sum(dim=1) for rows, shares, _ in tables])
    of_batches = sum((len(table[0]) / len(each)) ** 2 * _error_of_batches(*table) for table in tables)
    of_chains = float(each.var()) / len(each) if len(each) > 1 else math.nan
    return Slope(float(each.mean()), math.sqrt(of_chains + of_batches))


def _of_rank(chains: Chains, fine: set[int], most: int) -> _Readings | None:
    """Of this rank's chains; None where they have none, or their minibatches are not at hand or too many."""
    rows = [k for k, number in enumerate(chains.numbers) if number in fine]
    # a window that passes by has moved the chains itself, and its own gradient is not that of all the data
    if not rows or not chains.source.resident:
        return None
    available, draws = len(chains.window), chains.objective.draws
    if most < min(LEAST, available) or (draws and available == 1):
        return None
    with preserve_rng(chains.seed), chains.objective.active():
        try:
            table, shares = chains.slopes(most)
        except Exception as error:
            # of a minibatch that no chain has met; shards are in step, and fail together
            if chains.layout.sharded:
                raise
            log.debug(f"the slope of the loss is not known: {type(error).__name__}: {error}")
            return None
    if not len(shares):
        return None
    table = -0.5 * chains.posterior.nbeta * table
    owner = 0 if chains.source.shared else chains.collective.rank
    # of steps that draw random numbers these are some of many, however many minibatches there are
    population = math.inf if draws else available
    return _Readings({chains.numbers[k]: table[k] for k in rows}, shares, population, owner)


def _by_owner(told: list[_Readings]) -> list[tuple[Tensor, Tensor, float]]:
    """``[chains, batches]`` in order of the chains, the shares of the batches, and how many there were; one for each of
    those who have minibatches of their own."""
    tables = []
    for owner in dict.fromkeys(readings.owner for readings in told):
        own = [readings for readings in told if readings.owner == owner]
        rows = {number: row for readings in own for number, row in readings.rows.items()}
        tables.append((torch.stack([rows[number] for number in sorted(rows)]), own[0].shares, own[0].available))
    return tables


def _error_of_batches(rows: Tensor, shares: Tensor, available: float) -> float:
    """Squared error of the mean for which of the minibatches these are; 0 of all there are."""
    count = len(shares)
    if count < 2:
        return 0.0
    means = rows.mean(dim=0)
    off = means - (means * shares).sum()
    return (1.0 - count / available) * count / (count - 1) * float((shares * off).square().sum())
