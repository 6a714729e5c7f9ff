"""Every kind of data: training keeps its batches, and chains get the data that training has."""

from __future__ import annotations

import multiprocessing
import random
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_slt.callbacks.apart import loosened
from lightning_slt.callbacks.data import hooks
from lightning_slt.callbacks.data.training import TrainingData, training_transfer
from lightning_slt.sampling import batches, reading
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


def batch_sampled() -> dict[str, Any]:
    data = tensors()
    return {"train_dataloaders": DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), BATCH, False))}


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
