"""The local posterior that every chain samples."""

from __future__ import annotations

import math
from dataclasses import dataclass


def default_nbeta(num_samples: int) -> float:
    """Watanabe's WBIC temperature times n: ``nbeta = n / log n`` (Watanabe 2013, JMLR 14:867).

    Args:
        num_samples: n, the number of training samples; at least 2.

    Raises:
        ValueError: for fewer than two samples, where ``log n`` is not positive.

    Example:
        >>> round(default_nbeta(1000), 2)
        144.76
    """
    if num_samples < 2:
        raise ValueError(
            f"num_samples={num_samples}: nbeta = n / log n needs at least 2 samples. Give more data, or set nbeta."
        )
    return num_samples / math.log(num_samples)


@dataclass(frozen=True)
class LocalPosterior:
    """``p(w | w*) ∝ exp(-nbeta L_n(w) - localization/2 |w - w*|²)`` (Lau et al. 2023, arXiv 2308.12108, eq. 7).

    Args:
        nbeta: inverse temperature times the number of samples; positive.
        localization: gamma, the strength of the pull to ``w*``; not negative.

    Raises:
        ValueError: where an argument is out of its range.
    """

    nbeta: float
    localization: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.nbeta) and self.nbeta > 0):
            raise ValueError(f"nbeta={self.nbeta}: must be positive and finite; leave it None for n / log n.")
        if not (math.isfinite(self.localization) and self.localization >= 0):
            raise ValueError(f"localization={self.localization}: must be finite and not negative.")
