"""Who says something, and that what is so at every firing of a run is said at the first of them."""

from __future__ import annotations

import logging
import warnings
from typing import Optional

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

_log = logging.getLogger(__name__)


def speaker(prefix: str = "slt", arguments: str = "", kind: str = "SLTMonitor") -> str:
    """What a callback calls itself where it says something: with its prefix, where others may speak too.

    Args:
        prefix: the group in front of its keys.
        arguments: those that are meant, as they are written in its call.
        kind: of callback.

    Example:
        >>> print(speaker(), speaker("slt_2"), speaker("slt_2", "num_samples=None"), sep=", ")
        SLTMonitor, SLTMonitor (slt_2), SLTMonitor(num_samples=None) (slt_2)
    """
    return kind + (f"({arguments})" if arguments else "") + ("" if prefix == "slt" else f" ({prefix})")


def warn(message: str, every_rank: bool = False) -> None:
    """Warn, from where it is called, on the first rank: nothing that a callback of ours has to say ends a run.

    Where a filter makes errors of warnings (``-W error``) it is logged, with the level of a warning.

    Args:
        message: what is said.
        every_rank: on the rank that calls, whichever it is.
    """
    try:
        if every_rank:
            warnings.warn(message, stacklevel=3)
        else:
            rank_zero_warn(message, stacklevel=5)
    except Warning:
        _log.warning(message)


class Voice:
    """One callback of a trainer, where it says something: who it is, and what it has said in this run.

    Args:
        prefix: the group in front of its keys, as far as it is known yet.

    Example:
        >>> voice = Voice("slt_2")
        >>> voice.who, voice.called("num_samples=None"), voice.first("full"), voice.first("full")
        ('SLTMonitor (slt_2)', 'SLTMonitor(num_samples=None) (slt_2)', True, False)
    """

    def __init__(self, prefix: str = "slt") -> None:
        self.prefix = prefix
        self._topics: set[str] = set()
        self._failure: Optional[tuple[int, str]] = None

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

    def failed(self, step: int, reason: str) -> None:
        """A step that fails in chains fails at every firing: the whole reason is said once, not at each of them."""
        left_out = f"{self.who}: the measurement at step {step} failed and is left out"
        if self._failure is not None and self._failure[1] == reason:
            warn(f"{left_out}, for the reason given at step {self._failure[0]}; training goes on.")
            return
        self._failure = (step, reason)
        warn(f"{left_out}; training goes on. {reason}")

    def forget(self) -> None:
        """Another run has been told nothing."""
        self._topics.clear()
        self._failure = None


__all__ = ["Voice", "speaker", "warn"]
