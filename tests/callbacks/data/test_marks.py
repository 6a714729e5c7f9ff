"""What counts as a change of a dataset, and what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from lightning_slt.callbacks.data.marks import MAX_SUMMED_BYTES, marks_of, same_marks


class Samples(Dataset[Any]):
    def __init__(self, n: int = 20) -> None:
        self.x, self.y, self.names = torch.zeros(n, 2), np.zeros(n, dtype="datetime64[s]"), [str(i) for i in range(n)]
        self.large = np.zeros(MAX_SUMMED_BYTES // 8 + 1)
        self.seen: list[int] = []
        self.rng, self.num_reads = torch.Generator(), 0
        self.transform, self.mosaic, self.noise, self.split = torch.abs, True, 0.5, "train"

    def __len__(self) -> int:
        return len(self.x)

    def read(self, index: int) -> None:
        """What reading may move on: none of it is data."""
        self.num_reads += 1
        self.seen.append(index)
        torch.rand(1, generator=self.rng)


def holder(data: Any) -> Samples:
    """The samples inside."""
    while not isinstance(data, Samples):
        data = data.datasets[-1] if isinstance(data, ConcatDataset) else data.dataset
    return data


def set_all(**values: Any) -> Callable[[Samples], None]:
    return lambda data: data.__dict__.update(values)


CHANGES: dict[str, tuple[Callable[[Samples], Any], bool]] = {
    "a tensor in place": (lambda data: data.x.add_(1), True),
    "one of its numbers": (lambda data: data.x[3].fill_(1), True),
    "another tensor": (set_all(x=torch.zeros(20, 2)), True),
    "an array in place": (lambda data: data.y.__setitem__(3, np.datetime64("2020-01-01")), True),
    "another array of the same numbers": (lambda data: set_all(y=data.y.copy())(data), True),
    "another list": (lambda data: set_all(names=list(data.names))(data), True),
    "a list that grows": (lambda data: data.names.append("new"), True),
    "another large array": (lambda data: set_all(large=data.large.copy())(data), True),
    "another transform": (set_all(transform=torch.neg), True),
    "no transform": (set_all(transform=None), True),
    "a switch": (set_all(mosaic=False), True),
    "a share": (set_all(noise=0.25), True),
    "a name": (set_all(split="extra"), True),
    "what reading moves on": (lambda data: data.read(3), False),
    "nothing": (lambda data: None, False),
}


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(5)), lambda d: ConcatDataset([Samples(3), d])])
@pytest.mark.parametrize(("change", "seen"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_data_is_seen(change: Callable[[Samples], Any], seen: bool, wrap: Callable[[Any], Any]) -> None:
    data = wrap(Samples())
    before = marks_of(data)
    assert len(before) >= 4
    change(holder(data))
    assert same_marks(before, marks_of(data)) is not seen


def test_another_choice_from_a_dataset_is_a_change() -> None:
    data = Subset(Samples(), [1, 2, 3])
    before = marks_of(data)
    data.indices = [1, 2, 4]
    assert not same_marks(before, marks_of(data))


def test_data_that_is_given_up_is_not_kept() -> None:
    data = Samples()
    before = marks_of(data)
    tensor = next(mark for mark in before if mark.where == "/x")
    assert tensor.of is not None and tensor.of() is data.x
    del data
    assert tensor.of() is None


def test_what_has_no_length_has_marks_all_the_same() -> None:
    class Stream(IterableDataset[Any]):
        def __init__(self) -> None:
            self.table = torch.zeros(3)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.table)

    assert [mark.where for mark in marks_of(Stream())] == ["/table"]
    assert marks_of(object()) == []


def test_data_that_is_put_beside_what_there_was_is_seen() -> None:
    data: Any = TensorDataset(torch.zeros(3))
    before = marks_of(data)
    data.weights = torch.ones(3)
    assert not same_marks(before, marks_of(data)) and not same_marks(marks_of(data), before)
    del data.weights
    assert same_marks(before, marks_of(data))
