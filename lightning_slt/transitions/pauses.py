"""Where one stage ends and the next begins: a fall that pauses on its way."""

from __future__ import annotations

import math

import numpy as np

from lightning_slt.transitions.curve import Curve
from lightning_slt.transitions.evidence import Array

_REACHES = (1, 2, 3, 5, 8, 12, 18, 27, 40)  # points over which rates are read
_PAUSE = 5.0  # standard errors by which the rate between two falls lies below both
_SLOWER = 0.5  # of the rates before and after: below, a stretch between them is a pause


def pause(values: Array, sigma: float, steps: Array) -> int | None:
    """First point of the slowest stretch between two falls, None where they are one.

    There the rate is less than half of what it is before and after, beyond the scatter, both by point and by training
    step: points that lie closer together are no pause. Rates are those over one point to a third of all; no two of
    those compared overlap.
    """
    best, place = _PAUSE, None
    for reach in _REACHES:
        if 3 * reach > values.size - 1:
            break
        fall, points = values[:-reach] - values[reach:], np.full(values.size - reach, float(reach))
        span = np.maximum(steps[reach:] - steps[:-reach], 1e-150)
        missing = np.minimum(_missing(fall, points, reach), _missing(fall, span, reach))
        errors = missing / (2 * max(sigma, 1e-150))
        first = int(np.argmax(errors))
        if errors[first] > best:
            best, place = float(errors[first]), first + reach
    return place


def _missing(fall: Array, length: Array, reach: int) -> Array:
    """By how much each stretch falls less than at the slower of the fastest rates before and after; 0 above half."""
    rate = fall / length
    before, after = np.maximum.accumulate(rate), np.maximum.accumulate(rate[::-1])[::-1]
    slower = np.minimum(before[: -2 * reach], after[2 * reach :])
    middle = rate[reach:-reach]
    return np.where(middle < _SLOWER * slower, (slower - middle) * length[reach:-reach], 0.0)


def pauses(curve: Curve, first: float, last: float) -> list[int]:
    """Points at which the fall of the loss or the rise of the coefficient pauses between two places."""
    lo, hi = max(0, math.floor(first)), min(curve.fall.size, math.ceil(last) + 1)
    both = ((curve.fall, curve.fall_scatter), (-curve.llc, curve.llc_scatter))
    steps = curve.steps[lo:hi]
    found = [pause(values[lo:hi], float(np.max(scatter[lo:hi], initial=0.0)), steps) for values, scatter in both]
    return [lo + place for place in found if place is not None]


def goes_on(curve: Curve, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether a second change is the rest of a first one: no pause from the one to the other, in neither channel.

    A pause has to stand out of the scatter; so the stretch between them has to be seen to go on as well, at half the
    slower of their rates or more.

    Args:
        curve: the two channels.
        first: onset and end of the change that came first, in points.
        second: those of the other.
    """
    (start, end), (again, last) = first, second
    if any(_slows(values, start, end, again, last) for values in (curve.llc, curve.fall)):
        return False
    return not pauses(curve, start, last)


def _slows(values: Array, start: float, end: float, again: float, last: float) -> bool:
    """Whether values that change in the same direction twice hardly do so in between."""
    around = (values[max(0, round(place) - 1) : round(place) + 2] for place in (start, end, again, last))
    a, b, c, d = (float(np.median(part)) for part in around)
    if (b - a) * (d - c) <= 0 or again - end < 1:
        return False
    slower = min(abs(b - a) / max(end - start, 1.0), abs(d - c) / max(last - again, 1.0))
    return math.copysign(c - b, (c - b) * (b - a)) < _SLOWER * slower * (again - end)
