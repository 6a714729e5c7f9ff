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

The loss is looked at in proportion (:func:`~lightning_slt.transitions.curve.in_proportion`): a stage takes a share of
what is left. But any smooth loss that comes near zero falls faster and faster in its logarithm, and where zero is says
nothing of some losses (those of densities). So the loss as it was given must not speak for a smooth course by as much
as makes a flag.

Where the coefficient is negative before a step and lower after it, the chains run downhill from a saddle that is left
behind: no measure of complexity, hence no step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_slt.transitions.curve import Curve, Step
from lightning_slt.transitions.evidence import Array, Bank, Fits, autocorrelation, bank, evenly_spaced, fits
from lightning_slt.transitions.pauses import pauses
from lightning_slt.transitions.rises import first_half, largest_between, rises

LARGEST = 0.85  # of a contrast counts beside a step of the loss: it is the largest of many
AGAINST = -12.0  # evidence of the loss as it was given, below which a step of its logarithm is not believed
HIDDEN = 0.4  # of a rise that a fall hides, which may begin anywhere
BLOCK = 2048  # windows of one size that are looked at together: what is held of them is some 100 kB each
_CANDIDATES = 4  # ramps of a window that are deflated for autocorrelation, best first


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
    uneven = not evenly_spaced(curve.steps[lo:hi])
    for size in sizes:
        if size > hi - lo:
            break
        b = bank(size)
        for first in range(lo, hi - size + 1, BLOCK):
            windows = _windows_of(curve, first, min(first + BLOCK + size - 1, hi), size)
            found = _scored(windows, b, min_change)
            if uneven:
                # courses that are smooth in steps take evidence away only, and cost more: they are for what may count
                windows = windows.only(np.flatnonzero(found.score.max(axis=1) > floor))
                found = _scored(windows, b, min_change, in_steps=True)
            for window in np.flatnonzero(found.score.max(axis=1, initial=-math.inf) > floor):
                for ramp in np.argsort(-found.score[window])[:_CANDIDATES]:
                    if found.score[window, ramp] <= floor:
                        break
                    step = _step(windows, b, found, int(window), int(ramp), curve.persistence)
                    if step.score <= floor or abs(step.height) < min_change:
                        continue
                    if step.height > 0 and pauses(curve, step.onset, step.end):
                        continue  # it covers two stages
                    best, floor = step, step.score
    return best


@dataclass(frozen=True)
class _Windows:
    """All windows of one size in a stretch of a curve: ``[num_windows, size]``, or ``[num_windows]``."""

    starts: Array
    steps: Array
    llc: Array
    sigma: Array
    loss: Array
    loss_sigma: Array
    given: Array | None  # the loss as it was given, where that is another
    given_sigma: Array | None

    def only(self, which: Array) -> _Windows:
        """Some of them, by number."""
        every = (getattr(self, field.name) for field in dataclasses.fields(self))
        return _Windows(*(values[which] if values is not None else None for values in every))  # type: ignore[arg-type]


def _windows_of(curve: Curve, lo: int, hi: int, size: int) -> _Windows:
    starts = np.arange(lo, hi - size + 1)
    places = starts[:, None] + np.arange(size)
    sigma, loss_sigma, given_sigma = (
        np.sqrt(np.mean(scatter[places] ** 2, axis=1))
        for scatter in (curve.llc_scatter, curve.fall_scatter, curve.loss_scatter)
    )
    return _Windows(
        starts=starts,
        steps=curve.steps[places],
        llc=curve.llc[places],
        sigma=sigma,
        loss=curve.fall[places],
        loss_sigma=loss_sigma,
        given=curve.loss[places] if curve.has_proportion else None,
        given_sigma=given_sigma if curve.has_proportion else None,
    )


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


