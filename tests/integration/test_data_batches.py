"""Batches of any structure, and the number of samples n that they show."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    WeightedRandomSampler,
)

from tests.integration import models
from tests.integration.harness import Scenario, steps_of, tiny_monitor
from tests.integration.models import BATCH, Plain, batch_sampled, loaders, tensors, weighted


class Pair:
    """A batch of the user's own class: its tensors are attributes."""

    def __init__(self, samples: list[tuple[Tensor, Tensor]]) -> None:
        self.x, self.y = torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])

    def to(self, device: torch.device) -> Pair:
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


class TakesPairs(Plain):
    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return super().training_step((batch.x, batch.y), batch_idx)


class TakesRows(Plain):
    """A batch is a list of rows of any length; the labels are left out of it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        rows = torch.stack([row[: models.IN] for row in batch])
        return super().training_step((rows, torch.zeros(len(rows), dtype=torch.long)), batch_idx)


def ragged(samples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [torch.cat([x, x.new_zeros(1 + i)]) for i, (x, _) in enumerate(samples)]


class Table(MutableMapping[str, Tensor]):
    """A batch as a tensordict is: a mapping that is not made from its entries alone, and goes to the device itself."""

    def __init__(self, entries: dict[str, Tensor], length: int) -> None:
        self.entries, self.length = entries, length

    @staticmethod
    def collated(samples: list[tuple[Tensor, Tensor]]) -> Table:
        x, y = (torch.stack(list(column)) for column in zip(*samples, strict=True))
        return Table({"x": x, "y": y}, len(samples))

    def to(self, device: torch.device, **_: Any) -> Table:
        return Table({key: value.to(device) for key, value in self.items()}, self.length)

    def __getitem__(self, key: str) -> Tensor:
        return self.entries[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class TakesTables(Plain):
    def training_step(self, batch: Table, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"][: batch.length], batch["y"]), batch_idx)


def in_order_of_its_own() -> dict[str, Any]:
    return {"sampler": WeightedRandomSampler(torch.arange(24.0) + 1, 24), "shuffle": False}


@pytest.mark.parametrize("order", [dict, in_order_of_its_own], ids=["read anew", "replayed"])
def test_a_mapping_with_more_than_its_entries_is_measured_as_its_tensors_are(
    order: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    """Chains made it anew from its entries alone: every firing was left out, for a missing argument."""
    plain, tables = tiny_monitor(), tiny_monitor()
    Scenario(Plain, lambda: loaders(**order())).run(tmp_path / "plain", plain)
    with_tables = Scenario(TakesTables, lambda: loaders(collate_fn=Table.collated, **order()))
    with_tables.assert_undisturbed(tmp_path, tables)
    assert steps_of(tables) == [4, 8, 12]
    assert [(e.mean, e.num_samples) for e in tables.estimates] == [(e.mean, e.num_samples) for e in plain.estimates]


@pytest.mark.parametrize(("module", "collate"), [(TakesPairs, Pair), (TakesRows, ragged)])
def test_replayed_batches_that_are_no_plain_tensors_count_all_their_samples(
    module: Callable[[], Plain], collate: Callable[[Any], Any], tmp_path: Path
) -> None:
    """n had been the number of batches, or the length of a sequence; three batches of 8 are seen before the firing."""
    monitor = tiny_monitor(every_n_train_steps=3)

    def data() -> dict[str, Any]:
        sampler = WeightedRandomSampler(torch.arange(24.0) + 1, 24)
        return loaders(sampler=sampler, shuffle=False, collate_fn=collate, batch_size=8)

    Scenario(module, data).assert_undisturbed(tmp_path, monitor)
    assert {(e.num_samples, e.batch_size) for e in monitor.estimates} == {(24, 8)}


@pytest.mark.parametrize(
    ("data", "settings", "sizes"),
    [
        (batch_sampled, {}, [24, 24, 24, 24]),
        (weighted, {}, [12, 24, 24, 24]),
        (weighted, {"num_samples": 24}, [24, 24, 24, 24]),
    ],
    ids=["batch sampler", "weighted", "weighted, n given"],
)
def test_n_is_one_number_or_its_growth_is_said(
    data: Callable[[], dict[str, Any]], settings: dict[str, Any], sizes: list[int], tmp_path: Path
) -> None:
    """Batches of 4, a firing every 3 of them."""
    monitor = tiny_monitor(every_n_train_steps=3, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(Plain, data).run(tmp_path, monitor)
    assert [e.num_samples for e in monitor.estimates] == sizes
    said = [str(w.message) for w in caught if "hold n fixed" in str(w.message)]
    assert len(said) == (sizes[0] == 12)
    assert all("n = 12 of 24 is the number of samples seen so far" in text for text in said)


class Batches(Dataset[Any]):
    """Gives a whole batch for each number, or a single sample."""

    def __init__(self, size: int | None = BATCH) -> None:
        self.size = size

    def __len__(self) -> int:
        return 24 // (self.size or 1)

    def __getitem__(self, index: int) -> Any:
        return tensors()[index if self.size is None else slice(index * self.size, (index + 1) * self.size)]


class OneTensor(Batches):
    """Its batches do not show whether they are batches: they are one tensor."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0]


