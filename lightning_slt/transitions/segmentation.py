"""Offline: every transition of a whole curve, the most evident first, then those within the stretches it leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lightning_slt.transitions.curve import Curve, Step, fall_of
from lightning_slt.transitions.evidence import MIN_POINTS, SIZES, Array, persistence, without_spikes
from lightning_slt.transitions.newest import newest_step
from lightning_slt.transitions.pauses import pauses
from lightning_slt.transitions.reading import rolling_scatter, transition_of
from lightning_slt.transitions.search import best_step
from lightning_slt.transitions.settings import checked_boundaries, checked_min_change, numbers_of, threshold_of
from lightning_slt.transitions.transition import State, Transition


def detect_transitions(
    steps: ArrayLike,
    llc: ArrayLike,
    llc_se: ArrayLike,
    loss: ArrayLike,
    valid: ArrayLike | None = None,
    *,
    false_alarms: float = 0.05,
    min_change: float = 0.0,
    boundaries: Sequence[float] = (),
    at_boundary: Literal["annotate", "suppress"] = "annotate",
) -> list[Transition]:
    """All transitions of a recorded run, in order of step.

    Binary segmentation: the step with the highest score over all windows of all lengths is taken, then the points
    before its onset and after its end are searched in the same way, until no score passes the threshold. The score is
    that of :mod:`lightning_slt.transitions.evidence` (a ramp between plateaus against a smooth course), joined with the
    loss as in :mod:`lightning_slt.transitions.search`. Where the curve ends, a step may still be going on: it is looked
    for once, as :class:`TransitionDetector` would at the last point.

    Args:
        steps: ``[n]`` training steps, not decreasing; gaps and uneven spacing do not matter.
        llc: ``[n]`` local learning coefficient.
        llc_se: ``[n]`` its standard errors. Only a floor: the scale is the scatter from point to point.
        loss: ``[n]`` training loss at the same steps.
        valid: ``[n]`` booleans, or 1 and 0, with NaN or None where it is not known; points that are not True, or not
            finite, are left out.
        false_alarms: tolerated false alarms in 100 points.
        min_change: smallest change of the LLC worth a flag.
        boundaries: steps at which the learning rate or the data changed.
        at_boundary: transitions around a boundary carry it ("annotate") or are left out ("suppress").

    Returns:
        The transitions; ``known_at`` is the last step, ``id`` their position. They are "confirmed", but for one that
        still goes on at the last point, which is "provisional". Empty below 8 usable points.

    Raises:
        ValueError: lengths differ, steps decrease, ``valid`` holds something else, or a setting is out of range.
        TypeError: something else than numbers.

    Example:
        >>> import numpy as np
        >>> steps, noise = np.arange(60) * 100.0, np.random.default_rng(0).normal(size=60)
        >>> [t] = detect_transitions(steps, 20 + 15 / (1 + np.exp(30 - steps / 100)) + noise, np.ones(60), np.ones(60))
        >>> t.kind, abs(t.step - 3000) < 150, abs(t.llc_change - 15) < 2
        ('D', True, True)
    """
    named = {"steps": steps, "llc": llc, "llc_se": llc_se, "loss": loss}
    x, y, se, z = (numbers_of(name, values) for name, values in named.items())
    ok = np.ones(x.size, dtype=bool) if valid is None else _flags(valid)
    for name, array in (("llc", y), ("llc_se", se), ("loss", z), ("valid", ok)):
        if array.size != x.size:
            raise ValueError(f"{name}: expected one value for each of the {x.size} steps, got {array.size}.")
    if not np.all(np.isfinite(x)) or np.any(np.diff(x) < 0):
        raise ValueError("steps: expected finite numbers that do not decrease; sort the points by step.")
    if at_boundary not in ("annotate", "suppress"):
        raise ValueError(f"at_boundary: expected 'annotate' or 'suppress', got {at_boundary!r}.")
    threshold, smallest = threshold_of(false_alarms), checked_min_change(min_change)
    boundaries = checked_boundaries(boundaries)
    ok = ok & np.isfinite(y) & np.isfinite(z)
    x, y, se, z = x[ok], y[ok], se[ok], z[ok]
    if x.size < MIN_POINTS:
        return []
    sigma = rolling_scatter(y, se)
    fall, fall_scatter = fall_of(z, lambda values: rolling_scatter(values, np.empty(0)))
    curve = Curve(
        steps=x,
        llc=without_spikes(y, float(np.median(sigma))),
        llc_scatter=sigma,
        loss=z,
        loss_scatter=rolling_scatter(z, np.empty(0)),
        fall=fall,
        fall_scatter=fall_scatter,
        persistence=persistence(y),
    )
    found: list[tuple[Step, State]] = []
    stretches = [(0, x.size)]
    while stretches:
        lo, hi = stretches.pop()
        step = best_step(curve, lo, hi, SIZES, threshold=threshold, min_change=smallest)
        state: State = "confirmed"
        if step is None and hi == x.size:
            step, state = _unfinished(curve, lo, threshold, smallest), "provisional"
        if step is not None:
            found.append((step, state))
            left, right = _beside(curve, step)
            stretches += [(lo, max(lo, left) + 1), (min(right, hi), hi)]
    found.sort(key=lambda each: each[0].places)
    last = float(x[-1])
    transitions = [
        transition_of(step, curve, x, boundaries, number=number, state=state, known_at=last)
        for number, (step, state) in enumerate(found)
    ]
    return [t for t in transitions if at_boundary == "annotate" or t.boundary is None]


def _flags(valid: ArrayLike) -> Array:
    """Booleans, as a table holds them: a column with gaps is one of numbers, or of objects."""
    array = np.asarray(valid).ravel()
    try:
        if array.dtype.kind not in "biufO" or any(isinstance(value, str) for value in array.tolist()):
            raise TypeError
        numbers = array.astype(np.float64)  # None becomes NaN
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or not np.isin(numbers[~np.isnan(numbers)], (0.0, 1.0)).all():
        raise ValueError(
            f"valid: expected booleans, got {array[:3].tolist()}; text such as 'False' has to be made a boolean first."
        )
    return numbers == 1.0


def _unfinished(curve: Curve, lo: int, threshold: float, min_change: float) -> Step | None:
    """The step that goes on where the curve ends, by what the online detector would say at its last point."""
    step = newest_step(curve, lo, curve.steps.size, min_change)
    return step if step is not None and step.score > threshold else None


def _beside(curve: Curve, step: Step) -> tuple[int, int]:
    """Last point before a step and first point after it that the search for others begins with.

    One point of the ramp stays with each plateau, and more where a rise pauses within the ramp's tails: a neighbouring
    step begins or ends there, and needs its plateau.
    """
    first, last = math.ceil(step.onset), math.floor(step.end)
    if step.height > 0:
        width = step.end - step.onset
        last = min([last, *pauses(curve, step.centre, step.end + width)])
        first = max([first, *pauses(curve, step.onset - width, step.centre)])
    return first, last
