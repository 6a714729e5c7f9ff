"""What of a variance lies between chains, and what chains of finite length lack within themselves for it."""

from __future__ import annotations

import math

from torch import Tensor

MIXED = 0.5
"""Between-chain share of the variance above which chains have not seen the same posterior."""


def between_share(x: Tensor) -> float:
    """Share of the variance that lies between the chains' means, averaged over the losses.

    Args:
        x: ``[num_chains, num_draws, n]``.

    Returns:
        In [0, 1]; NaN with fewer than two chains or draws.
    """
    chains, draws = x.shape[:2]
    if chains < 2 or draws < 2:
        return math.nan
    within = x.double().var(dim=1).mean(dim=0)
    between = x.double().mean(dim=1).var(dim=0)
    total = within + between
    moved = total > 0
    return float((between[moved] / total[moved]).mean()) if bool(moved.any()) else math.nan


def whole_of(share: float, draws: int) -> float:
    """What a variance within chains is to be multiplied by to be the whole one, ``(n - 1) / n + s / (1 - s)``.

    The variance is ``(n - 1) / n W + B``, W the (unbiased) variance within chains and B that of their means, of which
    ``s = B / (W + B)``: 1 for n independent draws of each chain, where s is ``1 / (n + 1)`` on average.

    Args:
        share: s, below 1.
        draws: n, of each chain.

    Example:
        >>> [round(whole_of(1 / 4, 3), 6), round(whole_of(0.2, 20), 6)]
        [1.0, 1.2]
    """
    return (draws - 1) / draws + share / (1.0 - share)


def factor_of(share: float, draws: int) -> float:
    """:func:`whole_of` for chains that sample the same posterior; 1 for one chain, and where they do not.

    What lies between chains that have not mixed (:data:`MIXED`) is no measure of what each of them lacks.

    Args:
        share: s, see :func:`between_share`; NaN for one chain.
        draws: n, of each chain.

    Example:
        >>> [round(factor_of(share, 20), 6) for share in (0.2, 0.6, math.nan)]
        [1.2, 1.0, 1.0]
    """
    return whole_of(share, draws) if share <= MIXED else 1.0
