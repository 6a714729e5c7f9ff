"""From a step in the points to a Transition in training steps: the loss beside it, its kind, boundaries within it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from lightning_slt.transitions.curve import Curve, Step
from lightning_slt.transitions.evidence import Array, scatter
from lightning_slt.transitions.transition import State, Transition, kind_of

LOCAL = 64  # points that the scatter at a point is read from
_FLOOR = 0.3  # of the typical chain error
_ERRORS = 9  # points whose chain errors make the typical one
_NEAR = 16  # points on each side that the scatter of the loss is read from
_REACH = 5  # points on each side that the loss before and after is read from


def rolling_scatter(values: Array, floor: Array) -> Array:
    """Scatter around each point from the nearest ``LOCAL`` points, floored by 0.3 of the typical chain error.

    So little, because with the same noise at every firing the chain error is mostly an offset that all points share.
    """
    n = values.size
    if n <= LOCAL:
        local = np.full(n, scatter(values))
    else:
        windows = np.lib.stride_tricks.sliding_window_view(np.diff(values, 2), LOCAL - 2)
        each = 1.4826 * np.median(np.abs(windows), axis=1) / math.sqrt(6.0)
        local = each[np.clip(np.arange(n) - LOCAL // 2, 0, each.size - 1)]
    return np.maximum(local, _FLOOR * _typical(floor)) if floor.size else local


def _typical(errors: Array) -> Array:
    """Median of the known chain errors around each point; 0 where none is known.

    Around each point, because they differ by orders of magnitude within a run: chains that start from a saddle spread.
    """
    known = np.where(np.isfinite(errors) & (errors >= 0), errors, np.nan)
    half = _ERRORS // 2
    around = np.lib.stride_tricks.sliding_window_view(np.pad(known, half, constant_values=np.nan), _ERRORS)
    empty = np.isnan(around).all(axis=1, keepdims=True)
    return np.nanmedian(np.where(empty, 0.0, around), axis=1)


def loss_change(loss: Array, loss_scatter: Array, step: Step) -> tuple[float, float]:
    """Median of the loss in the points just after a step less that just before, with its standard error."""
    first, last = max(0, math.floor(step.onset)), min(loss.size - 1, math.ceil(step.end))
    before, after = loss[max(0, first - _REACH + 1) : first + 1], loss[last : last + _REACH]
    # of the points around: the scatter of a loss may go with its level, and falls by orders of magnitude with it
    own = [scatter(loss[max(0, first - _NEAR + 1) : first + 1]), scatter(loss[last : last + _NEAR])]
    both = [min(near, float(np.max(loss_scatter))) for near in own]
    # 1.2533 is the price of a median over a mean
    error = 1.2533 * math.sqrt(both[0] ** 2 / before.size + both[1] ** 2 / after.size)
    return float(np.median(after) - np.median(before)), error


def transition_of(
    step: Step, curve: Curve, steps: Array, boundaries: Iterable[float], *, number: int, state: State, known_at: float
) -> Transition:
    """The Transition that a step in the points is."""
    index = np.arange(steps.size)
    onset, centre, end = (float(np.interp(place, index, steps)) for place in step.places)
    change, error = loss_change(curve.loss, curve.loss_scatter, step)
    # a flag may come while the transition goes on
    last = max(end, known_at) if state == "provisional" else end
    inside = [boundary for boundary in boundaries if onset <= boundary <= last]
    return Transition(
        id=number,
        onset=onset,
        step=centre,
        end=end,
        kind=kind_of(step.height, change, error),
        state=state,
        score=step.score,
        llc_change=step.height,
        llc_change_se=step.height_se,
        loss_change=change,
        loss_change_se=error,
        known_at=known_at,
        boundary=min(inside, key=lambda boundary: abs(boundary - centre)) if inside else None,
    )
