"""Every kind of data: training keeps its batches, and chains get the data that training has."""

from __future__ import annotations

import multiprocessing
import random
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
)

from lightning_slt.callbacks.apart import loosened
from lightning_slt.callbacks.data import hooks
from lightning_slt.callbacks.data.own_contents import MAX_COPIED_BYTES
from lightning_slt.callbacks.data.training import training_transfer
from lightning_slt.sampling import batches, reading
from tests.integration import models
from tests.integration.harness import Scenario, nothing_said_of, quiet_trainer, steps_of, tiny_monitor
from tests.integration.models import BATCH, Net, Plain, batch_sampled, loaders, tensors, weighted


def generated() -> dict[str, Any]:
    """A user's generator for the order, given to the loader and to its sampler."""
    g = torch.Generator().manual_seed(3)
    return loaders(sampler=RandomSampler(tensors(), generator=g), shuffle=False, generator=g)


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
    "batch sampler": (batch_sampled, {}, 24),
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


class InArchive(Dataset[Any]):
    """Samples of 6 kB each in an archive that stays open."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for index, (x, y) in enumerate(tensors()):
                archive.writestr(str(index), np.append(x.numpy(), [float(y)] * 1500).astype(np.float32).tobytes())
        self.archive = zipfile.ZipFile(path)

    def __len__(self) -> int:
        return models.SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = torch.frombuffer(bytearray(self.archive.read(str(index))), dtype=torch.float32)
        return row[: models.IN], row[-1].long()


class Counted(InArchive):
    """Samples grow with a number and a tensor that all who read them share, and count up."""

    def __init__(self, path: Path) -> None:
        self.number, self.tensor = multiprocessing.Value("i", 0), torch.zeros(1).share_memory_()
        self.data = tensors()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.number.value += 1
        self.tensor += 1
        x, y = self.data[index]
        return x * (1 + 0.01 * self.number.value + 0.01 * self.tensor), y


class CountedInside(Counted):
    """The same where the number is in an object of a list, the tensor in a dict."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.held = [SimpleNamespace(number=self.number)], {"a": {"tensor": self.tensor}}
        del self.number, self.tensor

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        (counted,), tensors_of = self.held
        counted.number.value += 1
        tensors_of["a"]["tensor"] += 1
        x, y = self.data[index]
        return x * (1 + 0.01 * counted.number.value + 0.01 * tensors_of["a"]["tensor"]), y


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["here", "in a worker"])
@pytest.mark.parametrize("data", [InArchive, Counted, CountedInside])
def test_what_a_fork_shares_is_moved_on_by_training_only(
    data: type[InArchive], workers: dict[str, Any], tmp_path: Path
) -> None:
    """The place in an open file: training would read on from where the chains had stopped, which an archive finds to
    be damaged. And shared memory."""
    scenario = Scenario(Net, lambda: loaders(dataset=data(tmp_path / "data.zip"), shuffle=False, **workers))
    scenario.assert_undisturbed(tmp_path, monitor := tiny_monitor(every_n_train_steps=1))
    assert steps_of(monitor) == list(range(1, 13))


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


