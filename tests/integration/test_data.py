"""Every kind of data: training keeps its batches, and chains get the data that training has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_slt.callbacks.data import TrainingData
from tests.integration import models
from tests.integration.harness import Scenario, quiet_trainer, steps_of, tiny_monitor
from tests.integration.models import BATCH, Net, Plain, loaders, tensors


def generated() -> dict[str, Any]:
    """A user's generator for the order, given to the loader and to its sampler."""
    g = torch.Generator().manual_seed(3)
    return loaders(sampler=RandomSampler(tensors(), generator=g), shuffle=False, generator=g)


def weighted() -> dict[str, Any]:
    return loaders(sampler=WeightedRandomSampler(torch.arange(24.0), 24), shuffle=False)


def subset() -> dict[str, Any]:
    return loaders(sampler=SubsetRandomSampler(range(0, 24, 2)), shuffle=False)


def several(make: Callable[[list[Any]], Any]) -> Callable[[], dict[str, Any]]:
    """Two loaders, of 24 and of 12 samples, in a container."""
    return lambda: {"train_dataloaders": make([loaders(n)["train_dataloaders"] for n in (24, 12)])}


DATA: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any], int]] = {
    "persistent workers": (lambda: loaders(num_workers=1, persistent_workers=True), {}, 24),
    "two workers": (lambda: loaders(num_workers=2), {}, 24),
    "user generator": (generated, {}, 24),
    "weighted sampler": (weighted, {}, 24),
    "subset sampler": (subset, {}, 12),
    "stateful iterable dataset": (lambda: loaders(dataset=models.Stream()), {"num_samples": 24}, 24),
    "iterable dataset in a worker": (lambda: loaders(dataset=models.Stream(), num_workers=1), {"num_samples": 24}, 24),
    "dataset with random numbers of its own": (lambda: loaders(dataset=models.OwnsGenerator()), {}, 24),
    "the same in persistent workers": (
        lambda: loaders(dataset=models.OwnsGenerator(), num_workers=1, persistent_workers=True),
        {},
        24,
    ),
    "last batch smaller": (lambda: loaders(23), {}, 23),
    "last batch dropped": (lambda: loaders(23, drop_last=True), {}, 23),
}


@pytest.mark.parametrize(("data", "settings", "n"), DATA.values(), ids=DATA)
def test_training_keeps_its_batches(
    data: Callable[[], dict[str, Any]], settings: dict[str, Any], n: int, tmp_path: Path
) -> None:
    monitor = tiny_monitor(every_n_epochs=1, **settings)
    trace = Scenario(Net, data).assert_undisturbed(tmp_path, monitor)
    assert trace.num_batches == 2 * -(-n // BATCH) or n == 23
    assert len(monitor.estimates) == 2
    assert [e.num_samples for e in monitor.estimates] == [n, n]
    assert all(e.trace.isfinite().all() for e in monitor.estimates)


def test_a_dataset_is_not_moved_on_by_the_chains(tmp_path: Path) -> None:
    """Reads of a dataset that owns its random numbers: those of training, none of the chains."""
    monitor = tiny_monitor()
    trace = Scenario(Net, lambda: loaders(dataset=models.OwnsGenerator())).run(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    assert trace.trainer.train_dataloader.dataset.num_reads == 2 * 24


def test_a_stream_is_read_by_training_only(tmp_path: Path) -> None:
    monitor = tiny_monitor(num_samples=24)
    trace = Scenario(Net, lambda: loaders(dataset=models.Stream())).run(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    assert trace.trainer.train_dataloader.dataset.position == 2 * 24


@pytest.mark.parametrize("containers", [lambda x: dict(zip("ab", x, strict=True)), list], ids=["dict", "list"])
def test_several_loaders_keep_their_structure(containers: Callable[[list[Any]], Any], tmp_path: Path) -> None:
    monitor = tiny_monitor()
    Scenario(models.TwoStreams, several(containers)).assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    assert models.CHAIN_SAW
    assert all(saw == (["a", "b"] if containers is not list else 2) for saw in models.CHAIN_SAW)


@pytest.mark.parametrize("owner", ["module", "datamodule"])
def test_transfer_hooks_are_applied_exactly_once(owner: str, tmp_path: Path) -> None:
    """Zeros become 1 before the transfer and 2 after it; a second time would make 3, 4 or 6 of them."""
    monitor = tiny_monitor()
    if owner == "module":
        scenario = Scenario(models.Augments, lambda: loaders(dataset=models.zeros()))
    else:
        scenario = Scenario(models.SeesBatch, lambda: {"datamodule": models.AugmentingData()})
    scenario.assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    assert {value for batch in models.CHAIN_SAW for value in batch.flatten().tolist()} == {2.0}


def test_replayed_batches_have_been_transferred_once(tmp_path: Path) -> None:
    """The same where batches come from training itself."""

    def stream() -> dict[str, Any]:
        zeros = models.zeros()
        return {"train_dataloaders": DataLoader(zeros, batch_sampler=[[i, i + 1] for i in range(0, 24, 2)])}

    monitor = tiny_monitor()
    Scenario(models.Augments, stream).assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12, 16, 20, 24]
    assert {value for batch in models.CHAIN_SAW for value in batch.flatten().tolist()} == {2.0}


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
    """300 draws over 24 samples reach every one of them, none twice as often as another."""
    monitor = tiny_monitor(every_n_epochs=2, num_chains=1, num_draws=600)
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


# ------------------------------------------------------------------------------------------ data that is loaded anew


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
    publish = monitor._take_up

    def listens(*arguments: Any) -> None:
        seen.append({float(batch.unique()) for batch in models.CHAIN_SAW})
        models.CHAIN_SAW.clear()
        publish(*arguments)

    monitor._take_up = listens  # type: ignore[method-assign]
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


def test_workers_beside_training_say_that_they_do_not_follow(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, reload_dataloaders_every_n_epochs=1, max_epochs=1)
    monitor = tiny_monitor(execution="background")
    trainer.fit(Plain(), datamodule=Reloads(lambda number: tensors(8 * number)))
    monitor._data = monitor._data_of(trainer)
    trainer.fit_loop._combined_loader = CombinedLoader(DataLoader(tensors(16), BATCH, shuffle=True))
    with pytest.warns(UserWarning, match=r"execution='background'.*loaded anew and is other data"):
        monitor.on_train_epoch_start(trainer, trainer.lightning_module)
