"""Minibatches of ranks that run a chain together: the first one's, and sent only where another rank has others."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.common_batches import CommonBatches, digest_of


class Ranks:
    """The first of two ranks, or with its ``answers`` the second one, a moment later."""

    def __init__(self, differ: bool, answers: list[Any] | None = None) -> None:
        self._differ, self._given = differ, answers
        self.answers: list[Any] = []

    def exchange(self, work: Callable[[], Any]) -> list[Any]:
        self.answers.append(work())
        return self.answers[-1:] if self._given is None else [self._given[len(self.answers) - 1]]

    def add(self, values: Tensor) -> Tensor:
        assert values.tolist() == [float(self._differ and self._given is not None)]
        return torch.tensor([float(self._differ)])


def source(first: int, n: int = 24, max_bytes: int = 2**20) -> DatasetSource:
    return DatasetSource(TensorDataset(torch.arange(first, first + n)), 4, max_bytes=max_bytes)


def both(one: DatasetSource, other: DatasetSource, differ: bool) -> tuple[CommonBatches, CommonBatches, Ranks]:
    first = Ranks(differ)
    told: Any = CommonBatches(one, first)  # type: ignore[arg-type]
    told.window(0), told.window(0), told.window(1)
    second = Ranks(differ, first.answers)
    return told, CommonBatches(other, second), second  # type: ignore[arg-type]


@pytest.mark.parametrize("differ", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_all_ranks_have_the_batches_of_the_first(held: bool, differ: bool) -> None:
    """Which are read again where they are others, and not sent where they are the same."""
    most = 2**20 if held else 64
    first, second, ranks = both(source(0, max_bytes=most), source(100 * differ, 24 + 8 * differ, most), differ)
    assert (second.num_samples, second.batch_size, second.resident) == (24, 4, held)
    each = 1 + differ
    asked = [1]
    for index in (0, 0, 1):
        window = second.window(index)
        asked.append(len(ranks.answers))
        assert second.window(index) is window and len(ranks.answers) == asked[-1]
    assert asked == ([1, 1 + each, 1 + each, 1 + each] if held else [1, 1 + each, 1 + each, 1 + 2 * each])
    for a, b in zip(first.window(1).batches, second.window(1).batches, strict=True):
        assert torch.equal(a[0], b[0]) and int(b[0].max()) < 24


def test_batches_that_were_sent_do_not_stand_beside_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    _, second, _ = both(source(0, max_bytes=64), source(100, max_bytes=64), True)
    sent = weakref.ref(second.window(0))
    read, gone = second._source.window, list[bool]()
    monkeypatch.setattr(second._source, "window", lambda index: gone.append(sent() is None) or read(index))
    second.window(1)
    assert gone == [True]


def test_losses_at_weights_that_have_changed_are_forgotten_and_the_batches_stay() -> None:
    own, ranks = source(0), Ranks(True, [(24, 4, True), b"", ([[torch.arange(4)]], True)])
    made: Any = CommonBatches(own, ranks)  # type: ignore[arg-type]
    for window in (made.window(0), own.window(0)):
        window.anchor_loss[0] = 1.0
    made.forget()
    assert not made.window(0).anchor_loss and not own.window(0).anchor_loss and len(ranks.answers) == 3


def test_batches_are_the_same_where_every_tensor_is() -> None:
    """Its bits, its kind and its shape, also of one that does not lie in one piece; and what is no tensor."""
    x = torch.arange(6.0).reshape(2, 3)
    same = digest_of([{"x": x, "n": 3}])
    assert digest_of([{"x": x.T.contiguous().T, "n": 3}]) == same
    others = [x + torch.tensor([0.0, 0.0, 1e-6]), x.reshape(3, 2), x.view(torch.int32), x.flip(0)]
    assert len({same, digest_of([{"x": x, "n": 4}]), *(digest_of([{"x": other, "n": 3}]) for other in others)}) == 6