class MayMiss(Plain):
    """The batch of a loader that has ended is None."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        models.chain_saw(self, batch["b"] is not None)
        parts = [Plain.training_step(self, part, batch_idx) for part in batch.values() if part is not None]
        return torch.stack([scale * part for scale, part in zip((1.0, 3.0), parts, strict=False)]).sum()


@pytest.mark.parametrize("mode", ["max_size", "max_size_cycle", "min_size"])
@pytest.mark.parametrize("limit", [None, 3, 2])
def test_several_loaders_end_as_they_do_in_training(mode: str, limit: int | None, tmp_path: Path) -> None:
    """Of 24 and of 8 samples in batches of 4; weights stand still, so that losses of training and chains compare."""

    def made() -> CombinedLoader:
        parts = {name: loaders(n)["train_dataloaders"] for name, n in (("a", 24), ("b", 8))}
        return CombinedLoader(parts, mode)  # type: ignore[arg-type]

    share = 2 / min(6, limit or 6) if mode == "max_size" else 1.0
    monitor = tiny_monitor(every_n_epochs=1, num_draws=100)
    scenario = Scenario(
        lambda: MayMiss(lr=0), lambda: {"train_dataloaders": made()}, lambda: {"limit_train_batches": limit}
    )
    module = scenario.run(tmp_path, monitor).module
    assert len(monitor.estimates) == 2
    assert set(models.CHAIN_SAW) == ({True} if share == 1 else {True, False})
    if mode != "min_size":  # which ends with the shorter one, so that chains have not all samples of the other
        with torch.no_grad():
            long, short = (float(Plain.training_step(module, tensors(n).tensors, 0)) for n in (24, 8))
        assert [e.init_loss for e in monitor.estimates] == pytest.approx([long + 3 * share * short] * 2, rel=1e-5)


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


class Noisy(LightningDataModule):
    """Its hook draws from a generator of its own, and counts."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.rng, self.count, self.log_of = generator, 0, [0.0]

    def train_dataloader(self) -> DataLoader[Any]:
        return loaders(dataset=models.zeros())["train_dataloaders"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(self.rng, torch.Generator):
            noise = float(torch.rand((), generator=self.rng))
        else:
            noise = float(self.rng.random())
        self.count += 1
        self.log_of.append(noise)
        return [batch[0] + noise + 0.01 * (self.count + len(self.log_of)), batch[1]]


@pytest.mark.parametrize(
    "generator",
    [lambda: torch.Generator().manual_seed(1), lambda: np.random.default_rng(1), lambda: random.Random(1)],
    ids=["torch", "numpy", "python"],
)
def test_hooks_of_a_datamodule_draw_and_count_for_training_only(generator: Callable[[], Any], tmp_path: Path) -> None:
    made: list[Noisy] = []

    def data() -> dict[str, Any]:
        made.append(Noisy(generator()))
        return {"datamodule": made[-1]}

    Scenario(models.SeesBatch, data).assert_undisturbed(tmp_path, monitor := tiny_monitor())
    assert steps_of(monitor) == [4, 8, 12]
    assert [(noisy.count, len(noisy.log_of)) for noisy in made] == [(12, 13), (12, 13)]
    # all samples are zeros: each of the six minibatches of a firing was moved by another number
    assert len({round(value, 4) for batch in models.CHAIN_SAW for value in batch.flatten().tolist()}) >= 6


class Counts(models.AugmentingData):
    """Its hook counts, in a number and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.counts = 0, [0]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.count += 1
        self.counts.append(self.count)
        return [batch[0] + self.count + 100 * len(self.counts), batch[1]]


def test_a_datamodule_is_copied_once_a_firing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at each of its minibatches, for all of which the hook has counted what training has counted."""
    copies: list[Any] = []
    made: list[Counts] = []
    monkeypatch.setattr(batches, "MAX_RESIDENT_BATCHES", 1)  # read on, two by two, at each firing
    monkeypatch.setattr(batches, "WINDOW_BATCHES", 2)
    monkeypatch.setattr(hooks, "loosened", lambda live: copies.append(live) or loosened(live))

    def data() -> dict[str, Any]:
        made.append(Counts())
        return {"datamodule": made[-1]}

    Scenario(models.SeesBatch, data).assert_undisturbed(tmp_path, monitor := tiny_monitor())
    assert steps_of(monitor) == [4, 8, 12]
    assert len(copies) == 3 and len(set(map(id, copies))) == 1
    assert [(counts.count, len(counts.counts)) for counts in made] == [(12, 13), (12, 13)]
    # zeros, of which another hook makes ones
    seen = {value for batch in models.CHAIN_SAW for value in batch.flatten().tolist()}
    assert seen == {1 + count + 1 + 100 * (count + 2) for count in (4, 8, 12)}


class Holder:
    def __init__(self) -> None:
        self.count, self.sums = 0, {"x": [np.zeros(models.IN)]}


class Changes(LightningDataModule):
    """Its hook changes in place what it holds, and the batch by what it finds there."""

    def __init__(self, kind: str, size: int = models.IN) -> None:
        super().__init__()
        self.kind, self.count = kind, 0
        self.mean, self.sums, self.norm = torch.zeros(size), np.zeros(size), nn.BatchNorm1d(models.IN)
        self.held, self.inside = Holder(), {"a": {"k": np.zeros(models.IN), "norms": [nn.BatchNorm1d(models.IN)]}}

    def train_dataloader(self) -> DataLoader[Any]:
        return loaders()["train_dataloaders"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x = batch[0]
        self.count += 1
        if self.kind == "running mean":
            self.mean[: models.IN] += (x.mean(0) - self.mean[: models.IN]) / self.count
            return [x - self.mean[: models.IN], batch[1]]
        if self.kind == "array":
            self.sums += 1
            return [x + 0.1 * float(self.sums[0]), batch[1]]
        if self.kind == "BatchNorm":
            self.norm(x)
            return [x - self.norm.running_mean, batch[1]]
        if self.kind == "object":
            self.held.count += 1
            self.held.sums["x"][0] += 1
            return [x + 0.1 * self.held.count * float(self.held.sums["x"][0][0]), batch[1]]
        self.inside["a"]["k"] += 1
        self.inside["a"]["norms"][0](x)
        return [x + 0.1 * float(self.inside["a"]["k"][0]) - self.inside["a"]["norms"][0].running_mean, batch[1]]

    @property
    def state(self) -> list[float]:
        norms = [self.norm, self.inside["a"]["norms"][0]]
        arrays = [self.sums, self.held.sums["x"][0], self.inside["a"]["k"]]
        counts = [float(norm.num_batches_tracked) for norm in norms] + [float(array[0]) for array in arrays]
        return [self.count, *counts, self.held.count, *self.mean[: models.IN].tolist()]


@pytest.mark.parametrize("kind", ["running mean", "array", "BatchNorm", "object", "nested"])
def test_what_hooks_of_a_datamodule_change_in_place_is_changed_for_training_only(kind: str, tmp_path: Path) -> None:
    made: list[Changes] = []

    def data() -> dict[str, Any]:
        made.append(Changes(kind))
        return {"datamodule": made[-1]}

    with nothing_said_of(".*the batch hooks"):
        Scenario(Plain, data).assert_undisturbed(tmp_path, monitor := tiny_monitor(every_n_train_steps=5))
    assert steps_of(monitor) == [5, 10]
    plain, monitored = made
    assert plain.count == 12 and plain.state == monitored.state


def test_what_hooks_change_in_place_and_is_too_large_for_a_copy_is_named_once(tmp_path: Path) -> None:
    data = lambda: {"datamodule": Changes("running mean", MAX_COPIED_BYTES)}  # noqa: E731
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(Plain, data).run(tmp_path, monitor := tiny_monitor())
    assert steps_of(monitor) == [4, 8, 12]
    said = [str(w.message) for w in caught if "batch hooks" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("SLTMonitor: the batch hooks of the DataModule change self.mean in place, and so did")


@pytest.mark.parametrize(("data", "is_copied"), [(models.AugmentingData, True), (LightningDataModule, False)])
def test_a_datamodule_is_copied_for_its_hooks_alone(data: type[LightningDataModule], is_copied: bool) -> None:
    """At every minibatch: one with a list and a dict of a million had 17 s of it in a firing of 40 draws."""
    trainer, module = quiet_trainer(Path()), Plain()
    trainer.strategy.connect(module)
    trainer._data_connector.attach_datamodule(module, datamodule=(live := data()))
    assert (training_transfer(trainer, module).datamodule is not live) == is_copied


def test_hooks_of_the_data_of_an_earlier_fit_are_not_applied(tmp_path: Path) -> None:
    """The trainer keeps the DataModule, and calls its hooks no more."""
    monitor = tiny_monitor(every_n_epochs=1)
    scenario = Scenario(models.SeesBatch, lambda: {"datamodule": models.AugmentingData()}, lambda: {"max_epochs": 1})
    trace = scenario.run(tmp_path, monitor)
    assert {value for batch in models.CHAIN_SAW for value in batch.flatten().tolist()} == {2.0}
    models.CHAIN_SAW.clear()
    trace.trainer.fit_loop.max_epochs = 2
    trace.trainer.fit(trace.module, **loaders(dataset=models.zeros()))
    assert len(monitor.estimates) == 2
    assert {value for batch in models.CHAIN_SAW for value in batch.flatten().tolist()} == {0.0}


def test_replayed_batches_have_been_transferred_once(tmp_path: Path) -> None:
    """The same where batches come from training itself."""

    def stream() -> dict[str, Any]:
        zeros = models.zeros()
        return {"train_dataloaders": DataLoader(zeros, batch_sampler=[[i, i + 1] for i in range(0, 24, 2)])}

    monitor = tiny_monitor()
    Scenario(models.Augments, stream).assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12, 16, 20, 24]
    assert {value for batch in models.CHAIN_SAW for value in batch.flatten().tolist()} == {2.0}


class Shifting(DataLoader[Any]):
    """A loader that changes its batches while it is iterated."""

    def __iter__(self) -> Any:
        return ([x + 2, y] for x, y in super().__iter__())


class Filtering(DataLoader[Any]):
    """The same by the iterator that it makes, as loaders of graphs do."""

    def _get_iterator(self) -> Any:
        return ([x + 2, y] for x, y in super()._get_iterator())


@pytest.mark.parametrize("kind", [Shifting, Filtering])
def test_chains_have_the_batches_of_a_loader_that_iterates_in_its_own_way(
    kind: type[DataLoader[Any]], tmp_path: Path
) -> None:
    """They had those that its dataset and its collate function give: zeros."""
    monitor = tiny_monitor()
    scenario = Scenario(
        models.SeesBatch, lambda: {"train_dataloaders": kind(models.zeros(), batch_size=BATCH, shuffle=True)}
    )
    scenario.assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    assert {value for batch in models.CHAIN_SAW for value in batch.flatten().tolist()} == {2.0}


class Locked(Dataset[Any]):
    """Guarded by a lock that another thread holds when a process is forked."""

    def __init__(self) -> None:
        self.rows, self.lock, self.here = tensors(), threading.Lock(), multiprocessing.current_process().pid

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if multiprocessing.current_process().pid != self.here:
            self.lock.acquire()  # nobody gives it back in that process
        with self.lock:
            return self.rows[index]


def test_data_that_a_forked_process_never_gives_is_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    load = reading.Reader._load

    def watched(self: reading.Reader, batches: Any, workers: int, collate: Any) -> Any:
        waits.append(workers)
        return load(self, batches, workers, collate)

    monkeypatch.setattr(reading, "TIMEOUT", 1.0)
    monkeypatch.setattr(reading.Reader, "_load", watched)
    monitor = tiny_monitor(every_n_train_steps=2)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor]).fit(Plain(), **loaders(dataset=Locked()))
    assert len(monitor.estimates) == 3
    assert waits.count(1) == 1 and 0 in waits  # one process is waited for, and none after it


def _train_with_samples(folder: Path, seen: Any) -> None:
    monitor = tiny_monitor(every_n_train_steps=4, probe=6, num_draws=12)
    Scenario(Net, lambda: loaders(dataset=models.OwnsGenerator())).assert_undisturbed(folder, monitor)
    seen.put((steps_of(monitor), len(monitor.influences)))


def test_training_in_a_process_that_may_start_none_is_the_same(tmp_path: Path) -> None:
    """Such are those of ``multiprocessing.Pool``, in which tools that search for settings train."""
    fork = multiprocessing.get_context("fork")
    seen = fork.Queue()
    process = fork.Process(target=_train_with_samples, args=(tmp_path, seen), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert seen.get(timeout=5) == ([4, 8, 12], 3)
