"""Ranks that run every chain together: what each tells the others, and when it waits for one that may not come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_slt.sampling.collective import RankLostError, Together


class Ranks:
    """One rank of two, of which the other always says ``"theirs"`` and has the same tensors."""

    world_size = 2

    def __init__(self, rank: int, lost: bool = False) -> None:
        self.rank, self._lost = rank, lost
        self.arrived: list[bool] = []
        self.sent: list[Any] = []

    def arrive(self, alone: bool) -> None:
        self.arrived.append(alone)
        if self._lost:
            raise RankLostError("rank 1 has not come.")

    def exchange(self, work: Callable[[], Any]) -> list[Any]:
        self.sent.append(work())
        return ["theirs", self.sent[-1]] if self.rank else [self.sent[-1], "theirs"]

    def add(self, values: Tensor) -> Tensor:
        return values.mul_(2)


@pytest.mark.parametrize(("rank", "sent", "found"), [(0, "mine", "mine"), (1, None, "theirs")])
def test_what_the_first_rank_says_holds_and_no_other_sends_anything(rank: int, sent: Any, found: str) -> None:
    ranks = Ranks(rank)
    together = Together(ranks)
    assert (together.rank, together.world_size) == (0, 1)
    assert together.exchange(lambda: "mine") == [found] and ranks.sent == [sent]
    assert together.add(torch.tensor([1.5])).tolist() == [3.0]
    assert ranks.arrived == [False, False]


def fail() -> None:
    raise ValueError("no loss")


@pytest.mark.parametrize("in_pass", [False, True])
def test_a_failure_waits_for_the_others_only_where_they_may_be_in_a_pass(in_pass: bool) -> None:
    """One before the passes begin does so on a rank alone too, and the others come to the exchange by themselves."""
    ranks = Ranks(0)
    together = Together(ranks)

    def work() -> None:
        if in_pass:
            together.begin_pass()
        fail()

    with pytest.raises(ValueError, match="no loss"):
        together.exchange(work)
    assert ranks.arrived == [in_pass]
    together.begin_pass()  # of the stretch before
    with pytest.raises(ValueError, match="no loss"):
        together.exchange(fail)
    assert ranks.arrived == [in_pass, False]


def test_a_sum_after_a_pass_that_was_broken_off_waits_for_the_others_until_the_next_exchange() -> None:
    ranks = Ranks(0)
    together = Together(ranks)
    together.break_off()
    together.add(torch.ones(1))
    together.exchange(lambda: None)
    together.add(torch.ones(1))
    assert ranks.arrived == [True, False, False]


def test_a_rank_that_does_not_come_is_named_with_what_failed_here() -> None:
    together = Together(Ranks(0, lost=True))
    with pytest.raises(RankLostError, match=r"rank 1 has not come\. This rank failed with ValueError: no loss") as told:
        together.exchange(fail)
    assert isinstance(told.value.__cause__, ValueError)
    for work in (lambda: together.exchange(lambda: 1), lambda: together.add(torch.ones(1))):
        with pytest.raises(RankLostError, match=r"rank 1 has not come\.$"):
            work()


def test_nobody_is_waited_for_by_a_rank_that_has_found_another_one_lost() -> None:
    ranks = Ranks(0)

    def lose() -> None:
        raise RankLostError("the first rank is gone.")

    with pytest.raises(RankLostError, match=r"the first rank is gone\.$"):
        Together(ranks).exchange(lose)
    assert ranks.arrived == []
