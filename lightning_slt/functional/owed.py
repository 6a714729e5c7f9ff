"""What a learning coefficient lacks of directions that chains have not reached yet, by the virial ratio."""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor

from lightning_slt.functional.learning_coefficient import changes_of

LEAST_SHARE = 0.1
"""What singular models owe at the least, as a share of what regular ones would: means over seeds of deep linear
networks of four and five layers lacked 0.08, 0.14 and 0.3 of it, 0.9 to 1.8 % of the LLC."""


def owed_by(llc: float, virial: float, error: float, d: int, steepness: float = 1.0, gain: float = math.inf) -> float:
    r"""What directions that have not reached their width may still add to a learning coefficient, in its units, or
    what those that are beyond it have in it too much.

    On a regular model direction i, at the share f_i of its variance, is ``s_i f_i / 2`` of the LLC and ``f_i / d`` of
    the virial ratio V, with ``s_i = n beta h_i / (n beta h_i + gamma)`` in [0, 1]. The LLC lacks
    ``sum_i s_i (1 - f_i) / 2``, which is at most ``d (1 - V) / 2``; and since those that are slow have the smallest
    s_i, at most the share of itself that V lacks of 1. On singular models the directions that come last are nearly
    free, and the LLC lacks little (deep linear networks at V = 0.76 to 0.97 had 0 to 4 % less): how far a potential is
    from a square, its steepness S says,

    .. math:: \max(2 S - 1, 0.1) \; \min\left( \frac{LLC}{V} - LLC, \; \frac{d}{2} (1 - V) \right)

    where the least share is :data:`LEAST_SHARE`.

    On kinks, which rise more slowly than a square (S above 1), direction i is up to ``f_i`` of the LLC: the second of
    the two is then S times as large, and the factor before them 1.

    Nor does the LLC lack more than what it has changed by of late for each unit of V (:func:`gain_of`), times what V
    lacks: directions that come later still have smaller s_i. The smaller of the two is owed.

    Above 1 the ratio is of chains that are too warm (a thermostat that has not settled: in all directions alike) or
    come down from further out (the directions of the smallest s_i last): what the LLC has too much is then at most
    the smaller of ``LLC - LLC / V`` and ``d (V - 1) / 2``.

    V is taken at the end of its error that is nearer to 1: what it lacks by chance, the LLC of the same draws lacks by
    chance as well, and that is in the Monte-Carlo error.

    Args:
        llc: as the draws have it.
        virial: the ratio of the same draws.
        error: its standard error; NaN where it is not known.
        d: weights that move.
        steepness: of the potential, see :func:`~lightning_slt.sampling.readings.steepness_of`; 1 for a square.
        gain: :func:`gain_of` the same draws; infinity where it is not known.

    Returns:
        0 where the ratio is 1 within its error, where that is not known, and for an LLC that is not positive.

    Example:
        >>> [round(owed_by(4.0, virial, 0.05, 10), 3) for virial in (0.97, 0.85, 0.05)]
        [0.0, 0.444, 4.5]
        >>> [round(owed_by(4.0, 0.85, 0.05, 10, steepness=steepness), 3) for steepness in (0.75, 0.4)]
        [0.222, 0.044]
        >>> round(owed_by(4.0, 0.85, 0.05, 10, gain=2.0), 3)
        0.2
        >>> [round(owed_by(4.0, virial, 0.05, 10), 3) for virial in (1.03, 1.15, 1.3)]
        [0.0, 0.364, 0.8]
    """
    if not llc > 0:
        return 0.0
    reached, beyond = virial + error, virial - error
    whole = 0.5 * d * max(steepness, 1.0)
    if reached < 1.0:
        lacking = whole * (1.0 - reached)
        share = min(max(2.0 * steepness - 1.0, LEAST_SHARE), 1.0)
        bound = share * (min(llc / reached - llc, lacking) if reached > 0 else lacking)
        return min(bound, gain * (1.0 - reached))
    return min(llc - llc / beyond, whole * (beyond - 1.0)) if beyond > 1.0 else 0.0


def gain_of(llc: Tensor, virial: Tensor) -> float:
    r"""What the LLC has changed by, at the most, for each unit that the virial ratio has grown by, from the first half
    of the draws to the second: the end of the 95 % interval of r that is further from 0, with

    .. math:: r = \frac{\sum_c (\lambda_{c,2} - \lambda_{c,1})}{\sum_c (V_{c,2} - V_{c,1})}

    over chains c. The interval is that of a ratio of two means (Fieller 1954, *Some problems in interval estimation*,
    JRSS B 16:175), which has an end only where V has grown beyond its own.

    On a regular model at its minimum direction i, of precision A_i, lacks a share ``u_i exp(-2 A_i t)`` of its variance
    at time t, and ``s_i / 2`` times that in the LLC and ``1 / d`` times in V. The slower it is, the more of what is
    lacking on average it has beside what was gained meanwhile, ``coth(A_i T) / 2`` for halves of length T: and the
    smaller is its s_i. So the mean of s_i over what lacks is at most the one over what was gained (Chebyshev's sum
    inequality); and r times what V lacks is at least what the LLC lacks. No ``u_i`` may be below zero: that is so of
    chains from ``w*``, and not of those that began wider than the posterior in some direction. Nor does it hold where a
    preconditioner makes flat directions the faster ones, or momenta let widths swing.

    Networks that are fitted to few samples are where that tells most. Nearly all of their weights are free, and come
    slowly, while the LLC has long been where it stays. It may also fall while V grows (the chains leave a narrow
    valley first, and find room for themselves later): what it has too much then goes by the same reckoning.

    Args:
        llc: ``[chains, draws]``.
        virial: ``[chains, readings]`` of the same steps.

    Returns:
        Infinity for a single chain, and where V has not grown beyond the 95 % interval of its growth.

    Example:
        >>> import torch
        >>> virial = torch.tensor([[0.50, 0.60, 0.80, 0.90], [0.50, 0.62, 0.80, 0.92], [0.51, 0.60, 0.80, 0.91]])
        >>> round(gain_of(6.0 + 2.0 * virial, virial), 4)
        2.0
    """
    chains = len(llc)
    if chains < 2 or llc.shape[1] < 2 or virial.shape[1] < 2:
        return math.inf
    changes = torch.stack([changes_of(table.double()) for table in (llc, virial)])
    change, growth = changes.mean(dim=1).tolist()
    # all r with (change - r growth)² <= t² Var(change - r growth), between the roots of a r² - 2 b r + c
    spread = torch.cov(changes) / chains * float(stats.t.ppf(0.975, chains - 1)) ** 2
    a = growth**2 - float(spread[1, 1])
    b, c = change * growth - float(spread[0, 1]), change**2 - float(spread[0, 0])
    if not (growth > 0 and a > 0):
        return math.inf
    return (abs(b) + math.sqrt(max(b * b - a * c, 0.0))) / a
