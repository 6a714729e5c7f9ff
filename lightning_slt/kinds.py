"""Numbers, flags and functions among arguments: another kind is refused, with what to give instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np


def check_count(name: str, value: Any, least: int = 1, otherwise: str = "", optional: bool = True) -> None:
    """Refuse what is no whole number, and one that is too small.

    Args:
        optional: None is let through.
        otherwise: what else may be given, for the message.

    Raises:
        TypeError: for text, a float, a bool or anything else.
        ValueError: below ``least``.

    Example:
        >>> check_count("num_chains", "2")
        Traceback (most recent call last):
        TypeError: num_chains='2': expected a whole number, got str. Give an int.
    """
    if value is None and optional:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        kind = type(value).__name__
        raise TypeError(f"{name}={value!r}: expected a whole number, got {kind}. Give an int{otherwise}.")
    if int(value) < least:
        raise ValueError(f"{name}={value}: must be at least {least}{otherwise}.")


def check_number(
    name: str, value: Any, optional: bool = True, fits: Callable[[float], bool] = lambda number: True, remedy: str = ""
) -> None:
    """Refuse what is no number, and one that does not fit.

    Args:
        optional: None is let through.
        fits: whether a number is in range.
        remedy: what is said of one that is not.

    Raises:
        TypeError: for text, a bool or anything else that is none.
        ValueError: for a number that does not fit.

    Example:
        >>> check_number("nbeta", -1, fits=positive, remedy="must be positive.")
        Traceback (most recent call last):
        ValueError: nbeta=-1: must be positive.
    """
    if value is None and optional:
        return
    try:
        number = None if isinstance(value, (str, bytes, bool, np.bool_)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    except OverflowError:  # a whole number that is larger than any float
        number = math.inf
    if number is None:
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}. Give a float.")
    if not fits(number):
        raise ValueError(f"{name}={value}: {remedy}")


def positive(number: float) -> bool:
    """Whether it is, and finite."""
    return math.isfinite(number) and number > 0


def not_negative(number: float) -> bool:
    """Whether it is finite, and at least 0."""
    return math.isfinite(number) and number >= 0


def check_flag(name: str, value: Any, optional: bool = True) -> None:
    """Refuse what is neither True nor False, such as text, which is always true.

    Args:
        optional: None is let through.

    Raises:
        TypeError: naming what it is.
    """
    if value is None and optional:
        return
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r}: expected True or False, got {type(value).__name__}. Give a bool.")


def check_callable(name: str, value: Any, takes: str) -> None:
    """Refuse what cannot be called. None is let through.

    Args:
        takes: what it is called with.

    Raises:
        TypeError: naming what it is.
    """
    if value is not None and not callable(value):
        kind = type(value).__name__
        raise TypeError(f"{name}={value!r}: expected a callable of ({takes}), got {kind}. Give a function, or None.")


__all__ = ["check_callable", "check_count", "check_flag", "check_number", "not_negative", "positive"]
