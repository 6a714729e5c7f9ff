"""The detectors' settings, in the units of the person who reads the flags."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np

from lightning_slt.kinds import check_number

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
    if isinstance(false_alarms, bool) or not (
        isinstance(false_alarms, Real) and math.isfinite(false_alarms) and false_alarms > 0
    ):
        raise ValueError(f"false_alarms: expected a rate above 0 per 100 points, got {false_alarms!r}; 0.05 is usual.")
    return max(6.0, _BASE_THRESHOLD - 2.0 * math.log(false_alarms / _BASE_RATE))


def checked_min_change(min_change: float) -> float:
    """``min_change`` if it is a height.

    Raises:
        ValueError: negative or not finite.
    """
    if isinstance(min_change, bool) or not (
        isinstance(min_change, Real) and math.isfinite(min_change) and min_change >= 0
    ):
        raise ValueError(
            f"min_change: expected a height of the LLC, at least 0, got {min_change!r}; 0.0 flags any height."
        )
    return float(min_change)


def checked_point(step: float, llc: float, llc_se: float, loss: float, valid: bool) -> None:
    """Refuse a point of a curve that is none; its values may be NaN.

    Raises:
        TypeError: for a value that is no number, and for a ``valid`` that is neither True nor False (or 1 nor 0).
    """
    for name, value in (("step", step), ("llc", llc), ("llc_se", llc_se), ("loss", loss)):
        check_number(name, value, optional=False)
    if not isinstance(valid, (bool, np.bool_, Real)) or valid not in (0, 1):
        raise TypeError(f"valid={valid!r}: expected True or False, got {type(valid).__name__}. Give a bool.")


def numbers_of(name: str, values: Any) -> np.ndarray:
    """``[n]`` numbers of a curve.

    Raises:
        TypeError: for what is no array of numbers.

    Example:
        >>> numbers_of("llc", ["a"])
        Traceback (most recent call last):
        TypeError: llc: expected an array of numbers, got list: could not convert string to float: 'a'.
    """
    try:
        return np.asarray(values, dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array of numbers, got {type(values).__name__}: {error}.") from error


def checked_boundaries(boundaries: Any) -> list[float]:
    """``boundaries`` if they are steps.

    Raises:
        ValueError: a single step, text, None, or a step that is not finite.

    Example:
        >>> checked_boundaries((20, 35.0))
        [20.0, 35.0]
    """
    remedy = "expected a list of training steps, [] for none"
    if isinstance(boundaries, Real):
        raise ValueError(f"boundaries: {remedy}, got {boundaries!r}; give [{boundaries!r}].")
    if isinstance(boundaries, str) or not isinstance(boundaries, Iterable):
        raise ValueError(f"boundaries: {remedy}, got {boundaries!r}.")
    steps = list(boundaries)
    for step in steps:
        if isinstance(step, str) or not hasattr(step, "__float__") or not math.isfinite(step):
            raise ValueError(f"boundaries: {remedy}, got {step!r} in it.")
    return [float(step) for step in steps]
