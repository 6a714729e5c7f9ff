"""Online: the likeliest step in the windows that end at the newest point, all sizes of them at once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from lightning_slt.transitions.curve import Curve, Step
from lightning_slt.transitions.evidence import (
    ROUNDING,
    SHAPE_ERROR,
    SIZES,
    Array,
    bank,
    evenly_spaced,
    smooth_in_steps,
)
from lightning_slt.transitions.rises import first_half, largest_between, rises
from lightning_slt.transitions.search import AGAINST, HIDDEN, LARGEST

_ALONE = 0.65  # of the evidence counts online where the coefficient speaks alone, since it is asked at every point
_JOINT = 0.92  # and where the loss agrees, which it seldom does by chance; docs/transitions.md has what both do


@dataclass(frozen=True)
class _Banks:
    """The banks of the first so many sizes, ramp after ramp; arrays ``[num_ramps]`` unless said otherwise."""

    rows: tuple[Array, ...]  # of each size, [rows, size]: ramps, ramps beside their neighbours, bases of smooth courses
    count: Array  # [num_sizes]: ramps of each
    which: Array  # number of its size
    ends: Array  # sum of its first and its last point
    own: Array  # its lag-one product with itself
    scales: Array
    centres: Array
    widths: Array
    means: Array
    seen: Array
    back: Array  # points from the newest one back to the onset, 0 where it is the newest
    half: Array  # points from the newest one back to the centre, 0 where it is the newest or lies beyond


@functools.cache
def _banks(num_sizes: int) -> _Banks:
    each = [bank(size, True) for size in SIZES[:num_sizes]]
    sizes = np.array(SIZES[:num_sizes])
    which = np.concatenate([np.full(len(b.ramps), i) for i, b in enumerate(each)])
    halves = [first_half(b) for b in each]
    rows = []
    for b in each:
        beside = np.zeros_like(b.ramps)
        beside[:, 1:] += b.ramps[:, :-1]
        beside[:, :-1] += b.ramps[:, 1:]
        rows.append(np.concatenate([b.ramps, beside, *b.smooth]))
    return _Banks(
        rows=tuple(rows),
        count=np.array([len(b.ramps) for b in each]),
        which=which,
        ends=np.concatenate([b.ramps[:, 0] + b.ramps[:, -1] for b in each]),
        own=np.concatenate([(b.ramps[:, 1:] * b.ramps[:, :-1]).sum(axis=1) for b in each]),
        scales=np.concatenate([b.scales for b in each]),
        centres=np.concatenate([b.centres for b in each]),
        widths=np.concatenate([b.widths for b in each]),
        means=np.concatenate([b.means for b in each]),
        seen=np.concatenate([b.seen for b in each]),
        back=sizes[which] - 1 - np.concatenate([onset for onset, _ in halves]),
        half=np.maximum(sizes[which] - 1 - np.concatenate([centre for _, centre in halves]), 0),
    )


@dataclass(frozen=True)
class _Windows:
    """The windows of all sizes that end at the newest point."""

    sizes: Array  # [num_sizes]
    steps: Array  # [reach], of the largest window
    llc: Array  # [reach]
    both: Array  # [reach, 3], above the newest point: the coefficient, the loss in proportion, the loss as given
    noise: Array  # [3], scatter of the newest point
    sums: Array  # [num_sizes, 3], of ``both``
    total: Array  # [num_sizes, 3], sum of squares about the mean
    largest: Array  # [num_sizes, 3], magnitude
    has_proportion: bool  # the losses are two

    @property
    def reach(self) -> int:
        return int(self.sizes[-1])


def _windows(curve: Curve, hi: int, num_sizes: int) -> _Windows:
    sizes = np.array(SIZES[:num_sizes])
    reach = int(sizes[-1])
    llc, fall, loss = (values[hi - reach : hi] for values in (curve.llc, curve.fall, curve.loss))
    both = np.stack([llc - llc[-1], fall - fall[-1], loss - loss[-1]], axis=1)
    # sums over each window, from sums from the newest point backwards
    sums = np.cumsum(both[::-1], axis=0)[sizes - 1]
    squares = np.cumsum(both[::-1] ** 2, axis=0)[sizes - 1]
    return _Windows(
        sizes=sizes,
        steps=curve.steps[hi - reach : hi],
        llc=llc,
        both=both,
        noise=np.array([curve.llc_scatter[hi - 1], curve.fall_scatter[hi - 1], curve.loss_scatter[hi - 1]]),
        sums=sums,
        total=np.maximum(squares - sums**2 / sizes[:, None], 0.0),
        largest=np.maximum.accumulate(np.abs(np.stack([llc, fall, loss], axis=1))[::-1], axis=0)[sizes - 1],
        has_proportion=curve.has_proportion,
    )


@dataclass(frozen=True)
class _Ramps:
    """What each ramp says of its window; arrays ``[num_ramps, 3]``, in the order of :attr:`_Windows.both`, unless said
    otherwise."""

    height: Array
    floor: Array  # least variance of a point
    misfit: Array  # variance of a point about the ramp
    evidence: Array  # above a smooth course
    contrast: Array  # [num_ramps], squared height of the coefficient's ramp in units of its noise
    rho: Array  # [num_ramps], autocorrelation of what the coefficient's ramp leaves


def _ramps(windows: _Windows, b: _Banks) -> _Ramps:
    coefficient, beside, smooth = _fitted(windows, b)
    left = np.maximum(windows.total - smooth, 0.0)
    rss = np.maximum(windows.total[b.which] - coefficient**2, 0.0)
    height = coefficient * b.scales[:, None]
    misfit = rss / (windows.sizes[b.which, None] - 4)
    # a constant curve has no scatter at all; what rounding leaves of it must not become evidence
    rounding = ROUNDING * windows.largest + 1e-150
    floor = np.maximum((SHAPE_ERROR * height) ** 2, np.maximum(windows.noise, rounding)[b.which] ** 2)
    evidence = (left[b.which] - rss) / np.maximum(floor, misfit)
    if windows.has_proportion:  # the loss as it was given is a second witness, by the best ramp of each window
        most = np.full(len(windows.sizes), -math.inf)
        np.maximum.at(most, b.which, np.where(height[:, 2] < 0, evidence[:, 2], -math.inf))
        evidence[:, 1] = np.where(most[b.which] > AGAINST, evidence[:, 1], -math.inf)
    rho = _autocorrelation(windows, b, coefficient[:, 0], beside, rss[:, 0])
    # what the ramp leaves may be far below the floor, of which its autocorrelation says nothing
    contrast = coefficient[:, 0] ** 2 / np.maximum(floor[:, 0], misfit[:, 0] * (1 + rho) / (1 - rho))
    return _Ramps(height, floor, misfit, evidence, contrast, rho)


def _fitted(windows: _Windows, b: _Banks) -> tuple[Array, Array, Array]:
    """The coefficients of all ramps ``[num_ramps, 3]``, those of the ramps beside their neighbours ``[num_ramps]``, and
    what the best smooth course explains ``[num_sizes, 3]``."""
    reach, both = windows.reach, windows.both
    coefficients, beside, smooth = [], [], np.empty((len(windows.sizes), 3))
    for i, rows in enumerate(b.rows):
        fitted, count = rows @ both[reach - windows.sizes[i] :], b.count[i]
        coefficients.append(fitted[:count])
        beside.append(fitted[count : 2 * count, 0])
        line, bend = np.moveaxis(fitted[2 * count :].reshape(-1, 2, 3), 1, 0)
        bend[:, 1:] = np.maximum(bend[:, 1:], 0.0)
        smooth[i] = (line**2 + bend**2).max(axis=0)
    uneven = not evenly_spaced(windows.steps)
    for i, size in enumerate(windows.sizes if uneven else ()):
        window = both[reach - size :].T
        courses = smooth_in_steps(
            window - window.mean(axis=1, keepdims=True),
            windows.steps[None, reach - size :],
            True,
            np.array([False, True, True]),
        )
        smooth[i] = np.maximum(smooth[i], courses)
    return np.concatenate(coefficients), np.concatenate(beside), smooth


def newest_step(curve: Curve, lo: int, hi: int, min_change: float) -> Step | None:
    """The step of the highest positive score in the windows ``lo <= start <= i < hi`` of all sizes that fit.

    Args:
        curve: the two channels.
        lo: first point.
        hi: one past the newest point.
        min_change: smallest height, in units of the coefficient.
    """
    num_sizes = int(np.searchsorted(SIZES, hi - lo, side="right"))
    if num_sizes == 0:
        return None
    b = _banks(num_sizes)
    windows = _windows(curve, hi, num_sizes)
    ramps = _ramps(windows, b)
    height, rho = ramps.height[:, 0], ramps.rho
    joint = _joint(windows, b, ramps, curve.persistence)
    # without a second witness the noise of the whole curve counts too: a window is too short to know it
    alone = np.maximum(rho, curve.persistence)
    alone = ramps.evidence[:, 0] * (1 - alone) / (1 + alone)
    score = np.maximum(_ALONE * alone, _JOINT * joint)
    # a rise that a fall before it hides is one from the lowest point
    risen = windows.llc[-1] + largest_between(-windows.llc, *_first_half(windows, b))
    change = np.where(~(height > 0) & (joint > alone), risen, height * b.seen)
    score[_out_of_a_saddle(windows, b, height) | (np.abs(change) < min_change)] = -math.inf
    place = int(np.argmax(score))
    if not score[place] > 0:
        return None
    centre, width = float(hi - windows.sizes[b.which[place]] + b.centres[place]), float(b.widths[place])
    error = b.scales[place] * float(windows.noise[0]) * math.sqrt((1 + rho[place]) / (1 - rho[place]))
    return Step(
        score=float(score[place]),
        onset=centre - width / 2,
        centre=centre,
        end=centre + width / 2,
        height=float(change[place]),
        height_se=float(error * b.seen[place]),
    )


def _first_half(windows: _Windows, b: _Banks) -> tuple[Array, Array]:
    """Of each ramp, the points of its onset and of its centre in the largest window."""
    return windows.reach - 1 - b.back, windows.reach - 1 - b.half


def _joint(windows: _Windows, b: _Banks, ramps: _Ramps, persistence: float) -> Array:
    """``[num_ramps]``, the evidence of both channels: a rise of the coefficient while the loss falls; else -inf."""
    # what came before may have fallen, up to the middle of the ramp: a rise since then counts as well
    since = largest_between(rises(windows.llc, float(windows.noise[0])), *_first_half(windows, b))
    since *= (1 - persistence) / (1 + persistence)
    contrast = np.maximum(np.where(ramps.height[:, 0] > 0, LARGEST * ramps.contrast, 0.0), HIDDEN * since)
    falling = ramps.height[:, 1] < 0
    return np.where((contrast > 0) & falling, np.minimum(contrast, ramps.evidence[:, 1]), -math.inf)


def _out_of_a_saddle(windows: _Windows, b: _Banks, height: Array) -> Array:
    """``[num_ramps]`` bool: the coefficient falls from a negative plateau, or to one while a saddle is being left."""
    sigma, loss_sigma, _ = windows.noise
    # the plateau before a falling step
    before = (windows.llc[-1] + windows.sums[:, 0] / windows.sizes)[b.which] - height * b.means
    # as its points have it too: where the step is large the ramp may miss the level by more than that level is
    start = (windows.reach - windows.sizes)[b.which]
    onset = np.maximum(start + 1, np.ceil(start + b.centres - b.widths / 2).astype(int))
    summed = np.concatenate([[0.0], np.cumsum(windows.llc)])
    seen_before = (summed[onset] - summed[start]) / (onset - start)
    # a loss that falls faster and faster while the coefficient turns negative: a saddle being left
    threes = np.convolve(windows.both[:, 1], np.ones(3) / 3, "valid")
    first = windows.reach - windows.sizes
    bend = threes[-1] - 2 * threes[first + windows.sizes // 2 - 1] + threes[first]
    leaving = (bend < -5 * loss_sigma)[b.which] & (before + height * b.seen < -3 * sigma)
    return ~(height > 0) & ((np.minimum(before, seen_before) < -3 * sigma) | leaving)


def _autocorrelation(windows: _Windows, b: _Banks, coefficient: Array, beside: Array, rss: Array) -> Array:
    """That of :func:`~lightning_slt.transitions.evidence.autocorrelation` for every ramp ``[num_ramps]``.

    Of the residual ``y - c r`` the lag-one product is ``sum y y' - c sum (r y' + r' y) + c^2 sum r r'``.
    """
    values, sizes, sums = windows.both[:, 0], windows.sizes, windows.sums[:, 0]
    newest, oldest = values[-1], values[values.size - sizes]
    products = np.concatenate([[0.0], np.cumsum((values[1:] * values[:-1])[::-1])])[sizes - 1]
    mean = sums / sizes
    products = products - mean * (2 * sums - oldest - newest) + (sizes - 1) * mean**2
    beside = beside + mean[b.which] * b.ends
    lagged = products[b.which] - coefficient * beside + coefficient**2 * b.own
    flat = rss <= 1e-18 * float(np.max(values * values))
    ratio = np.where(flat, -1.0, lagged / np.where(flat, 1.0, rss)) + 2.0 / sizes[b.which]
    return np.clip(np.where(flat, 0.0, ratio), 0.0, 0.9)
