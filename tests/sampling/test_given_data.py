"""What users hand over as data: which of it are samples, how many there are, and that it is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_slt.sampling.batches import (
    DatasetSource,
)
from lightning_slt.sampling.given_data import source_of, uniform_samples
from tests.sampling.helpers import CPU, Stream, numbered, uses


def test_kinds_of_data() -> None:
    assert source_of(numbered(10), None, CPU, 0).batch_size == 10
    assert source_of(numbered(100), None, CPU, 0).batch_size == 64
    loader = DataLoader(numbered(100), batch_size=16, shuffle=True)
    assert (source_of(loader, None, CPU, 0).batch_size, source_of(loader, 8, CPU, 0).batch_size) == (16, 8)
    full = source_of(loader, None, CPU, 0, full_batch=True)
    assert full.batch_size == 100 and len(full.window(0)) == 1
    assert source_of([torch.zeros(2)] * 6, 3, CPU, 0).num_samples == 6
    assert source_of(Stream(), 5, CPU, 0).num_samples is None
    assert source_of(DataLoader(Stream(), batch_size=5), None, CPU, 0, 77).num_samples == 77


def text(*shape: int) -> dict[str, Tensor]:
    """What a tokeniser gives, of this shape."""
    return {"input_ids": torch.ones(shape).long(), "attention_mask": torch.ones(shape), "labels": torch.ones(shape)}


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (text(9), False),
        (text(4, 9), True),
        ({"pixels": torch.zeros(4, 9), "labels": torch.zeros(4).long()}, True),
        ({"x": torch.zeros(4), "labels": torch.zeros(4).long()}, True),
    ],
    ids=["a text", "texts", "pictures", "numbers"],
)
def test_a_tokenised_text_is_a_sample_and_not_a_batch(
    item: dict[str, Tensor], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert source_of([item] * 6, 3, CPU, 0).num_samples == 6
    assert ("looks like a batch" in caplog.text) is said


def test_what_a_sample_of_a_listed_loader_is_says_its_collate_function(caplog: pytest.LogCaptureFixture) -> None:
    """Pairs of two equal lengths may be batches in a list alone; n that is given makes no batches of them either."""
    loader = DataLoader([(torch.ones(9), torch.ones(9))] * 6, batch_size=3)
    for n in (None, 60):
        source = source_of(loader, None, CPU, 0, n)
        assert (source.num_samples, source.batch_size, source.window(0)[0][0].shape) == (n or 6, 3, (3, 9))
    assert not caplog.records


class Own(BatchSampler):
    """A class of its own, which may do anything."""


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (BatchSampler(RandomSampler(range(20)), 4, False), (True, None)),
        (BatchSampler(SequentialSampler(range(20)), 4, True), (True, None)),
        (BatchSampler(DistributedSampler(range(20), 2, 0), 4, False), (True, None)),
        (BatchSampler(SubsetRandomSampler([3, 5]), 2, False), (True, [3, 5])),
        (BatchSampler(RandomSampler(range(8)), 4, False), (True, range(8))),
        (BatchSampler(WeightedRandomSampler([1.0] * 20, 20), 4, False), (False, None)),
        (BatchSampler(range(20), 4, False), (False, None)),
        (Own(RandomSampler(range(20)), 4, False), (False, None)),
        ([[0, 1], [2, 3]], (False, None)),
    ],
    ids=["random", "in order", "of a rank", "subset", "front", "weighted", "a range", "another class", "a list"],
)
def test_torchs_own_batch_sampler_is_as_uniform_as_the_sampler_in_it(sampler: Any, expected: Any) -> None:
    loader = DataLoader(numbered(20), batch_sampler=sampler)
    assert uniform_samples(loader) == expected
    uniform, indices = expected
    source = source_of(loader, None, CPU, 0)
    assert isinstance(source, DatasetSource) is uniform
    if uniform:
        n = 20 if indices is None else len(indices)
        assert (source.num_samples, source.batch_size) == (n, sampler.batch_size)
        assert set(uses(source)) == set(range(20) if indices is None else indices)


class RandomOfTorchdata(Sampler[int]):
    """As torchdata has it: no class of torch's, with the attributes of one."""

    def __init__(self, data_source: Any) -> None:
        self.data_source, self.replacement = data_source, False

    def __len__(self) -> int:
        return len(self.data_source)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(self)).tolist())


def of_torchdata(kind: type[Any], name: str) -> type[Any]:
    return type(name, (kind,), {"__module__": "torchdata.stateful_dataloader.sampler"})


