"""How ranks that share the chains of a firing agree; alone, everything is its own answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class RankLostError(RuntimeError):
    """A rank is gone, or has left the others in the middle of a pass that needs all of them: none can go on."""


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


class Meeting(Collective, Protocol):
    """Ranks that can also find out that another one does not come."""

    def arrive(self, alone: bool) -> None:
        """Say that this rank has come to the point where all exchange.

        Args:
            alone: something has failed here, perhaps on this rank alone, while the others wait for it in a pass: return
                once all of them have come too.

        Raises:
            RankLostError: where one does not come for a while.
        """


class Together:
    """Ranks that run every chain together, each with its shard of the weights: as one they are a world of one.

    What is exchanged must be the same on all of them but for rounding; the first one's holds. What belongs to a shard
    stays on its rank.

    What fails in passes does so on all ranks as a rule, since they have the same batch and the same weights. Where it
    fails on one alone, the others wait for it inside the module's own collectives, out of our reach: it then gives up
    after a short while, and the run ends on all of them, as it would had a training step failed on one.

    Args:
        ranks: all of them.
    """

    rank = 0
    world_size = 1

    def __init__(self, ranks: Meeting) -> None:
        self.ranks = ranks
        self._in_passes = self._broken_off = False

    def begin_pass(self) -> None:
        """To be called before a pass that all ranks make together: they are in step until they exchange again."""
        self._in_passes = True

    def break_off(self) -> None:
        """To be called where a pass has failed here."""
        self._broken_off = True

    def exchange(self, work: Callable[[], T]) -> list[T]:
        self._in_passes = self._broken_off = False

        def mine() -> Optional[T]:
            try:
                value = work()
            except RankLostError:
                raise
            except Exception as error:
                self._arrive(self._in_passes, error)
                raise
            self._arrive(False)
            return value if self.ranks.rank == 0 else None

        return self.ranks.exchange(mine)[:1]  # type: ignore[return-value]

    def add(self, values: Tensor) -> Tensor:
        self._arrive(self._broken_off)
        return self.ranks.add(values)

    def _arrive(self, alone: bool, error: Optional[Exception] = None) -> None:
        try:
            self.ranks.arrive(alone)
        except RankLostError as lost:
            if error is not None:
                raise RankLostError(f"{lost} This rank failed with {type(error).__name__}: {error}") from error
            raise


def own_chains(num_chains: int, collective: Collective) -> list[int]:
    """The numbers of the chains that this rank runs."""
    return list(range(collective.rank, num_chains, collective.world_size))
