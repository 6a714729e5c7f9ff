"""The likeliest step in a stretch of a curve: the offline search, and what both detectors share.

The two channels of a monitored run are the learning coefficient and the loss. A step of the coefficient is believed

- on its own, where a ramp between plateaus explains the coefficient better than a smooth course
  (:mod:`~lightning_slt.transitions.evidence`);
- jointly, where the coefficient rises (ramp against no change at all) AND the loss falls in the same places as a ramp
  between plateaus rather than smoothly: the score is the smaller of the two. The loss has little noise, so this is what
  tells a stage from a curve that only rises, and what finds small stages. The rise may begin from a dip within the
  first half of the ramp, as chains at a saddle show one; then half of it is done later than half of the loss, and the
  step lies between the two.

Smooth means smooth by point or by training step.

Where the coefficient is negative before a step and lower after it, the chains run downhill from a saddle that is left
behind: no measure of complexity, hence no step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_slt.transitions.evidence import Array, Bank, Fits, autocorrelation, bank, fits

LOCAL = 64  # points that the scatter at a point is read from
_TURN = 0.03  # of the range of a stretch: the least depth of a dip that counts
_RATES = (1, 2, 3, 5, 8, 12, 18, 27, 40)  # points over which rates are read
_PAUSE = 5.0  # standard errors by which the rate between two falls lies below both
LARGEST = 0.85  # of a contrast counts beside a step of the loss: it is the largest of many
HIDDEN = 0.4  # of a rise that a fall hides, which may begin anywhere
_CANDIDATES = 4  # ramps of a window that are deflated for autocorrelation, best first


@dataclass(frozen=True)
class Step:
    """A step found: places are fractional indices of points."""

    score: float
    onset: float
    centre: float
    end: float
    height: float
    height_se: float
    late: float = 0.0  # points by which all three places are later than the loss alone puts them

    @property
    def places(self) -> tuple[float, float, float]:
        """Onset, centre and end by both channels."""
        return self.onset + self.late, self.centre + self.late, self.end + self.late


@dataclass(frozen=True)
class Curve:
    """Both channels by point, spikes removed, with the scatter around each point."""

    steps: Array
    llc: Array
    llc_scatter: Array
    loss: Array
    loss_scatter: Array
    persistence: float = 0.0


def rises(values: Array, sigma: Array | float) -> Array:
    """Evidence ``[..., size]`` for a rise from each place of a window to its end: a line against no change.

    0 for a fall and for less than four points. ``sigma`` is the scatter, one for all or one a window ``[..., 1]``.
    """
    back = values[..., ::-1] - values[..., -1:]
    x = np.arange(values.shape[-1], dtype=np.float64)
    count = x + 1
    sum_x, sum_xx = np.cumsum(x), np.cumsum(x * x)
    sum_y, sum_xy = np.cumsum(back, axis=-1), np.cumsum(x * back, axis=-1)
    covered = np.maximum(sum_xx - sum_x**2 / count, 1e-9)
    slope = (sum_xy - sum_x * sum_y / count) / covered
    found = np.where((slope < 0) & (count >= 4), slope**2 * covered / np.maximum(sigma, 1e-150) ** 2, 0.0)
    return found[..., ::-1]


def first_half(b: Bank) -> tuple[Array, Array]:
    """First and last point of the stretch from the onset to the centre of each ramp."""
    onset = np.maximum(np.floor(b.centres - b.widths / 2), 0).astype(int)
    return onset, np.maximum(np.floor(b.centres).astype(int), onset)


def largest_between(values: Array, first: Array, last: Array) -> Array:
    """Largest of ``values [..., size]`` from each ``first`` to each ``last``, both counted: ``[..., num_pairs]``."""
    tables = [values]
    while 2 ** len(tables) <= int(np.max(last - first)) + 1:
        half = 2 ** (len(tables) - 1)
        tables.append(np.maximum(tables[-1][..., :-half], tables[-1][..., half:]))
    level = np.floor(np.log2(last - first + 1)).astype(int)
    out = np.empty((*values.shape[:-1], first.size))
    for k, table in enumerate(tables):
        at = np.flatnonzero(level == k)
        out[..., at] = np.maximum(table[..., first[at]], table[..., last[at] - 2**k + 1])
    return out


def pause(values: Array, sigma: float) -> int | None:
    """First point of the slowest stretch between two falls, None where they are one.

    There the rate is less than half of what it is before and after, beyond the scatter. Rates are those over one point
    to a third of all; no two of those compared overlap.
    """
    best, place = _PAUSE, None
    for reach in _RATES:
        if 3 * reach > values.size - 1:
            break
        rate = (values[:-reach] - values[reach:]) / reach
        before, after = np.maximum.accumulate(rate), np.maximum.accumulate(rate[::-1])[::-1]
        slower = np.minimum(before[: -2 * reach], after[2 * reach :])
        middle = rate[reach:-reach]
        errors = np.where(middle < 0.5 * slower, (slower - middle) * reach / (2 * max(sigma, 1e-150)), 0.0)
        first = int(np.argmax(errors))
        if errors[first] > best:
            best, place = float(errors[first]), first + reach
    return place


def pauses(curve: Curve, first: float, last: float) -> list[int]:
    """Points at which the fall of the loss or the rise of the coefficient pauses between two places."""
    lo, hi = max(0, math.floor(first)), min(curve.loss.size, math.ceil(last) + 1)
    both = ((curve.loss, curve.loss_scatter), (-curve.llc, curve.llc_scatter))
    found = [pause(values[lo:hi], float(np.max(scatter[lo:hi], initial=0.0))) for values, scatter in both]
    return [lo + place for place in found if place is not None]


def turn(curve: Curve, lo: int, hi: int) -> Step | None:
    """A negative coefficient that fell and rises again at the newest points while the loss falls: a saddle left.

    The dip is the lowest point after the highest one; its depth and the rise since must stand out of the scatter and
    of the range of the stretch.
    """
    llc, sigma = curve.llc[lo:hi], float(curve.llc_scatter[hi - 1])
    top = int(np.argmax(llc))
    dip = top + int(np.argmin(llc[top:]))
    least = max(5 * sigma, _TURN * float(np.ptp(llc)))
    rise, seen = float(llc[-1] - llc[dip]), llc.size - 1 - dip
    if seen < 3 or llc[dip] > -3 * sigma or llc[top] - llc[dip] < least or rise < least:
        return None
    falls = rises(-curve.loss[lo + dip : hi], float(curve.loss_scatter[hi - 1]))[0]
    score = min(float(rises(llc[dip:], sigma)[0]), float(falls))
    place = float(lo + dip)
    return Step(score, place, place + seen / 2, place + seen, rise, sigma * math.sqrt(2.0))


def best_step(
    curve: Curve, lo: int, hi: int, sizes: Sequence[int], *, threshold: float, min_change: float
) -> Step | None:
    """The step of the highest score above ``threshold`` in the points ``lo <= i < hi``.

    Args:
        curve: the two channels.
        lo: first point.
        hi: one past the last point.
        sizes: window sizes to look at; those longer than the stretch are left out.
        threshold: smallest score.
        min_change: smallest height, in units of the coefficient.
    """
    best: Step | None = None
    floor = threshold
    for size in sizes:
        if size > hi - lo:
            break
        starts = np.arange(lo, hi - size + 1)
        places = starts[:, None] + np.arange(size)
        llc, loss = curve.llc[places], curve.loss[places]
        sigma = np.sqrt(np.mean(curve.llc_scatter[places] ** 2, axis=1))
        loss_sigma = np.sqrt(np.mean(curve.loss_scatter[places] ** 2, axis=1))
        b = bank(size)
        # courses that are smooth in steps take evidence away only, and cost more: they are for what may count
        may = np.flatnonzero(_scored(llc, loss, sigma, loss_sigma, b, None, min_change).score.max(axis=1) > floor)
        if may.size == 0:
            continue
        starts, llc, loss, sigma = starts[may], llc[may], loss[may], sigma[may]
        steps = curve.steps[places[may]]
        found = _scored(llc, loss, sigma, loss_sigma[may], b, steps, min_change)
        onset, half = first_half(b)
        for window in np.flatnonzero(found.score.max(axis=1) > floor):
            for ramp in np.argsort(-found.score[window])[:_CANDIDATES]:
                if found.score[window, ramp] <= floor:
                    break
                rho = autocorrelation(llc[window], b, int(ramp))
                # without a second witness the noise of the whole curve counts too: a window is too short to know it
                alone = max(rho, curve.persistence)
                own = found.first.evidence[window, ramp] * (1 - alone) / (1 + alone)
                rise = found.contrast(int(window), int(ramp), rho, curve.persistence)
                deflated = max(own, min(rise, found.joint[window, ramp]))
                if deflated > floor:
                    height = float(found.first.height[window, ramp] * b.seen[ramp])
                    centre, width, late = starts[window] + b.centres[ramp], b.widths[ramp], 0.0
                    before = float(llc[window].mean() - found.first.height[window, ramp] * b.means[ramp])
                    low = onset[ramp] + int(np.argmin(llc[window, onset[ramp] : half[ramp] + 1]))
                    if deflated > own and (height <= 0 or before - llc[window, low] > 3 * sigma[window]):
                        height, middle = _risen(llc[window], low, b.centres[ramp] + width / 2)
                        late = max(0.0, (starts[window] + middle - centre) / 2)
                    if height > 0 and pauses(curve, centre - width / 2, centre + width / 2):
                        continue  # it covers two stages
                    floor = deflated
                    error = b.scales[ramp] * sigma[window] * math.sqrt((1 + rho) / (1 - rho))
                    best = Step(
                        score=float(deflated), onset=float(centre - width / 2), centre=float(centre),
                        end=float(centre + width / 2), height=height,
                        height_se=float(error * b.seen[ramp]), late=float(late),
                    )  # fmt: skip
    return best


def _risen(values: Array, low: int, end: float) -> tuple[float, float]:
    """A rise that a fall before it hides: its height from the lowest point on, and where half of it is done.

    The loss, which such a step is placed by, is early: it falls with the square of what is missing. The coefficient
    follows the curvature and is late.
    """
    after = float(np.median(values[min(values.size - 1, math.ceil(end)) :]))
    height = after - float(values[low])
    above = values[low:] >= values[low] + height / 2
    return height, float(low + np.argmax(above))


@dataclass(frozen=True)
class _Scored:
    """Every ramp in every window, ``[num_windows, num_ramps]``, not yet deflated for autocorrelation."""

    first: Fits  # of the coefficient
    since: Array  # of the coefficient: a rise since some point in the first half of the ramp
    joint: Array
    score: Array

    def contrast(self, window: int, ramp: int, rho: float, persistence: float) -> float:
        """Evidence for a rise of the coefficient, deflated for the autocorrelation ``rho`` of what the ramp leaves.

        What it leaves may be far below the floor, of which the autocorrelation says nothing.
        """
        floor, misfit = self.first.floor[window, ramp], self.first.misfit[window, ramp]
        own = self.first.contrast[window, ramp] * max(floor, misfit) / max(floor, misfit * (1 + rho) / (1 - rho))
        rising = self.first.height[window, ramp] > 0
        since = self.since[window, ramp] * (1 - persistence) / (1 + persistence)
        return float(max(LARGEST * own if rising else 0.0, HIDDEN * since))


def _scored(
    llc: Array, loss: Array, sigma: Array, loss_sigma: Array, b: Bank, steps: Array | None, min_change: float
) -> _Scored:
    """Scores the bank in windows ``[num_windows, size]`` of both channels; ``-inf`` where no step can be."""
    first = fits(llc, sigma, b, steps)
    second = fits(loss, loss_sigma, b, steps)
    rising = first.height > 0
    # what came before may have fallen, up to the middle of the ramp: a rise since then counts as well
    since = largest_between(rises(llc, sigma[:, None]), *first_half(b))
    contrast = np.maximum(np.where(rising, LARGEST * first.contrast, 0.0), HIDDEN * since)
    joint = np.where((contrast > 0) & (second.height < 0), np.minimum(contrast, second.evidence), -math.inf)
    score = np.maximum(first.evidence, joint)
    score = np.where(np.abs(first.height) * b.seen < min_change, -math.inf, score)
    # the plateau before a falling step
    before = llc.mean(axis=1, keepdims=True) - first.height * b.means
    score = np.where((first.height < 0) & (before < -3 * sigma[:, None]), -math.inf, score)
    # a loss that falls faster and faster while the coefficient turns negative: a saddle being left
    mid = b.size // 2 - 1
    bend = loss[:, -3:].mean(axis=1) - 2 * loss[:, mid : mid + 3].mean(axis=1) + loss[:, :3].mean(axis=1)
    leaving = (bend < -5 * loss_sigma)[:, None] & (before + first.height * b.seen < -3 * sigma[:, None])
    score = np.where((first.height < 0) & leaving, -math.inf, score)
    return _Scored(first, since, joint, score)
