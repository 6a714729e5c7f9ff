"""Steps at which the learning rate jumps: a change that the trainer makes, not the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

RATIO = 1.5
"""Between two optimiser steps; below it a change counts as smooth."""
_SMOOTH = 2.0
_NEGLIGIBLE = 1e-3


class LearningRateWatch:
    """Finds discontinuous changes of the learning rates, fed with those of every optimiser step in order.

    A jump is a ratio beyond :data:`RATIO` that the step before has not led up to: the end of a linear or a cosine decay
    has large ratios too, but each change is of the size of the one before, as a ratio or as a difference. The rise from
    the start on is warm-up, however steep, until a step does not rise. A rate that has all but vanished (a thousandth
    of the largest) has no jumps.

    Example:
        >>> watch = LearningRateWatch()
        >>> rates = [0.01, 0.02, 0.03, 0.04, 0.04, 0.04, 0.004, 0.004]  # a warm-up, and a drop to a tenth
        >>> [step for step, rate in enumerate(rates) if watch.jumped([rate])]
        [6]
    """

    def __init__(self) -> None:
        self._groups: list[dict[str, float]] = []

    def jumped(self, rates: Sequence[float]) -> bool:
        """Whether any of the rates jumps from the step before to this one."""
        if len(rates) != len(self._groups):
            # the first step, or another number of parameter groups (unfreezing): a change that is not of a rate
            fresh = {"change": 0.0, "difference": 0.0, "warm": 1.0}
            self._groups = [{"rate": r, "largest": r, **fresh} for r in map(float, rates)]
            return False
        return any([self._step(group, float(rate)) for group, rate in zip(self._groups, rates, strict=True)])

    @staticmethod
    def _step(group: dict[str, float], rate: float) -> bool:
        old, last, difference = group["rate"], group["change"], group["difference"]
        group["largest"] = max(group["largest"], rate)
        if group["warm"] and rate <= old:
            group["warm"] = 0.0
        small = max(old, rate) <= _NEGLIGIBLE * group["largest"]
        floor = _NEGLIGIBLE * group["largest"] or 1.0
        change = math.log(max(rate, floor) / max(old, floor))
        group["rate"], group["change"], group["difference"] = rate, change, rate - old
        led_up_to = change * last > 0 and (
            abs(change) < _SMOOTH * abs(last) or abs(rate - old) < _SMOOTH * abs(difference)
        )
        return not group["warm"] and not small and abs(change) > math.log(RATIO) and not led_up_to

    def state_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {"groups": [dict(group) for group in self._groups]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._groups = [{name: float(value) for name, value in group.items()} for group in state["groups"]]


__all__ = ["LearningRateWatch"]
