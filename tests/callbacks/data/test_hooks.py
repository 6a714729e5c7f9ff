"""The hooks of a DataModule begin every minibatch as training has left them, and are copied once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule

from lightning_slt.callbacks.data.hooks import DataHooks
from lightning_slt.sampling.belongings import MAX_ITEMS


class Counting(LightningDataModule):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.rows: list[Any] = [torch.full((2,), float(i)) for i in range(length)]
        self.losses: dict[int, Any] = {i: np.zeros(2) for i in range(length)}
        self.numbers, self.scale, self.count = set(range(length)), torch.tensor(1.0), 0
        self.rng, self.numpy, self.python = torch.Generator(), np.random.default_rng(0), random.Random(0)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Writes to everything, to some of it at every second batch only, and gives what it has found."""
        sums = float(self.rows[0].sum()), float(self.losses[1].sum()), float(self.scale)
        found = self.count, len(self.rows), len(self.losses), len(self.numbers), *sums, hasattr(self, "new")
        drawn = float(torch.rand((), generator=self.rng)), self.numpy.random(), self.python.random()
        self.count += 1
        self.scale.mul_(2)
        self.numbers ^= {0, -1, -2}
        if batch % 2 == 0:
            self.rows[0], self.losses[1] = torch.ones(2), np.ones(2)
        else:
            self.rows.append(batch)
            del self.losses[0]
            self.new = batch
        return found, drawn


@pytest.mark.parametrize("length", [5, MAX_ITEMS + 1], ids=["short", "long"])
def test_each_minibatch_finds_what_training_has_left(length: int) -> None:
    live = Counting(length)
    hooks = DataHooks(live)
    seen = [hooks.for_a_batch().on_after_batch_transfer(number, 0) for number in range(6)]
    assert {found for found, _ in seen} == {(0, length, length, length, 0.0, 0.0, 1.0, False)}
    assert len({number for _, drawn in seen for number in drawn}) == 18
    assert (live.count, len(live.rows), len(live.losses), live.numbers) == (0, length, length, set(range(length)))
    assert float(live.rows[0].sum()) == float(live.losses[1].sum()) == 0 and float(live.scale) == 1
    assert torch.rand((), generator=live.rng) == torch.rand((), generator=torch.Generator())


@pytest.mark.parametrize("length", [5, MAX_ITEMS + 1], ids=["short", "long"])
def test_lists_are_not_made_anew_for_each_minibatch(length: int) -> None:
    live = Counting(length)
    hooks = DataHooks(live)
    twins = [hooks.for_a_batch() for _ in range(6)]
    held = {(id(twin.rows), id(twin.losses), id(twin.numbers)) for twin in twins}
    assert len(held) == 1 and not held & {(id(live.rows), id(live.losses), id(live.numbers))}


def test_the_order_of_a_dict_is_put_back() -> None:
    """Of one that forgets what was used longest ago."""
    live = Counting(5)
    hooks = DataHooks(live)
    twin = hooks.for_a_batch()
    twin.losses[0] = twin.losses.pop(0)
    assert list(twin.losses) == [1, 2, 3, 4, 0]
    assert list(hooks.for_a_batch().losses) == list(live.losses) == [0, 1, 2, 3, 4]


def test_what_hooks_draw_follows_from_the_global_generator() -> None:
    """A firing is the same whatever was drawn before it."""
    hooks = DataHooks(Counting(5))
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append([hooks.for_a_batch().on_after_batch_transfer(number, 0)[1] for number in range(3)])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3


def test_a_long_list_that_grows_late_is_put_back_at_once() -> None:
    """Its contents are looked at after 1, 3, 7 minibatches; its length at every one."""
    live = Counting(MAX_ITEMS + 1)
    hooks = DataHooks(live)
    for _ in range(4):
        twin = hooks.for_a_batch()
    twin.rows.append(0)
    assert len(hooks.for_a_batch().rows) == len(live.rows) == MAX_ITEMS + 1