class TakesOneTensor(Plain):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step((batch, (batch[:, 0] > 0).long()), batch_idx)


@pytest.mark.parametrize("settings", [{}, {"nbeta": 3.0}], ids=["nbeta of n", "nbeta given"])
@pytest.mark.parametrize(("size", "batch"), [(BATCH, 4), (None, 1)], ids=["batches", "samples"])
def test_n_counts_samples_where_the_dataset_makes_the_batches(
    size: int | None, batch: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """24 samples, in six batches or one by one; n had been the number of batches, or the length of a sample."""
    monitor = tiny_monitor(every_n_epochs=1, **settings)
    data = lambda: {"train_dataloaders": DataLoader(Batches(size), batch_size=None, shuffle=True)}  # noqa: E731
    Scenario(Plain, data).assert_undisturbed(tmp_path, monitor)
    assert [(e.num_samples, e.batch_size) for e in monitor.estimates] == [(24, batch)] * 2


def test_n_counts_samples_where_one_of_several_datasets_makes_its_batches(tmp_path: Path) -> None:
    """The first loader has 12 samples, the second six batches of 4: the longer one says n."""

    def data() -> dict[str, Any]:
        other = DataLoader(Batches(), batch_size=None)
        return {"train_dataloaders": {"a": loaders(12)["train_dataloaders"], "b": other}}

    monitor = tiny_monitor(every_n_epochs=1)
    Scenario(models.TwoStreams, data).run(tmp_path, monitor)
    assert [e.num_samples for e in monitor.estimates] == [24, 24]


@pytest.mark.parametrize(
    ("settings", "sizes"), [({}, []), ({"num_samples": 24}, [24, 24]), ({"nbeta": 3.0}, [None, None])]
)
def test_n_is_asked_for_where_batches_do_not_show_how_many_samples_they_have(
    settings: dict[str, Any], sizes: list[int | None], tmp_path: Path
) -> None:
    monitor = tiny_monitor(every_n_epochs=1, on_failure="warn", **settings)
    data = lambda: {"train_dataloaders": DataLoader(OneTensor(), batch_size=None)}  # noqa: E731
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(TakesOneTensor, data).run(tmp_path, monitor)
    assert [e.num_samples for e in monitor.estimates] == sizes
    said = [str(w.message) for w in caught if "does not show how many samples" in str(w.message)]
    assert bool(said) is (not sizes)
    assert all("Give num_samples= or nbeta=" in text for text in said)


@pytest.mark.parametrize("shuffle", [False, True])
def test_overfit_batches_restricts_n(shuffle: bool, tmp_path: Path) -> None:
    """Two batches of 4 are all that is trained on: n = 8, and chains see no other sample."""
    monitor = tiny_monitor(every_n_train_steps=2)
    scenario = Scenario(models.SeesBatch, lambda: loaders(shuffle=shuffle), lambda: {"overfit_batches": 2})
    trace = scenario.assert_undisturbed(tmp_path, monitor)
    assert trace.num_batches == 4
    assert [e.num_samples for e in monitor.estimates] == [8, 8]
    trained = {tuple(row) for _, s in trace.snapshots if "batch/0" in s for row in s["batch/0"].tolist()}
    measured = {tuple(row) for batch in models.CHAIN_SAW for row in batch.tolist()}
    assert len(trained) == 8
    assert measured <= trained


def test_a_batch_size_of_its_own(tmp_path: Path) -> None:
    monitor = tiny_monitor(batch_size=6)
    Scenario(models.SeesBatch, loaders).run(tmp_path, monitor)
    assert [e.batch_size for e in monitor.estimates] == [6, 6, 6]
    assert {len(batch) for batch in models.CHAIN_SAW} == {6}


def test_chains_use_all_the_data_evenly(tmp_path: Path) -> None:
    """1200 draws over 24 samples reach every one of them, none twice as often as another."""
    monitor = tiny_monitor(every_n_epochs=2, num_chains=1, num_draws=1200)
    Scenario(models.SeesBatch, loaders).run(tmp_path, monitor)
    samples = torch.cat([batch[:, 0] for batch in models.CHAIN_SAW])
    counts = torch.tensor([(samples == x).sum() for x in tensors().tensors[0][:, 0]]).float()
    assert counts.min() > 0.7 * counts.mean() and counts.max() < 1.4 * counts.mean()


def test_a_cold_firing_does_not_depend_on_earlier_ones(tmp_path: Path) -> None:
    often, seldom = (tiny_monitor(every_n_train_steps=n, localization=1.0, warm_start=False) for n in (2, 12))
    for name, monitor in (("often", often), ("seldom", seldom)):
        Scenario(Plain, loaders).run(tmp_path / name, monitor)
    assert len(often.estimates) == 6 and len(seldom.estimates) == 1
    assert torch.equal(often.estimates[-1].trace, seldom.estimates[-1].trace)
