"""What is so at every firing of a run is said at the first of them."""

from __future__ import annotations


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
