"""Online: the likeliest step in the windows that end at the newest point, all sizes of them at once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from lightning_slt.transitions.curve import Curve, Step
from lightning_slt.transitions.evidence import SHAPE_ERROR, SIZES, Array, bank, evenly_spaced, smooth_in_steps
from lightning_slt.transitions.rises import first_half, largest_between, rises
from lightning_slt.transitions.search import HIDDEN, LARGEST

_REPEATED = 0.85  # of the evidence counts online, where the search is repeated at every point; docs/transitions.md


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
    sizes = np.array(SIZES[:num_sizes])
    reach = int(sizes[-1])
    llc, loss = curve.llc[hi - reach : hi], curve.loss[hi - reach : hi]
    sigma, loss_sigma = float(curve.llc_scatter[hi - 1]), float(curve.loss_scatter[hi - 1])
    both = np.stack([llc - llc[-1], loss - loss[-1]], axis=1)
    # sums over each window, from sums from the newest point backwards
    sums = np.cumsum(both[::-1], axis=0)[sizes - 1]
    squares = np.cumsum(both[::-1] ** 2, axis=0)[sizes - 1]
    total = np.maximum(squares - sums**2 / sizes[:, None], 0.0)
    largest = np.maximum.accumulate(np.abs(np.stack([llc, loss], axis=1))[::-1], axis=0)[sizes - 1]
    coefficients, beside, smooth = [], [], np.empty((num_sizes, 2))
    for i, rows in enumerate(b.rows):
        fitted, count = rows @ both[reach - sizes[i] :], b.count[i]
        coefficients.append(fitted[:count])
        beside.append(fitted[count : 2 * count, 0])
        line, bend = np.moveaxis(fitted[2 * count :].reshape(-1, 2, 2), 1, 0)
        bend[:, 1] = np.maximum(bend[:, 1], 0.0)
        smooth[i] = (line**2 + bend**2).max(axis=0)
    uneven = not evenly_spaced(curve.steps[hi - reach : hi])
    for i, size in enumerate(sizes if uneven else ()):
        window = both[reach - size :].T
        courses = smooth_in_steps(
            window - window.mean(axis=1, keepdims=True),
            curve.steps[None, hi - size : hi],
            True,
            np.array([False, True]),
        )
        smooth[i] = np.maximum(smooth[i], courses)
    coefficient = np.concatenate(coefficients)
    rss = np.maximum(total[b.which] - coefficient**2, 0.0)
    height = coefficient * b.scales[:, None]
    misfit = rss / (sizes[b.which, None] - 4)
    # a constant curve has no scatter at all; what rounding leaves of it must not become evidence
    rounding = 1e-10 * largest[b.which] + 1e-150
    floor = np.maximum((SHAPE_ERROR * height) ** 2, np.maximum(np.array([sigma, loss_sigma]) ** 2, rounding**2))
    variance = np.maximum(floor, misfit)
    evidence = (np.maximum(total - smooth, 0.0)[b.which] - rss) / variance

    rho = _autocorrelation(both[:, 0], sums[:, 0], sizes, b, coefficient[:, 0], np.concatenate(beside), rss[:, 0])
    rising = height[:, 0] > 0
    # what the ramp leaves may be far below the floor, of which its autocorrelation says nothing
    contrast = coefficient[:, 0] ** 2 / np.maximum(floor[:, 0], misfit[:, 0] * (1 + rho) / (1 - rho))
    # what came before may have fallen, up to the middle of the ramp: a rise since then counts as well
    first_half_of = reach - 1 - b.back, reach - 1 - b.half
    since = largest_between(rises(llc, sigma), *first_half_of)
    since *= (1 - curve.persistence) / (1 + curve.persistence)
    contrast = np.maximum(np.where(rising, LARGEST * contrast, 0.0), HIDDEN * since)
    joint = np.where((contrast > 0) & (height[:, 1] < 0), np.minimum(contrast, evidence[:, 1]), -math.inf)
    # the plateau before a falling step
    before = (llc[-1] + sums[:, 0] / sizes)[b.which] - height[:, 0] * b.means
    # a loss that falls faster and faster while the coefficient turns negative: a saddle being left
    threes = np.convolve(both[:, 1], np.ones(3) / 3, "valid")
    first = reach - sizes
    bend = threes[-1] - 2 * threes[first + sizes // 2 - 1] + threes[first]
    leaving = (bend < -5 * loss_sigma)[b.which] & (before + height[:, 0] * b.seen < -3 * sigma)
    out = ~rising & ((before < -3 * sigma) | leaving)

    # without a second witness the noise of the whole curve counts too: a window is too short to know it
    alone = np.maximum(rho, curve.persistence)
    alone = evidence[:, 0] * (1 - alone) / (1 + alone)
    score = _REPEATED * np.maximum(LARGEST * alone, joint)
    # a rise that a fall before it hides is one from the lowest point
    risen = llc[-1] + largest_between(-llc, *first_half_of)
    change = np.where(~rising & (joint > alone), risen, height[:, 0] * b.seen)
    score[out | (np.abs(change) < min_change)] = -math.inf
    place = int(np.argmax(score))
    if not score[place] > 0:
        return None
    centre, width = float(hi - sizes[b.which[place]] + b.centres[place]), float(b.widths[place])
    error = b.scales[place] * sigma * math.sqrt((1 + rho[place]) / (1 - rho[place]))
    return Step(
        score=float(score[place]),
        onset=centre - width / 2,
        centre=centre,
        end=centre + width / 2,
        height=float(change[place]),
        height_se=float(error * b.seen[place]),
    )


def _autocorrelation(
    values: Array, sums: Array, sizes: Array, b: _Banks, coefficient: Array, beside: Array, rss: Array
) -> Array:
    """That of :func:`~lightning_slt.transitions.evidence.autocorrelation` for every ramp ``[num_ramps]``.

    Of the residual ``y - c r`` the lag-one product is ``sum y y' - c sum (r y' + r' y) + c^2 sum r r'``.
    """
    newest, oldest = values[-1], values[values.size - sizes]
    products = np.concatenate([[0.0], np.cumsum((values[1:] * values[:-1])[::-1])])[sizes - 1]
    mean = sums / sizes
    products = products - mean * (2 * sums - oldest - newest) + (sizes - 1) * mean**2
    beside = beside + mean[b.which] * b.ends
    lagged = products[b.which] - coefficient * beside + coefficient**2 * b.own
    flat = rss <= 1e-18 * float(np.max(values * values))
    ratio = np.where(flat, -1.0, lagged / np.where(flat, 1.0, rss)) + 2.0 / sizes[b.which]
    return np.clip(np.where(flat, 0.0, ratio), 0.0, 0.9)
