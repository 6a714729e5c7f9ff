"""How much better does a step between two plateaus explain a stretch of a curve than a smooth course does?

In a window of W neighbouring points, by point index x, two descriptions of the curve compete:

- plateau, ramp, plateau: ``y = a + b * sigmoid((x - c) / s)``, over a bank of centres c and widths (10 % to 90 %,
  ``w = 4.39 s``);
- smooth: the best of a straight line, a parabola, and decays ``a + b exp(-x / tau)`` from either end.

Each is a least-squares fit, and every fit here is linear with a fixed basis, so one matrix product reads them all off.
With RSS_0 the residual sum of squares of the best smooth course and RSS_1 that of the best ramp,

    evidence = (RSS_0 - RSS_1) / max(sigma^2, RSS_1 / (W - 4)) * (1 - rho) / (1 + rho)

where sigma is the scatter from point to point and rho the lag-one autocorrelation of the residuals, positive part. That
is twice a log-likelihood ratio, deflated for autocorrelation (the effective number of points, W (1 - rho) / (1 + rho)).
The residual term in the denominator keeps a wrong sigma, or a curve that neither describes, from counting as evidence.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

MIN_POINTS = 8
"""Points that there must be for a transition to be looked for."""
SIZES = (MIN_POINTS, 10, 12, 14, 16, 19, 22, 27, 32, 38, 45, 54, 64, 76, 90, 108, 128, 152, 180, 215, 256)
_WIDTHS = (1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90)
_MARGIN = 2  # points that a plateau has at the least outside the 10 % to 90 % stretch
_LOGISTIC = 2 * math.log(9)  # the 10 % to 90 % width of a logistic of scale one
_RATES = (2.0, 4.0, 8.0, 16.0)  # of the decays, in a window's length
_FASTER = (32.0, 64.0, 128.0)  # the same, in windows that have two points and more in that time
_SEEN = 0.25  # share of an unfinished ramp that lies in the window, and at least _SEEN_POINTS
_SEEN_POINTS = 3
ROUNDING = 1e-10  # of a value: less than that is no difference
REACH = 3.5  # in units of the scatter, from the points around: beyond it a point is a spike
SHAPE_ERROR = 0.03  # share of a change by which a real step departs from a logistic one


@dataclass(frozen=True)
class Bank:
    """Unit vectors, orthogonal to constants, for one window size: ramps, and the bases of the smooth courses."""

    size: int
    ramps: Array  # [num_ramps, size]
    scales: Array  # [num_ramps]: fitted coefficient times this = height of the step
    centres: Array  # [num_ramps], in points from the left edge of the window
    widths: Array  # [num_ramps]
    means: Array  # [num_ramps]: share of the step that the mean of the window holds
    seen: Array  # [num_ramps]: share of the step that the newest point holds; 1 for finished ramps
    smooth: tuple[Array, ...]  # each [rank, size], orthonormal


def rates_of(size: int) -> tuple[float, ...]:
    """Rates of the decays among the smooth courses of a window, in its length.

    A run may be long beside the rise that it begins with, which looks like a step where no decay is as fast.

    Example:
        >>> rates_of(16), rates_of(100)
        ((2.0, 4.0, 8.0, 16.0), (2.0, 4.0, 8.0, 16.0, 32.0))
    """
    return (*_RATES, *(rate for rate in _FASTER if size >= 2 * rate))


@functools.cache
def bank(size: int, unfinished: bool = False) -> Bank:
    """The fits of one window size; computed once.

    With ``unfinished``, ramps of which only the beginning lies in the window are among them, and the smooth courses
    that speed up towards the newest point are not: that is what a ramp looks like while it goes on. The parabola bends
    either way; :mod:`lightning_slt.transitions.newest` drops its bend for a loss that speeds up.
    """
    x = np.arange(size, dtype=np.float64)
    stride = max(1.0, size / 32)
    ramps, scales, centres, widths, means, seen = [], [], [], [], [], []
    for width in _WIDTHS:
        # a plateau on the left as long as a quarter of the ramp: without it an onset cannot be told from the middle
        left = max(_MARGIN + 1, width / 4)
        first, last = left + width / 2 - 0.5, size - 1 - _MARGIN - width / 2 + 0.5
        if unfinished:
            last = max(last, size - 1 + 0.5 * width - max(_SEEN * width, _SEEN_POINTS))
        if width > size / 2 or first > last:
            continue
        for centre in np.arange(first, last + 1e-9, stride):
            ramp = 1.0 / (1.0 + np.exp(-np.clip((x - centre) * _LOGISTIC / width, -40, 40)))
            means.append(float(ramp.mean()))
            seen.append(float(ramp[-1]) if unfinished else 1.0)
            ramp -= ramp.mean()
            norm = float(np.linalg.norm(ramp))
            ramps.append(ramp / norm)
            scales.append(1.0 / norm)
            centres.append(centre)
            widths.append(width)
    unit = x / (size - 1)
    courses = [np.stack([unit, unit**2])]
    for rate in rates_of(size):
        courses.append(np.stack([unit, np.exp(-rate * unit)]))
        if not unfinished:
            courses.append(np.stack([unit, np.exp(-rate * (1 - unit))]))
    smooth = []
    for course in courses:
        centred = course - course.mean(axis=1, keepdims=True)
        basis = np.linalg.qr(centred.T)[0].T
        # a positive bend is that of a fall that slows down
        basis[1] *= np.sign(basis[1, 0] + basis[1, -1] - 2 * basis[1, size // 2])
        smooth.append(basis)
    return Bank(
        size=size,
        ramps=np.stack(ramps),
        scales=np.array(scales),
        centres=np.array(centres),
        widths=np.array(widths),
        means=np.array(means),
        seen=np.array(seen),
        smooth=tuple(smooth),
    )


@dataclass(frozen=True)
class Fits:
    """Every ramp in every window: arrays ``[num_windows, num_ramps]``; nothing is deflated for autocorrelation yet."""

    evidence: Array  # ramp against the best smooth course
    contrast: Array  # ramp against no change at all
    height: Array  # the fitted step, in the units of the curve
    floor: Array  # variance that the scatter and the shape of real steps stand for
    misfit: Array  # variance of what the ramp leaves


def evenly_spaced(steps: Array) -> bool:
    """Whether courses that are smooth in steps are those that are smooth by point."""
    return bool(np.ptp(np.diff(steps)) == 0) if steps.size > 1 else True


def smooth_in_steps(windows: Array, steps: Array, unfinished: bool = False, slowing: Array | None = None) -> Array:
    """Sum of squares ``[num_windows]`` that the best smooth course in training steps explains of each window.

    A course that is smooth in steps looks like a ramp by point where the points are unevenly spaced, evenly in the
    logarithm of the step above all. The courses are those of :func:`bank`, with the step in place of the index.

    Args:
        windows: ``[num_windows, size]``.
        steps: ``[num_windows, size]``, not decreasing.
        unfinished: leaves out courses that speed up towards the newest point.
        slowing: ``[num_windows]`` bool, where a bend counts only if it is that of a fall that slows down.
    """
    span = steps[:, -1:] - steps[:, :1]
    unit = (steps - steps[:, :1]) / np.where(span > 0, span, 1.0)
    rates = np.array(rates_of(windows.shape[1]))[:, None, None]
    bends = [unit[None] ** 2, np.exp(-rates * unit)]
    if not unfinished:
        bends.append(np.exp(-rates * (1 - unit)))
    bend = np.concatenate(bends)
    bend -= bend.mean(axis=2, keepdims=True)
    line = unit - unit.mean(axis=1, keepdims=True)
    line /= np.maximum(np.linalg.norm(line, axis=1, keepdims=True), 1e-150)
    bend -= (bend * line).sum(axis=2, keepdims=True) * line
    # a bend that the line explains but for rounding is none
    length = np.maximum(np.linalg.norm(bend, axis=2), 1e-6)
    by_bend = (bend * windows).sum(axis=2) / length
    if slowing is not None:
        by_bend = np.where(slowing, np.maximum(by_bend, 0.0), by_bend)
    by_bend = by_bend**2
    return (line * windows).sum(axis=1) ** 2 + by_bend.max(axis=0)


def fits(windows: Array, sigma: Array, b: Bank, steps: Array | None = None) -> Fits:
    """Fits the whole bank to windows ``[num_windows, size]`` with point scatter ``sigma [num_windows]``.

    With ``steps [num_windows, size]`` the courses that are smooth in steps compete as well.
    """
    size = b.size
    centred = windows - windows.mean(axis=1, keepdims=True)
    total = (centred**2).sum(axis=1, keepdims=True)
    coefficient = centred @ b.ramps.T
    rss = np.maximum(total - coefficient**2, 0.0)
    smooth = np.max([((centred @ q.T) ** 2).sum(axis=1) for q in b.smooth], axis=0)
    if steps is not None:
        smooth = np.maximum(smooth, smooth_in_steps(centred, steps))
    smooth = smooth[:, None]
    height = coefficient * b.scales
    floor = np.maximum(sigma[:, None] ** 2, (SHAPE_ERROR * height) ** 2)
    # a constant curve has no scatter at all; what rounding leaves of it must not become evidence
    rounding = ROUNDING * np.abs(windows).max(axis=1, keepdims=True) + 1e-150
    floor, misfit = np.maximum(floor, rounding**2), rss / (size - 4)
    variance = np.maximum(floor, misfit)
    return Fits(
        (np.maximum(total - smooth, 0.0) - rss) / variance, coefficient**2 / variance, height, floor, misfit
    )  # fmt: skip


def autocorrelation(window: Array, b: Bank, ramp: int) -> float:
    """Lag-one autocorrelation, positive part, of what a ramp leaves in a window; small-sample bias corrected."""
    centred = window - window.mean()
    left = centred - (centred @ b.ramps[ramp]) * b.ramps[ramp]
    power = float(left @ left)
    if power == 0.0:
        return 0.0
    return float(np.clip(left[1:] @ left[:-1] / power + 2.0 / b.size, 0.0, 0.9))


def persistence(values: Array) -> float:
    """Autocorrelation phi of the noise around a curve of any shape, positive part, allowing for its own error.

    Of an AR(1) noise, differences over three points have ``1 + phi + phi^2`` times the variance of those over one. Both
    are read from medians, so the few points of a step do not count; ``2 / sqrt(n)`` is taken off for chance.
    """
    n = values.size
    if n < 12:
        return 0.0
    short, long = (values[lag:] - values[:-lag] for lag in (1, 3))
    one, three = (float(np.median(np.abs(d - np.median(d)))) for d in (short, long))
    if one == 0.0:
        return 0.0
    ratio = (three / one) ** 2
    if ratio > 4.0:  # no AR(1) noise reaches 3: this is the course of a curve that has hardly any noise
        return 0.0
    phi = 0.5 * (math.sqrt(max(4.0 * ratio - 3.0, 1.0)) - 1.0)
    return float(np.clip(phi - 2.0 / math.sqrt(n), 0.0, 0.9))


def scatter(values: Array) -> float:
    """Robust scatter from point to point: 1.4826 median |second difference| / sqrt(6); a trend does not count."""
    if values.size < 4:
        return math.inf
    return float(1.4826 * np.median(np.abs(np.diff(values, 2))) / math.sqrt(6.0))


def without_spikes(values: Array, sigma: float, reach: float = REACH) -> Array:
    """Values further than ``reach`` sigma from the median of the five around them, brought to that distance.

    A single point never makes a step: at the newest edge the median is of the last five, so a step of one point's width
    is held back until three points stand on its far side.
    """
    if values.size < 5 or not math.isfinite(sigma):
        return values
    padded = np.concatenate([values[:2], values, values[-2:]])
    around = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)
    around[:2], around[-2:] = np.median(values[:5]), np.median(values[-5:])
    return np.clip(values, around - reach * sigma, around + reach * sigma)
