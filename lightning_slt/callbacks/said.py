"""Who says something, and that what is so at every firing of a run is said at the first of them."""

from __future__ import annotations

from typing import Optional

from lightning_slt.warned import speaker, warn


class Voice:
    """One callback of a trainer, where it says something: who it is, and what it has said in this run.

    Args:
        prefix: the group in front of its keys, as far as it is known yet.

    Attributes:
        failures: steps whose measurement failed in this run, as far as this process has seen it.

    Example:
        >>> voice = Voice("slt_2")
        >>> voice.who, voice.called("num_samples=None"), voice.first("full"), voice.first("full")
        ('SLTMonitor (slt_2)', 'SLTMonitor(num_samples=None) (slt_2)', True, False)
    """

    def __init__(self, prefix: str = "slt") -> None:
        self.prefix = prefix
        self._topics: set[str] = set()
        self._failure: Optional[tuple[int, str]] = None
        self.failures: list[int] = []

    @property
    def who(self) -> str:
        """What it calls itself."""
        return speaker(self.prefix)

    def called(self, arguments: str) -> str:
        """The same with the arguments that are meant."""
        return speaker(self.prefix, arguments)

    def first(self, topic: str) -> bool:
        """Whether something is said for the first time in this run; from then on it has been."""
        new = topic not in self._topics
        self._topics.add(topic)
        return new

    def failed(self, step: int, reason: str, goes_on: bool = True) -> None:
        """A step that fails in chains fails at every firing: the whole reason is said once, not at each of them.

        Args:
            step: that is left out.
            reason: why.
            goes_on: whether training is known to go on; what answers a signal may end it.
        """
        self.failures.append(step)
        training = "; training goes on" if goes_on else ""
        left_out = f"{self.who}: the measurement at step {step} failed and is left out"
        if self._failure is not None and self._failure[1] == reason:
            warn(f"{left_out}, for the reason given at step {self._failure[0]}{training}.")
            return
        self._failure = (step, reason)
        warn(f"{left_out}{training}. {reason}")

    def forget(self) -> None:
        """Another run has been told nothing."""
        self._topics.clear()
        self._failure = None
        self.failures = []


__all__ = ["Voice"]
