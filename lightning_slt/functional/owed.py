"""What a learning coefficient lacks of directions that chains have not reached yet, by the virial ratio."""

from __future__ import annotations

LEAST_SHARE = 0.1
"""What singular models owe at the least, as a share of what regular ones would: means over seeds of deep linear
networks of four and five layers lacked 0.08, 0.14 and 0.3 of it, 0.9 to 1.8 % of the LLC."""


def owed_by(llc: float, virial: float, error: float, d: int, steepness: float = 1.0) -> float:
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

    Returns:
        0 where the ratio is 1 within its error, where that is not known, and for an LLC that is not positive.

    Example:
        >>> [round(owed_by(4.0, virial, 0.05, 10), 3) for virial in (0.97, 0.85, 0.05)]
        [0.0, 0.444, 4.5]
        >>> [round(owed_by(4.0, 0.85, 0.05, 10, steepness=steepness), 3) for steepness in (0.75, 0.4)]
        [0.222, 0.044]
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
        return share * (min(llc / reached - llc, lacking) if reached > 0 else lacking)
    return min(llc - llc / beyond, whole * (beyond - 1.0)) if beyond > 1.0 else 0.0