@pytest.mark.parametrize(
    ("kind", "name", "arguments", "uniform"),
    [
        (RandomOfTorchdata, "RandomSampler", (range(20),), True),
        (DistributedSampler, "StatefulDistributedSampler", (range(20), 2, 0), True),
        (RandomOfTorchdata, "AnotherSampler", (range(20),), False),
    ],
)
def test_a_loader_that_can_be_resumed_within_an_epoch_has_a_dataset(
    kind: type[Any], name: str, arguments: tuple[Any, ...], uniform: bool
) -> None:
    """StatefulDataLoader has samplers of its own: its batches were replayed, n grew, and ``probe=`` was refused."""
    sampler = of_torchdata(kind, name)(*arguments)
    loader = of_torchdata(DataLoader, "StatefulDataLoader")(
        numbered(20), batch_sampler=of_torchdata(BatchSampler, "BatchSampler")(sampler, 4, False)
    )
    assert uniform_samples(loader) == (uniform, None)
    source = source_of(loader, None, CPU, 0)
    assert isinstance(source, DatasetSource) is uniform
    if uniform:
        assert (source.num_samples, source.batch_size) == (20, 4)
        assert set(uses(source)) == set(range(20))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_torchdata_itself(num_workers: int) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    for shuffle in (False, True):
        loader = torchdata.StatefulDataLoader(numbered(20), 4, shuffle=shuffle, num_workers=num_workers)
        assert uniform_samples(loader) == (True, None)


class Made(IterableDataset[Any]):
    """Gives what it was given, in order."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def pairs(*lengths: int) -> list[Any]:
    return [(torch.zeros(n, 6), torch.zeros(n).long()) for n in lengths]


@pytest.mark.parametrize(
    ("items", "n", "batch"),
    [
        (pairs(8, 8, 8, 3), 27, 8),
        (pairs(8) * 300, 2400, 8),
        (pairs(1, 1, 1), 3, 1),
        ([(torch.zeros(6), torch.tensor(1))] * 5, 5, 1),
        ([(torch.zeros(6), 1)] * 5, 5, 1),
        ([text(9)] * 5, 5, 1),
        ([text(4, 9)] * 5, 20, 4),
        ([torch.zeros(4, 9)] * 5, None, 4),
        ([(torch.zeros(4, 9), torch.zeros(3))] * 5, None, 4),
    ],
    ids=["last one smaller", "many", "of one", "samples", "numbers", "texts", "batched texts", "one tensor", "unlike"],
)
@pytest.mark.parametrize("kind", [list, Made])
def test_where_the_dataset_makes_the_batches_n_counts_their_samples(
    kind: Callable[[list[Any]], Any], items: list[Any], n: int | None, batch: int
) -> None:
    loader = DataLoader(kind(items), batch_size=None)
    source = source_of(loader, None, CPU, 0)
    assert (source.num_samples, source.batch_size) == (n, batch)
    assert source_of(loader, None, CPU, 0, 77).num_samples == 77


def test_of_a_subset_of_batches_n_is_that_of_the_subset() -> None:
    loader = DataLoader(pairs(8) * 5, batch_size=None, sampler=SubsetRandomSampler([1, 3]))  # type: ignore[arg-type]
    assert source_of(loader, None, CPU, 0).num_samples == 16


@pytest.mark.parametrize("data", [TensorDataset(torch.empty(0, 2)), [], DataLoader(TensorDataset(torch.empty(0, 2)))])
def test_no_data(data: Any) -> None:
    with pytest.raises(ValueError, match=r"data: the dataset is empty"):
        source_of(data, None, CPU, 0)


def test_no_batches() -> None:
    with pytest.raises(ValueError, match=r"data: the iterable gave no batch"):
        source_of(iter([]), None, CPU, 0)


@pytest.mark.parametrize("data", [3, None, object()])
def test_no_kind_of_data(data: Any) -> None:
    with pytest.raises(TypeError, match=r"data: expected a Dataset, a DataLoader or an iterable.*got"):
        source_of(data, None, CPU, 0)


def test_the_loader_itself_is_never_iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> Any:
        raise AssertionError("this is the iterator that training reads")

    loader = DataLoader(numbered(32), batch_size=8)
    monkeypatch.setattr(loader, "_get_iterator", read)
    assert len(source_of(loader, None, CPU, 0).window(0)) == 4


class Doubling(DataLoader[Any]):
    """Its batches are others than those that its dataset and its collate function give."""

    def __iter__(self) -> Any:
        return ([2 * column for column in batch] for batch in super().__iter__())


def test_a_loader_that_iterates_in_its_own_way_is_read_as_it_is() -> None:
    plain, doubled = (source_of(kind(numbered(32), batch_size=8), None, CPU, 0) for kind in (DataLoader, Doubling))
    assert (doubled.num_samples, doubled.batch_size) == (plain.num_samples, plain.batch_size) == (32, 8)
    totals = [sum(float(batch[0].sum()) for batch in source.window(0).batches[:4]) for source in (plain, doubled)]
    assert totals == [sum(range(32)), 2 * sum(range(32))]


def test_the_order_of_the_loaders_generator_is_not_moved() -> None:
    own = torch.Generator().manual_seed(3)
    before = own.get_state()
    source_of(DataLoader(numbered(32), batch_size=8, shuffle=True, generator=own), None, CPU, 0).window(0)
    assert torch.equal(own.get_state(), before)