def _scored(windows: _Windows, b: Bank, min_change: float, in_steps: bool = False) -> _Scored:
    """Scores the bank; ``-inf`` where no step can be."""
    llc, sigma, loss, loss_sigma = windows.llc, windows.sigma, windows.loss, windows.loss_sigma
    steps = windows.steps if in_steps else None
    first = fits(llc, sigma, b, steps)
    second = fits(loss, loss_sigma, b, steps)
    falls = second.evidence
    if windows.given is not None and windows.given_sigma is not None:
        given = fits(windows.given, windows.given_sigma, b, steps)
        most = np.where(given.height < 0, given.evidence, -math.inf).max(axis=1, keepdims=True)
        falls = np.where(most > AGAINST, falls, -math.inf)
    rising = first.height > 0
    # what came before may have fallen, up to the middle of the ramp: a rise since then counts as well
    since = largest_between(rises(llc, sigma[:, None]), *first_half(b))
    contrast = np.maximum(np.where(rising, LARGEST * first.contrast, 0.0), HIDDEN * since)
    joint = np.where((contrast > 0) & (second.height < 0), np.minimum(contrast, falls), -math.inf)
    score = np.maximum(first.evidence, joint)
    if min_change > 0:
        # at the most: from the lowest point, where a fall hides a rise
        risen = llc.max(axis=1, keepdims=True) + largest_between(-llc, *first_half(b))
        change = np.maximum(np.abs(first.height) * b.seen, np.where(joint > 0, risen, 0.0))
        score = np.where(change < min_change, -math.inf, score)
    # the plateau before a falling step
    before = llc.mean(axis=1, keepdims=True) - first.height * b.means
    # as its points have it too: where the step is large the ramp may miss the level by more than that level is
    count = np.maximum(1, np.ceil(b.centres - b.widths / 2).astype(int))  # of the points before the onset
    seen_before = np.cumsum(llc, axis=1)[:, count - 1] / count
    negative = np.minimum(before, seen_before) < -3 * sigma[:, None]
    score = np.where((first.height < 0) & negative, -math.inf, score)
    # a loss that falls faster and faster while the coefficient turns negative: a saddle being left
    mid = b.size // 2 - 1
    bend = loss[:, -3:].mean(axis=1) - 2 * loss[:, mid : mid + 3].mean(axis=1) + loss[:, :3].mean(axis=1)
    leaving = (bend < -5 * loss_sigma)[:, None] & (before + first.height * b.seen < -3 * sigma[:, None])
    score = np.where((first.height < 0) & leaving, -math.inf, score)
    return _Scored(first, since, joint, score)


def _step(windows: _Windows, b: Bank, found: _Scored, window: int, ramp: int, persistence: float) -> Step:
    """The step that a ramp in a window is, its score deflated for autocorrelation."""
    llc, sigma = windows.llc[window], float(windows.sigma[window])
    rho = autocorrelation(llc, b, ramp)
    # without a second witness the noise of the whole curve counts too: a window is too short to know it
    alone = max(rho, persistence)
    own = float(found.first.evidence[window, ramp]) * (1 - alone) / (1 + alone)
    joint = min(found.contrast(window, ramp, rho, persistence), float(found.joint[window, ramp]))
    fitted = float(found.first.height[window, ramp])
    height, late = fitted * float(b.seen[ramp]), 0.0
    place, width = float(b.centres[ramp]), float(b.widths[ramp])
    first, half = (int(points[ramp]) for points in first_half(b))
    low = first + int(np.argmin(llc[first : half + 1]))
    dip = float(llc.mean()) - fitted * float(b.means[ramp]) - float(llc[low])
    if joint > own and (height <= 0 or dip > 3 * sigma):
        height, middle = _risen(llc, low, place + width / 2)
        late = max(0.0, (middle - place) / 2)
    centre = float(windows.starts[window]) + place
    error = float(b.scales[ramp]) * sigma * math.sqrt((1 + rho) / (1 - rho))
    return Step(
        score=max(own, joint),
        onset=centre - width / 2,
        centre=centre,
        end=centre + width / 2,
        height=height,
        height_se=error * float(b.seen[ramp]),
        late=late,
    )


def _risen(values: Array, low: int, end: float) -> tuple[float, float]:
    """A rise that a fall before it hides: its height from the lowest point on, and where half of it is done.

    The loss, which such a step is placed by, is early: it falls with the square of what is missing. The coefficient
    follows the curvature and is late.
    """
    after = float(np.median(values[min(values.size - 1, math.ceil(end)) :]))
    height = after - float(values[low])
    above = values[low:] >= values[low] + height / 2
    return height, float(low + np.argmax(above))
