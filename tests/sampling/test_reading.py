"""Datasets are read without being moved on, and what cannot be read is told."""

from __future__ import annotations

import os
import random
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Array, Manager, RawArray, Value
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    Subset,
)

from lightning_slt.sampling.batches import (
    DatasetSource,
    ReplaySource,
)
from lightning_slt.sampling.belongings import MAX_ITEMS
from lightning_slt.sampling.own_memory import MAX_SERVED, MAX_SHARED_BYTES, OwnMemory
from lightning_slt.sampling.reading import is_plain_data
from tests.sampling.helpers import numbered, uses


class Pids(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([os.getpid(), index])


def test_plain_data_is_read_here_and_odd_data_in_a_process_of_its_own() -> None:
    assert is_plain_data(numbered(3)) and is_plain_data(Subset(numbered(3), [0])) and is_plain_data([1, 2])
    assert not is_plain_data(Pids()) and not is_plain_data(Subset(Pids(), [0]))
    pids = {int(row[0]) for b in DatasetSource(Pids(), 4).window(0).batches for row in b}
    assert len(pids) == 1 and os.getpid() not in pids
    read_here: list[int] = []

    def collate(items: list[Any]) -> Tensor:
        read_here.append(os.getpid())
        return torch.stack([x for x, _ in items])

    DatasetSource(numbered(8), 4, collate).window(0)
    assert set(read_here) == {os.getpid()}


class Counting(Dataset[Any]):
    """Draws random numbers of its own and counts accesses: reading it changes it."""

    def __init__(self) -> None:
        self.torch_generator = torch.Generator().manual_seed(1)
        self.python = random.Random(1)
        self.numpy = np.random.default_rng(1)
        self.legacy = np.random.RandomState(1)
        self.accesses = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        self.accesses += 1
        noise = [
            float(torch.rand((), generator=self.torch_generator)),
            self.python.random(),
            self.numpy.random(),
            float(self.legacy.rand()),
        ]
        return torch.tensor(noise)

    def state(self) -> Any:
        return (
            self.torch_generator.get_state().tolist(),
            self.python.getstate(),
            self.numpy.bit_generator.state,
            self.legacy.get_state()[1].tolist(),
        )


@pytest.mark.parametrize("workers", [None, 0])
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(8)), lambda d: ConcatDataset([d, d])])
def test_generators_that_a_dataset_owns_are_put_back(wrap: Any, workers: int | None) -> None:
    data = Counting()
    before = data.state()
    DatasetSource(wrap(data), 4, num_workers=workers).window(0)
    assert data.state() == before
    assert data.accesses == 0 or workers == 0


@pytest.mark.parametrize("workers", [None, 0])
def test_global_generators_that_a_dataset_draws_from_are_put_back_by_the_estimate(workers: int | None) -> None:
    """The source itself reads in a forked process; in this one, preserve_rng is around it (see test_estimate)."""

    class Global(Pids):
        def __getitem__(self, index: int) -> Tensor:
            return torch.rand(2)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    DatasetSource(Global(), 4, num_workers=workers).window(0)
    assert torch.equal(before, torch.get_rng_state()) or workers == 0


class Lines(Pids):
    """Reads on in files, whatever the index, and counts in shared memory."""

    def __init__(self, path: Path) -> None:
        path.write_text("".join(f"{i:0999}\n" for i in range(200)))
        self.files = [path.open("rb"), path.open("rb", buffering=0)]
        self.number, self.tensor = Value("i", 0), torch.zeros(1).share_memory_()

    def __getitem__(self, index: int) -> Tensor:
        self.number.value += 1
        self.tensor += 1
        return torch.tensor([int(file.read(1000)) for file in self.files])


@pytest.mark.parametrize("workers", [None, 2])
def test_files_and_memory_that_a_fork_shares_are_not_moved_on(workers: int | None, tmp_path: Path) -> None:
    """Each worker reads on from where this process is, beyond the block of 8 kB that has been read already."""
    data = Lines(tmp_path / "lines")
    assert data[0].tolist() == [0, 0]
    places = [os.lseek(file.fileno(), 0, os.SEEK_CUR) for file in data.files]
    batches = DatasetSource(Subset(data, [i % 8 for i in range(100)]), 4, num_workers=workers).read_items([0] * 60)
    assert len(batches) == 60 and batches[0].tolist() == [1, 1] and batches[-1].max() >= 30
    assert [os.lseek(file.fileno(), 0, os.SEEK_CUR) for file in data.files] == places
    assert data[0].tolist() == [1, 1] and data.number.value == 2 and float(data.tensor) == 2


