"""How ranks that share the chains of a firing agree; alone, everything is its own answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Collective(Protocol):
    """Work done on every rank, with the results of all ranks handed to each.

    Attributes:
        rank, world_size: who this is and how many share the chains.
    """

    rank: int
    world_size: int

    def exchange(self, work: Callable[[], T]) -> list[T]:
        """Do ``work`` here and return the results of all ranks in rank order.

        Raises:
            Exception: on *every* rank where the work failed on any, so that no rank waits for one that is gone.
        """


class Alone:
    """A world of one."""

    rank = 0
    world_size = 1

    def exchange(self, work: Callable[[], T]) -> list[T]:
        return [work()]


def own_chains(num_chains: int, collective: Collective) -> list[int]:
    """The numbers of the chains that this rank runs."""
    return list(range(collective.rank, num_chains, collective.world_size))
