"""The wall-clock of a run, and what of it measuring takes.

Everything that is not measuring is the run to its user: validation, loading data and checkpoints as much as batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Optional

from lightning_slt.callbacks.overhead import OverheadBudget


class RunClock:
    """Seconds of a run and of its measurements, over all of its fits, and the ledger of the budget where there is one.

    Args:
        budget: credited with what training takes and debited what measuring does; None where cadence alone decides.

    Attributes:
        measured_seconds: what measuring has taken so far.

    Example:
        >>> clock = RunClock()
        >>> clock.start()
        >>> begin = clock.now()
        >>> clock.took(begin)
        >>> 0 <= clock.measured_seconds <= clock.run_seconds
        True
    """

    def __init__(self, budget: Optional[OverheadBudget] = None) -> None:
        self.budget = budget
        self._others: tuple[RunClock, ...] = ()
        self._started: Optional[float] = None
        self._earned_until: Optional[float] = None
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """For strategies that spawn: another process has another clock."""
        return {**self.__dict__, "_others": (), "_started": None, "_earned_until": None}

    @staticmethod
    def now() -> float:
        """Seconds, of which only differences mean something."""
        return time.monotonic()

    @property
    def run_seconds(self) -> float:
        """Of all fits of this run, up to now."""
        return self._run_seconds if self._started is None else time.monotonic() - self._started

    def forget(self) -> None:
        """Another run, of which no time has passed."""
        self.measured_seconds, self._run_seconds = 0.0, 0.0
        if self.budget is not None:
            self.budget.forget()

    def start(self, earns: bool = False, others: Iterable[RunClock] = ()) -> None:
        """A fit begins; what passed since the last one, or since a crash, is nobody's.

        Args:
            earns: whether training earns credit from now on, where there is a budget.
            others: those of other monitors of the same run, for which this one's measuring is no training either.
        """
        now = time.monotonic()
        self._started = now - self._run_seconds
        self._others = tuple(other for other in others if other is not self)
        self._earned_until = now if earns else None

    def stop(self) -> None:
        """A fit is over: what comes between two of them is neither training nor measuring."""
        if self._started is not None:
            self.earn()
            self._run_seconds = time.monotonic() - self._started
            self._started = self._earned_until = None
            self._others = ()

    def earn(self) -> float:
        """Credit the budget with the time since it was last credited, and return it; 0 where nothing is earned."""
        if self.budget is None or self._earned_until is None:
            return 0.0
        now = time.monotonic()
        seconds, self._earned_until = now - self._earned_until, now
        self.budget.earn(seconds)
        return seconds

    def saw_batch(self) -> None:
        """A training batch is over."""
        if self.budget is not None and self._earned_until is not None:
            self.budget.saw_batch(self.earn())

    def took(self, begin: float, size: Optional[float] = None, failed: bool = False) -> None:
        """What measuring has cost since ``begin``, a firing that came to nothing too.

        Args:
            begin: of :meth:`now`.
            size: of the firing that it was; None for other work of measuring, which says nothing of the next firing.
            failed: it came to nothing.
        """
        seconds = time.monotonic() - begin
        self.measured_seconds += seconds
        for clock in (self, *self._others):
            # measuring is no training, which earns credit: neither for this monitor nor for another one
            if clock._earned_until is not None:
                clock._earned_until += seconds
        if self.budget is None or self._earned_until is None:
            return
        if failed:
            self.budget.fail(seconds)
        elif size is None:
            self.budget.charge(seconds)
        else:
            self.budget.spend(seconds, size)

    def overhead(self, begin: float) -> float:
        """Share of the run's wall-clock that measuring has taken, with the firing that goes on since ``begin``."""
        now = time.monotonic()
        run = now - (self._started if self._started is not None else begin)
        return (self.measured_seconds + now - begin) / max(run, 1e-9)

    def overhead_at_end(self, done: float, firings: int, seconds: float) -> float:
        """Share that measuring will have had of the whole run, where the rest of it goes on as before.

        Other monitors' firings count as what they have taken so far.

        Args:
            done: share that is behind of the steps that this clock sees, above 0.
            firings: still to come.
            seconds: of each.
        """
        others = sum(other.measured_seconds for other in self._others)
        measured = self.measured_seconds + firings * seconds
        training = max(self.run_seconds - self.measured_seconds - others, 0.0) / done
        return measured / max(measured + others + training, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """The time so far as plain types."""
        self.earn()
        return {
            "seconds": self.measured_seconds,
            "run_seconds": self.run_seconds,
            "budget": self.budget.state_dict() if self.budget is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; a run that had no budget leaves the one there is as it is."""
        self.measured_seconds = float(state["seconds"])
        self._run_seconds = float(state["run_seconds"])
        if self.budget is not None and state.get("budget") is not None:
            self.budget.load_state_dict(state["budget"])


__all__ = ["RunClock"]
