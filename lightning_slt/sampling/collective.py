"""How ranks that share the chains of a firing agree; alone, everything is its own answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional, Protocol, TypeVar

from torch import Tensor

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

    def add(self, values: Tensor) -> Tensor:
        """Add a tensor on the CPU over the ranks, in place, and return it; every rank has the sum."""


class Alone:
    """A world of one."""

    rank = 0
    world_size = 1

    def exchange(self, work: Callable[[], T]) -> list[T]:
        return [work()]

    def add(self, values: Tensor) -> Tensor:
        return values


class Together:
    """Ranks that run every chain together, each with its shard of the weights: as one they are a world of one.

    What is exchanged must be the same on all of them but for rounding; the first one's holds. What belongs to a shard
    stays on its rank.

    Args:
        ranks: all of them.
    """

    rank = 0
    world_size = 1

    def __init__(self, ranks: Collective) -> None:
        self.ranks = ranks

    def exchange(self, work: Callable[[], T]) -> list[T]:
        def mine() -> Optional[T]:
            value = work()
            return value if self.ranks.rank == 0 else None

        return self.ranks.exchange(mine)[:1]  # type: ignore[return-value]

    def add(self, values: Tensor) -> Tensor:
        return self.ranks.add(values)


def own_chains(num_chains: int, collective: Collective) -> list[int]:
    """The numbers of the chains that this rank runs."""
    return list(range(collective.rank, num_chains, collective.world_size))
