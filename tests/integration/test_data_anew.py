"""Data that changes while a model trains: chains follow what is loaded anew or changed in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from lightning_slt.callbacks.data.training import TrainingData
from tests.integration import models
from tests.integration.harness import Scenario, steps_of, tiny_monitor
from tests.integration.models import BATCH, Plain, loaders, tensors


class Reloads(LightningDataModule):
    """Its loader is made anew for every epoch, over the data that ``make`` gives for it."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self.make, self.num_loads = make, 0

    def train_dataloader(self) -> DataLoader[Any]:
        self.num_loads += 1
        data = self.make(self.num_loads)
        return DataLoader(data, BATCH, shuffle=not isinstance(data, IterableDataset))


def reloading(make: Callable[[int], Any]) -> Scenario:
    trainer = lambda: {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}  # noqa: E731
    return Scenario(models.SeesBatch, lambda: {"datamodule": Reloads(make)}, trainer)


def constant(value: int, n: int) -> TensorDataset:
    return TensorDataset(torch.full((n, models.IN), float(value)), torch.arange(n) % models.CLASSES)


def test_chains_follow_data_that_is_loaded_anew(tmp_path: Path) -> None:
    """A curriculum: 8 samples of 1, then 16 of 2, then 24 of 3; n and the batches are those of the epoch."""
    monitor = tiny_monitor(every_n_epochs=1)
    seen: list[set[float]] = []
    publish = monitor._reporting.take_up

    def listens(*arguments: Any) -> None:
        seen.append({float(batch.unique()) for batch in models.CHAIN_SAW})
        models.CHAIN_SAW.clear()
        publish(*arguments)

    monitor._reporting.take_up = listens  # type: ignore[method-assign]
    reloading(lambda number: constant(number, 8 * number)).assert_undisturbed(tmp_path, monitor)
    assert [e.num_samples for e in monitor.estimates] == [8, 16, 24]
    assert seen == [{1.0}, {2.0}, {3.0}]


def test_the_same_data_loaded_anew_is_not_read_again(tmp_path: Path) -> None:
    data = tensors()
    monitor = tiny_monitor(every_n_epochs=1)
    reads: list[int] = []
    original = TrainingData.source

    def counted(self: TrainingData, transfer: Any) -> Any:
        reads.append(1)
        return original(self, transfer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingData, "source", counted)
        reloading(lambda _: data).run(tmp_path, monitor)
    assert len(monitor.estimates) == 3 and len(reads) == 1


class Labelled(Dataset[Any]):
    """Inputs as a tensor, labels as an array, and what is read of it counted."""

    def __init__(self, n: int = 24) -> None:
        self.x, self.y, self.num_reads = tensors(n).tensors[0], np.zeros(n, dtype=np.int64), 0

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Any:
        self.num_reads += 1
        return self.x[index], int(self.y[index])


class Relabels(LightningDataModule):
    """The same dataset at every epoch, which ``change`` has changed in place by then."""

    def __init__(self, change: Callable[[Any, int], None], data: Any) -> None:
        super().__init__()
        self.change, self.train_set, self.num_loads = change, data, 0

    def train_dataloader(self) -> DataLoader[Any]:
        self.change(self.train_set, self.num_loads)
        self.num_loads += 1
        return DataLoader(self.train_set, BATCH, shuffle=True)


def new_labels(data: Labelled, number: int) -> None:
    data.y[:] = number % models.CLASSES


def other_inputs(data: Labelled, number: int) -> None:
    data.x.add_(number)


def replaced(data: Labelled, number: int) -> None:
    data.x, data.y = tensors(8 + number).tensors[0], np.zeros(8 + number, dtype=np.int64)


def inside_a_subset(data: Subset[Any], number: int) -> None:
    new_labels(data.dataset, number)  # type: ignore[arg-type]


def nothing(data: Labelled, number: int) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "data", "reads"),
    [
        pytest.param(new_labels, Labelled, 3, id="labels"),
        pytest.param(other_inputs, Labelled, 3, id="inputs"),
        pytest.param(replaced, Labelled, 3, id="all of it"),
        pytest.param(inside_a_subset, lambda: Subset(Labelled(), range(20)), 3, id="a subset"),
        pytest.param(nothing, Labelled, 1, id="nothing"),
    ],
)
def test_chains_follow_data_that_is_changed_in_place(
    change: Any, data: Callable[[], Any], reads: int, tmp_path: Path
) -> None:
    """Batches of a firing are of the data that training has then; data that is as it was is not read again."""
    monitor = tiny_monitor(every_n_epochs=1)
    sources: list[Any] = []
    original = TrainingData.source

    def kept(self: TrainingData, transfer: Any) -> Any:
        sources.append(original(self, transfer))
        sources[-1].window(0)
        return sources[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingData, "source", kept)
        trainer = lambda: {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}  # noqa: E731
        scenario = Scenario(Plain, lambda: {"datamodule": Relabels(change, data())}, trainer)
        scenario.assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 3 and len(sources) == reads
    expected = data()
    for number, source in enumerate(sources):
        change(expected, number)
        have = {(*x.tolist(), int(y)) for batch in source.window(0).batches for x, y in zip(*batch, strict=True)}
        assert have == {(*x.tolist(), int(y)) for x, y in (expected[i] for i in range(len(expected)))}
        assert monitor.estimates[number].num_samples == len(expected)


def test_labels_that_change_without_a_reload_are_followed(tmp_path: Path) -> None:
    data = Labelled()

    class Module(models.SeesBatch):
        def on_train_epoch_start(self) -> None:
            new_labels(data, self.current_epoch)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch[1].float().unsqueeze(1).expand(-1, models.IN), batch[1]), batch_idx)

    monitor = tiny_monitor(at_steps=[6, 12])
    publish, seen = monitor._reporting.take_up, []

    def listens(*arguments: Any) -> None:
        seen.append({float(value) for batch in models.CHAIN_SAW for value in batch.unique()})
        models.CHAIN_SAW.clear()
        publish(*arguments)

    monitor._reporting.take_up = listens  # type: ignore[method-assign]
    Scenario(Module, lambda: loaders(dataset=data)).run(tmp_path, monitor)
    assert steps_of(monitor) == [6, 12] and seen == [{0.0}, {1.0}]


class ConstantStream(IterableDataset[Any]):
    def __init__(self, value: int) -> None:
        self.samples = constant(value, 24)

    def __iter__(self) -> Iterator[Any]:
        return (self.samples[i] for i in range(24))


def test_a_stream_that_is_loaded_anew_keeps_what_training_has_seen(tmp_path: Path) -> None:
    monitor = tiny_monitor(at_steps=[18], num_samples=100, num_draws=40)
    reloading(ConstantStream).assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [18]
    assert {float(batch.unique()) for batch in models.CHAIN_SAW} == {1.0, 2.0, 3.0}
