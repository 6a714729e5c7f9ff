"""The overhead budget: a ledger of seconds that training earns and firings spend.

With T the seconds of training (all of a run's wall-clock but the firings) and M those of the firings, the share of
wall-clock that monitoring takes is ``M / (T + M)``. It is at most f exactly where ``M <= rho T`` with
``rho = f / (1 - f)``. So a second of training earns rho seconds of credit, a firing is debited what it took, and the
share is within the bound for as long as the credit ``rho T - M`` is not negative. A firing that was dearer than
predicted leaves a debt, which training works off before the next one.

**Sizes.** A firing need not be a full one. The first is the smallest there is, so that a short run measures something;
each later one waits for twice the size of the last, up to the full one. Waiting for the full one from the start would
leave a run without any that earns half of it, and all that comes before the first full one costs no more than that one
again. Where the credit covers more than is waited for (candidates that are far apart), the firing is as large as the
credit allows.

Only seconds that somebody else measured come in here: the ledger has no clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple, Optional

from lightning_slt.kinds import check_number

CAP = 1.5
"""The most that credit may cover, in predicted firings. A long validation, or a first firing that took less than was
feared, would else be followed by a burst of firings at neighbouring steps: so half a firing's credit is left after
one, and the next comes after half the usual distance at the soonest."""
RECENT_FIRINGS = 3
"""The next firing is predicted to cost as much as the dearest of so many."""
RECENT_BATCHES = 31
"""Training batches whose median is the price of a chain-step that has not been tried yet."""


class Decision(NamedTuple):
    """What was decided at a step: plain data, so that one rank can hand it to the others.

    Attributes:
        fire: whether the credit covers a firing of the size that is waited for.
        ask_at: the next step at which to ask; until then the answer is no.
        credit_seconds: the credit at that moment.
        predicted_seconds: what the firing was expected to take; infinite where nothing is known yet.
        size: how large a firing the credit covers, as a share of a full one's chain-steps.
    """

    fire: bool
    ask_at: int
    credit_seconds: float
    predicted_seconds: float
    size: float = 1.0


class OverheadBudget:
    """Says when a firing may take place, so that firings stay within a share of wall-clock.

    **Prediction**, of a full firing; that of a smaller one is its share of it. Before the first firing: the chain-steps
    that are planned, at the median time of a training batch. It is mostly too high, since the plan is the
    most that a firing takes and chains may be batched, and then the first firing comes late; a chain-step that is
    dearer than a training batch (larger minibatches, float32 for half precision) makes it too low, and leaves a debt.
    After that: the dearest of the last three, each over its size. How often firings come follows from the credit
    alone: too high a prediction holds back one firing's credit once, while one that is too low breaks the bound until
    the debt is paid. So the largest is safer than a mean, and costs next to nothing.

    Args:
        max_overhead: the share of wall-clock that firings may take.
        planned_steps: chain-steps of one full firing, one after another.
        least_size: the smallest firing, as a share of the full one's chain-steps; 1 for full ones only.

    Raises:
        ValueError: for a share that does not lie between 0 and 1.

    Attributes:
        max_overhead, planned_steps, least_size: as given.
        trained_seconds: training so far.

    Example:
        >>> budget = OverheadBudget(max_overhead=0.05, planned_steps=10)
        >>> for _ in range(190):
        ...     budget.saw_batch(0.1)
        ...     budget.earn(0.1)
        >>> round(budget.predicted_seconds, 6), round(budget.affordable_seconds, 6)
        (1.0, 1.0)
        >>> OverheadBudget(max_overhead=0.05, planned_steps=10, least_size=0.2).wanted_size
        0.2
    """

    def __init__(self, max_overhead: float, planned_steps: int = 1, least_size: float = 1.0) -> None:
        remedy = "must lie between 0 and 1, such as 0.05 for 5 % of wall-clock; None for no bound."
        check_number("max_overhead", max_overhead, False, lambda share: 0 < share < 1, remedy)
        if not 0 < least_size <= 1:
            raise ValueError(f"least_size={least_size}: must be a share of a full firing, above 0 and at most 1.")
        self.max_overhead = max_overhead
        self.planned_steps, self.least_size = planned_steps, least_size
        self.forget()

    def forget(self) -> None:
        """An empty ledger, as of a run that has not begun."""
        self.trained_seconds = 0.0
        self._credit = 0.0
        self._costs: deque[tuple[float, float]] = deque(maxlen=RECENT_FIRINGS)
        self._batches: deque[float] = deque(maxlen=RECENT_BATCHES)
        self._asked: Optional[tuple[int, float]] = None

    @property
    def rate(self) -> float:
        """Seconds of credit for a second of training."""
        return self.max_overhead / (1 - self.max_overhead)

    @property
    def predicted_seconds(self) -> float:
        """What a full firing is expected to take; infinite before anything was seen."""
        if self._costs:
            return max(seconds / size for seconds, size in self._costs)
        return self.planned_steps * median(self._batches) if self._batches else math.inf

    @property
    def affordable_seconds(self) -> float:
        """How long a firing may take now without breaking the bound."""
        return max(0.0, min(self._credit, CAP * self.predicted_seconds))

    @property
    def wanted_size(self) -> float:
        """The size that the next firing waits for: the smallest at first, then twice the last one, at most 1."""
        return min(1.0, max(self.least_size, 2 * self._costs[-1][1] if self._costs else 0.0))

    @property
    def awaits_first(self) -> bool:
        """Whether no firing has been paid for yet, and training batches have shown what is expected of the first."""
        return not self._costs and len(self._batches) == RECENT_BATCHES

    @property
    def batches_to_first(self) -> float:
        """Training batches until the credit covers the first firing, as long as they take what they have taken."""
        missing = max(self.wanted_size * self.predicted_seconds - self._credit, 0.0)
        return missing / (self.rate * max(median(self._batches), 1e-9))

    def earn(self, seconds: float) -> None:
        """Training went on for so long."""
        self.trained_seconds += seconds
        self._credit += self.rate * seconds

    def saw_batch(self, seconds: float) -> None:
        """One training batch took so long, with everything that came between it and the one before."""
        self._batches.append(seconds)

    def spend(self, seconds: float, size: float = 1.0) -> None:
        """A firing of this size, a share of the full one, took so long."""
        self._costs.append((seconds, size))
        self._debit(seconds)

    def charge(self, seconds: float) -> None:
        """Measuring took so long beside a firing: what it found was taken up later."""
        self._credit -= seconds

    def fail(self, seconds: float) -> None:
        """A firing took so long and came to nothing.

        It is debited what was predicted at least: one that fails at once would else be tried again at every step. What
        the next one will cost it does not tell.
        """
        predicted = self.wanted_size * self.predicted_seconds
        self._debit(max(seconds, predicted) if math.isfinite(predicted) else seconds)

    def _debit(self, seconds: float) -> None:
        self._credit = min(self._credit - seconds, (CAP - 1) * self.wanted_size * self.predicted_seconds)

    def decide(self, step: int) -> Decision:
        """Whether to fire at this step, and where not, when to ask again.

        Between two questions nothing has to be known or exchanged. The next one is half-way to where the credit is
        expected to suffice, at the pace of the steps since the last question, and never further off than twice those
        steps: a pace that changes is noticed in time, and a long wait takes a handful of questions.

        Args:
            step: optimiser steps done; not below that of an earlier question.
        """
        full = self.predicted_seconds
        # what a full firing may leave over, and not the one that is waited for: a rare candidate is to be a large one
        self._credit = min(self._credit, CAP * full)
        missing = self.wanted_size * full - self._credit
        ahead = 1
        if 0 < missing < math.inf and self._asked is not None and step > self._asked[0]:
            steps = step - self._asked[0]
            pace = (self.trained_seconds - self._asked[1]) / steps
            ahead = max(1, int(min(missing / (2 * self.rate * max(pace, 1e-9)), 2 * steps)))
        self._asked = (step, self.trained_seconds)
        size = self.wanted_size
        if missing <= 0 and full > 0:
            size = max(size, min(1.0, self.affordable_seconds / full))
        return Decision(missing <= 0, step + ahead, self._credit, size * full, size)

    def state_dict(self) -> dict[str, Any]:
        """The ledger as plain types; how fast batches are is seen anew after a resume, maybe on another machine."""
        return {"credit": self._credit, "trained": self.trained_seconds, "costs": [list(c) for c in self._costs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a ledger; time that has passed since it was written counts for nothing."""
        self.forget()
        self._credit = float(state["credit"])
        self.trained_seconds = float(state["trained"])
        self._costs.extend((float(seconds), float(size)) for seconds, size in state["costs"])


__all__ = ["Decision", "OverheadBudget"]
