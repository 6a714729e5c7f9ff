"""Who says something, and that what is so at every firing of a run is said at the first of them."""

from __future__ import annotations


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


class Said:
    """What a run has been told already, by topic.

    Example:
        >>> said = Said()
        >>> said.first("full"), said.first("full"), said.first("notes")
        (True, False, True)
    """

    def __init__(self) -> None:
        self._topics: set[str] = set()

    def first(self, topic: str) -> bool:
        """Whether it is said for the first time; from then on it has been."""
        new = topic not in self._topics
        self._topics.add(topic)
        return new

    def forget(self) -> None:
        """Another run has been told nothing."""
        self._topics.clear()


__all__ = ["Said", "speaker"]
