"""Ranks that run chains of their own: whose n is theirs, and what is said where their data differs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.utils.data import TensorDataset

from lightning_slt.callbacks.distribution import is_sharded, make_collective, share_batches, weights_to_keep
from lightning_slt.sampling.batches import DatasetSource, MinibatchSource, ReplaySource
from lightning_slt.sampling.collective import Alone, Together
from lightning_slt.sampling.common_batches import CommonBatches


class Ranks:
    """The second of two ranks, where the first one has another source; else the first."""

    world_size = 2

    def __init__(self, first: Optional[MinibatchSource] = None) -> None:
        self.rank, self._first = int(first is not None), first

    def exchange(self, work: Callable[[], Any]) -> list[Any]:
        own = work()
        return [(self._first.num_samples, self._first.given) if self._first is not None else own, own]

    def arrive(self, alone: bool) -> None: ...


def source(n: int, given: Optional[int] = None) -> DatasetSource:
    made = DatasetSource(TensorDataset(torch.zeros(n, 1)), 4)
    made.given = given
    return made


@pytest.mark.parametrize(
    ("first", "own", "said"),
    [
        (source(40), source(40), None),
        (source(40), source(44), r"different sizes, \[40, 44\], and n = 40 is the first rank's"),
        (source(40), source(36), r"different sizes, \[40, 36\], and n = 40 is the first rank's"),
        (source(40, 3), source(40, 5), "gives each rank batches of its own, and n counts those of the first"),
        (source(40, 3), source(40, 3), None),
        (source(40), source(40, 5), None),
    ],
    ids=["alike", "more", "fewer", "other batches", "the same batches", "one of them"],
)
def test_the_n_of_the_first_rank_holds_for_all(first: Any, own: Any, said: Optional[str]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert share_batches(own, Ranks(first), "mine") is own  # type: ignore[arg-type]
    assert own.num_samples == 40
    assert len(told) == (said is not None)
    assert said is None or re.search(said, str(told[0].message))


def test_one_rank_may_have_seen_more_batches_than_another() -> None:
    """The n of what was seen so far is the first one's, and nothing is said of it."""
    own, first = (ReplaySource([torch.zeros(4, 1)] * n, 4 * n, 4) for n in (3, 2))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert share_batches(own, Ranks(first)) is own  # type: ignore[arg-type]
    assert own.num_samples == 8 and not told


def test_ranks_with_shards_take_the_first_ones_batches_and_one_alone_its_own() -> None:
    own = source(40)
    assert share_batches(own, Alone()) is own
    shared = share_batches(own, Together(Ranks()))  # type: ignore[arg-type]
    assert isinstance(shared, CommonBatches)
    assert share_batches(shared, Together(Ranks())) is shared  # type: ignore[arg-type]


def test_weights_to_keep_are_those_of_the_first_rank() -> None:
    net: Any = nn.Linear(2, 1)
    for first in (True, False):
        trainer: Any = SimpleNamespace(strategy=SingleDeviceStrategy(), is_global_zero=first, world_size=1)
        assert not is_sharded(trainer) and isinstance(make_collective(trainer), Alone)
        for strategy in (trainer.strategy, ModelParallelStrategy()):
            trainer.strategy = strategy
            kept = weights_to_keep(trainer, net)
            assert set(kept) == ({"weight", "bias"} if first else set())
            assert all(torch.equal(weight, net.state_dict()[name]) for name, weight in kept.items())
        assert is_sharded(trainer)
