"""The detectors' settings, in the units of the person who reads the flags."""

from __future__ import annotations

import math

_BASE_THRESHOLD = 12.0  # evidence at the base rate below
_BASE_RATE = 0.05  # false alarms in 100 points, on curves without a step; docs/transitions.md has the measurement


def threshold_of(false_alarms: float) -> float:
    """Evidence that keeps false alarms at a rate per 100 points: ``12 - 2 ln(false_alarms / 0.05)``, at least 6.

    Evidence is twice a log-likelihood ratio, so its tail falls as ``exp(-evidence / 2)``.

    Raises:
        ValueError: not a positive finite number.

    Example:
        >>> threshold_of(0.05), round(threshold_of(0.5), 1)
        (12.0, 7.4)
    """
    if not (math.isfinite(false_alarms) and false_alarms > 0):
        raise ValueError(f"false_alarms: expected a rate above 0 per 100 points, got {false_alarms!r}; 0.05 is usual.")
    return max(6.0, _BASE_THRESHOLD - 2.0 * math.log(false_alarms / _BASE_RATE))


def checked_min_change(min_change: float) -> float:
    """``min_change`` if it is a height.

    Raises:
        ValueError: negative or not finite.
    """
    if not (math.isfinite(min_change) and min_change >= 0):
        raise ValueError(f"min_change: expected a height of the LLC, at least 0, got {min_change!r}.")
    return float(min_change)