class Holder:
    """Without attributes of its own: in slots."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class Transform(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = [held]


Pair = namedtuple("Pair", ["first", "held"])
"""As users write them: a tuple whose items have names."""


def counter(kind: str, manager: Any, memory: SharedMemory) -> tuple[Any, Any]:
    """A number that processes share, and the function that counts it up and returns what it was."""
    if kind == "value":
        return Value("i", 0), lambda v: add_to(v, "value")
    if kind == "raw":
        return RawArray("i", 2), lambda v: add_to(v, 1)
    if kind == "tensor":
        return torch.zeros(2).share_memory_(), lambda v: add_to(v, 1)
    if kind == "array over a number":
        return np.frombuffer(Array("i", 2).get_obj(), dtype=np.int32), lambda v: add_to(v, 1)
    if kind == "array over a tensor":
        return torch.zeros(2).share_memory_().numpy()[1:], lambda v: add_to(v, 0)
    if kind == "array over memory":
        return np.ndarray((2,), dtype=np.int64, buffer=memory.buf), lambda v: add_to(v, 1)
    if kind == "memory":
        return memory, lambda v: add_to(v.buf, 1)
    if kind == "view of memory":
        return memory.buf.cast("q"), lambda v: add_to(v, 1)
    if kind == "dict of a manager":
        return manager.dict(reads=0), lambda v: add_to(v, "reads")
    if kind == "list of a manager":
        return manager.list([0]), lambda v: add_to(v, 0)
    if kind == "number of a manager":
        return manager.Value("i", 0), lambda v: add_to(v, "value")
    return manager.Namespace(reads=0), lambda v: add_to(v, "reads")


def add_to(holder: Any, key: Any) -> int:
    """Count up what is held under ``key``, an attribute or an item."""
    is_attribute = isinstance(key, str) and hasattr(holder, key)
    before = int(getattr(holder, key) if is_attribute else holder[key])
    if is_attribute:
        setattr(holder, key, before + 1)
    else:
        holder[key] = before + 1
    return before


KINDS = [
    "value",
    "raw",
    "tensor",
    "array over a number",
    "array over a tensor",
    "array over memory",
    "memory",
    "view of memory",
    "dict of a manager",
    "list of a manager",
    "number of a manager",
    "namespace of a manager",
]
PLACES: dict[str, tuple[Any, Any]] = {
    "itself": (lambda held: held, lambda place: place),
    "list": (lambda held: [held], lambda place: place[0]),
    "dict of lists": (lambda held: {"a": [1, held]}, lambda place: place["a"][1]),
    "tuple": (lambda held: ("a", (held,)), lambda place: place[1][0]),
    "named tuple": (lambda held: Pair(1, held), lambda place: place.held),
    "object with slots": (Holder, lambda place: place.held),
    "module": (Transform, lambda place: place.held[0]),
    "method of an object": (lambda held: Holder(held).__init__, lambda place: place.__self__.held),
    "subset": (lambda held: Subset(Inside(held, None), [0]), lambda place: place.dataset.place),
}


class Inside(Pids):
    """Counts up what it holds in some place, and gives what was there."""

    def __init__(self, place: Any, count: Any) -> None:
        self.place, self.count = place, count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(self.count(self.place))


@pytest.fixture(scope="module")
def manager() -> Iterator[Any]:
    with Manager() as manager:
        yield manager


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(create=True, size=16)
    yield memory
    with suppress(BufferError):  # an array over it is still held
        memory.close()
    memory.unlink()


@pytest.mark.parametrize(
    ("kind", "place"),
    [*((kind, "list") for kind in KINDS), *((kind, p) for kind in ("value", "tensor") for p in PLACES if p != "list")],
)
def test_what_processes_share_is_not_moved_on_wherever_it_is_held(
    kind: str, place: str, manager: Any, memory: SharedMemory
) -> None:
    """A forked process counts on from here, in memory of its own."""
    put, find = PLACES[place]
    held, count = counter(kind, manager, memory)
    data = Inside(put(held), lambda p: count(find(p)))
    assert int(data[0]) == 0
    read = [int(x) for x in DatasetSource(data, 4).read_items([0] * 5)]
    assert read == [1, 2, 3, 4, 5] and int(data[0]) == 1


def test_what_is_held_twice_has_one_copy() -> None:
    number = Value("i", 0)
    data = Inside([number, {"b": number}], lambda p: add_to(p[0], "value") + 10 * add_to(p[1]["b"], "value"))
    assert int(data[0]) == 10
    assert [int(x) for x in DatasetSource(data, 4).read_items([0] * 3)] == [32, 54, 76]
    assert int(data[0]) == 32 and number.value == 4


def test_data_that_processes_share_is_not_copied(manager: Any) -> None:
    """Long lists, large tensors, and what a manager has many of."""
    long = [torch.zeros(1).share_memory_()] * (MAX_ITEMS + 1)
    large = torch.zeros(MAX_SHARED_BYTES // 4 + 1).share_memory_()
    served = manager.dict(dict.fromkeys(range(MAX_SERVED + 1), 0))
    small = torch.zeros(1).share_memory_()
    data = Inside([long, {"large": large}, served, small], None)
    own = OwnMemory()
    own.give(data)
    assert data.place[0][0] is long[0] and data.place[1]["large"] is large and data.place[2] is served
    assert data.place[3] is not small and not data.place[3].is_shared()
    samples = [torch.zeros(MAX_SHARED_BYTES // 8).share_memory_() for _ in range(4)]  # of half the size each
    data = Inside(list(samples), None)
    OwnMemory().give(data)
    assert [kept is given for kept, given in zip(data.place, samples, strict=True)] == [False, False, True, True]


class Bytes(Pids):
    """Reads on in a file, whatever the index."""

    def __init__(self, file: Any) -> None:
        file.write(bytes(range(100)))
        file.seek(5)
        self.file = file

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(self.file.read(1)[0])


@pytest.mark.parametrize("mode", ["w+b", "a+b", ""])
def test_files_that_are_written_to_as_well_are_not_moved_on(mode: str, tmp_path: Path) -> None:
    """And a temporary one, which may have no name that it could be opened by."""
    with (tmp_path / "bytes").open(mode, buffering=0) if mode else TemporaryFile(buffering=0) as file:
        data = Bytes(file)
        assert int(data[0]) == 5
        batches = DatasetSource(data, 4).read_items([0] * 4)
        assert [int(batch) for batch in batches] == [6, 7, 8, 9] and int(data[0]) == 6


@pytest.mark.parametrize("held", [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()], ids=["coo", "csr"])
def test_sparse_tensors_keep_no_dataset_here(held: Tensor) -> None:
    """They cannot be asked whether they are shared."""
    data = Pids()
    data.held = held  # type: ignore[attr-defined]
    assert int(DatasetSource(data, 4).read_items([0])[0][0]) != os.getpid()


def test_a_dataset_that_cannot_be_read_in_another_process_is_read_here() -> None:
    parent = os.getpid()

    class OnlyHere(Pids):
        def __getitem__(self, index: int) -> Tensor:
            if os.getpid() != parent:
                raise RuntimeError("a handle that does not survive a fork")
            return torch.tensor([index])

    assert uses(ReplaySource([b for b in DatasetSource(OnlyHere(), 4).window(0).batches], 8, 4))
    assert len(DatasetSource(OnlyHere(), 4).window(0)) == 2


def with_a_function(x: Tensor) -> Any:
    return x, lambda: x


def with_a_history(x: Tensor) -> Any:
    return x * torch.ones(1, requires_grad=True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [with_a_function, with_a_history])
def test_samples_that_cannot_be_sent_from_another_process_are_read_here(make: Any) -> None:
    """The queue between processes drops what does not pickle: whoever waits for it would wait for ever."""

    class Unsendable(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            return make(torch.tensor([float(index)]))

    source = DatasetSource(Unsendable(), 2, collate_fn=lambda samples: samples)
    assert len(source.window(0)) == 2
    first = source.read_items([3])[0]
    assert float(first[0] if isinstance(first, tuple) else first) == 3.0


def test_an_error_of_the_dataset_reaches_the_caller() -> None:
    class Broken(Pids):
        def __getitem__(self, index: int) -> Tensor:
            raise KeyError("no such file")

    with pytest.raises(KeyError, match="no such file"):
        DatasetSource(Broken(), 4)


class Texts(Dataset[Tensor]):
    """Of three to five tokens."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(3 + index % 3)


def test_samples_of_different_sizes_are_told_to_be_padded() -> None:
    with pytest.raises(ValueError, match=r"data: its samples are of different sizes.*collate_fn pads them"):
        DatasetSource(Texts(), 4).window(0)
    padded = DatasetSource(Texts(), 4, collate_fn=lambda rows: nn.utils.rnn.pad_sequence(rows, batch_first=True))
    assert padded.window(0)[0].shape[0] == 4
