"""A structural transition: where it begins and ends, what it changes, and when it became known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Kind = Literal["A", "B", "C", "D"]
State = Literal["provisional", "confirmed", "retracted"]


@dataclass(frozen=True)
class Transition:
    """One structural transition; steps are training steps, the LLC and the loss are in their own units.

    The kinds (Chen et al. 2023, arXiv 2310.06301; Hoogland et al. 2024, arXiv 2402.02364):

    ====  ==========  ====================  ==========================
    kind  LLC         loss                  reading
    ====  ==========  ====================  ==========================
    A     rises       falls                 structure is built
    B     falls       level or falling      structure is simplified
    C     falls       rises                 structure is lost
    D     rises       level                 structure without a gain
    ====  ==========  ====================  ==========================

    Attributes:
        id: number of the transition within its detector or curve; the same in all later states.
        onset: step at which 10 % of the change had happened.
        step: step at which half of it had.
        end: step at which 90 % of it had.
        kind: one of the table's.
        state: "provisional" when flagged, then "confirmed" or "retracted".
        score: evidence for the step, as twice a log-likelihood ratio; the threshold is 12 by default.
        llc_change: height of the step of the LLC.
        llc_change_se: standard error of that height, from the scatter between points.
        loss_change: loss after less loss before.
        loss_change_se: standard error of the loss change.
        known_at: step at which it was flagged; of a clear change before its onset, when less than 10 % had happened.
        boundary: step of a learning-rate or data boundary that lies within the transition, or between its onset
            and its flag, or None.

    Example:
        >>> t = Transition(0, 90.0, 100.0, 110.0, "A", "provisional", 31.5, 8.0, 0.5, -0.2, 0.01, 130.0)
        >>> Transition.from_dict(t.as_dict()) == t
        True
    """

    id: int
    onset: float
    step: float
    end: float
    kind: Kind
    state: State
    score: float
    llc_change: float
    llc_change_se: float
    loss_change: float
    loss_change_se: float
    known_at: float
    boundary: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("A", "B", "C", "D"):
            raise ValueError(f"kind: expected 'A', 'B', 'C' or 'D', got {self.kind!r}.")
        if self.state not in ("provisional", "confirmed", "retracted"):
            raise ValueError(f"state: expected 'provisional', 'confirmed' or 'retracted', got {self.state!r}.")
        if not self.onset <= self.step <= self.end:
            raise ValueError(
                f"onset, step, end: expected in this order, got {self.onset}, {self.step}, {self.end}; sort them."
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, fit for JSON and for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Transition:
        """The inverse of :meth:`as_dict`; unknown keys are ignored, so that newer records can be read."""
        known = {field.name for field in fields(cls)}
        missing = known - {"boundary"} - set(values)
        if missing:
            raise ValueError(f"values: {sorted(missing)} missing; pass what Transition.as_dict() gave.")
        return cls(**{name: value for name, value in values.items() if name in known})


def kind_of(llc_change: float, loss_change: float, loss_change_se: float) -> Kind:
    """The kind from the signs; the loss counts as level within three standard errors.

    Example:
        >>> kind_of(5.0, -0.1, 0.01), kind_of(-5.0, -0.1, 0.01), kind_of(-5.0, 0.1, 0.01), kind_of(5.0, 0.0, 0.01)
        ('A', 'B', 'C', 'D')
    """
    error = loss_change_se if math.isfinite(loss_change_se) else 0.0
    if llc_change > 0:
        return "A" if loss_change < -3 * error else "D"
    return "C" if loss_change > 3 * error else "B"
