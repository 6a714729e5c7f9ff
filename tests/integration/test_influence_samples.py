"""Influence while a model trains: which samples are looked at, and whose losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

from lightning_slt.callbacks.data.samples import ProbedSamples
from tests.integration import models
from tests.integration.harness import (
    RecordingLogger,
    Scenario,
    SLTMonitor,
    nothing_said_of,
    tiny_monitor,
)
from tests.integration.models import BATCH, Net, Plain, loaders, tensors, with_validation
from tests.integration.probing import probing, still


@pytest.mark.parametrize("probe", [True, 24, 100])
def test_all_of_a_small_training_set(probe: Any, tmp_path: Path) -> None:
    monitor = probing(probe, at_steps=[2])
    trace = still().run(tmp_path, monitor)
    (e,) = monitor.influences
    assert e.train_index.tolist() == e.query_index.tolist() == list(range(24)) and e.queries_are_train
    assert e.matrix.shape == (24, 24) and (e.step, e.x, e.epoch, e.num_samples) == (2, 1, 0, 24)
    x, y = tensors().tensors
    with torch.no_grad():
        losses = cross_entropy(trace.module.net(x), y, reduction="none")
    torch.testing.assert_close(e.init_loss, losses.double(), rtol=1e-5, atol=1e-6)
    assert e.train_group == tuple(str(int(i)) for i in y) and e.groups == ("0", "1")


def test_the_same_samples_at_every_firing(tmp_path: Path) -> None:
    monitor, again = probing(7, query=3), probing(7, query=3, seed=1)
    for m in (monitor, again):
        Scenario(Net, with_validation).run(tmp_path, m)
    assert [e.step for e in monitor.influences] == [4, 8, 12]
    (chosen,) = {tuple(e.train_index.tolist()) for e in monitor.influences}
    (queries,) = {tuple(e.query_index.tolist()) for e in monitor.influences}
    assert len(set(chosen)) == 7 and max(chosen) > 7 and list(chosen) == sorted(chosen)
    assert len(set(queries)) == 3 and max(queries) < 8
    assert {tuple(e.train_index.tolist()) for e in again.influences} != {chosen}
    # they move with the weights
    first, last = monitor.influences[0], monitor.influences[-1]
    assert not torch.allclose(first.init_loss, last.init_loss)


class Validates(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


def test_rows_can_be_traced_to_their_samples(tmp_path: Path) -> None:
    """Index i of an estimate is sample i of the user's dataset, wherever its loss comes from."""
    monitor = probing(7, query=3, at_steps=[0])
    trace = Scenario(lambda: Validates(lr=0.0), with_validation).run(tmp_path, monitor)
    (e,) = monitor.influences
    for index, found, data in (
        (e.train_index, e.init_loss, tensors()),
        (e.query_index, e.query_init_loss, tensors(8)),
    ):
        x, y = data.tensors
        with torch.no_grad():
            losses = cross_entropy(trace.module.net(x[index]), y[index], reduction="none")
        torch.testing.assert_close(found, losses.double(), rtol=1e-5, atol=1e-6)


def test_a_loader_over_some_of_a_dataset(tmp_path: Path) -> None:
    some = [3, 20, 7, 11]
    monitor = probing(at_steps=[0])
    still(dataset=tensors(), shuffle=False, sampler=torch.utils.data.SubsetRandomSampler(some)).run(tmp_path, monitor)
    assert monitor.influences[0].train_index.tolist() == some
    subset = probing(at_steps=[0])
    still(dataset=Subset(tensors(), some)).run(tmp_path, subset)
    assert subset.influences[0].train_index.tolist() == [0, 1, 2, 3]  # numbers of the dataset that the loader has


@pytest.mark.parametrize(
    ("query", "count"),
    [(5, 5), (True, 8), (100, 8), (tensors(3), 3), ([tensors()[0]], 1)],
    ids=lambda v: type(v).__name__ + str(v)[:4],
)
def test_queries(query: Any, count: int, tmp_path: Path) -> None:
    monitor = probing(10, query=query, at_steps=[1])
    Scenario(Net, with_validation).run(tmp_path, monitor)
    (e,) = monitor.influences
    assert e.matrix.shape == (count, 10) and not e.queries_are_train
    assert len(e.query_index) == len(e.query_group or ()) == count


@pytest.mark.parametrize("query", [None, False])
def test_without_queries_the_samples_are_their_own(query: Any, tmp_path: Path) -> None:
    monitor = probing(10, query=query, at_steps=[1])
    with nothing_said_of(".*validation data.*"):
        Scenario(Net, with_validation).run(tmp_path, monitor)
    (e,) = monitor.influences
    assert e.queries_are_train and torch.equal(e.train_index, e.query_index) and e.matrix.shape == (10, 10)


def test_no_validation_data_is_a_warning_and_the_samples_are_their_own_queries(tmp_path: Path) -> None:
    monitor = probing(10, query=5)
    with pytest.warns(UserWarning, match=r"SLTMonitor\(query=5\): there is no validation data") as caught:
        Scenario(Net, loaders).run(tmp_path, monitor)
    assert len([w for w in caught if "validation data" in str(w.message)]) == 1
    assert [(e.queries_are_train, e.matrix.shape[-1]) for e in monitor.influences] == [(True, 10)] * 3


class Several(Net):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        return None


@pytest.mark.parametrize("make", [list, lambda two: dict(zip("ab", two, strict=True)), CombinedLoader])
def test_several_validation_loaders(make: Any, tmp_path: Path) -> None:
    """The first one has the queries."""

    def data() -> dict[str, Any]:
        return {**loaders(), "val_dataloaders": make([DataLoader(tensors(6)), DataLoader(tensors(8))])}

    monitor = probing(10, query=True, at_steps=[1])
    Scenario(Several, data).run(tmp_path, monitor)
    assert monitor.influences[0].query_index.tolist() == list(range(6))


class DrawsItsSplit(LightningDataModule):
    """Its validation data is drawn when it is asked for."""

    def train_dataloader(self) -> Any:
        return loaders()["train_dataloaders"]

    def val_dataloader(self) -> Any:
        return DataLoader(torch.utils.data.random_split(tensors(8), [5, 3])[0], batch_size=BATCH)


@pytest.mark.parametrize("owner", ["argument", "datamodule"])
def test_queries_of_validation_data_that_lightning_has_not_loaded_yet(owner: str, tmp_path: Path) -> None:
    """Without a sanity check, and with the first validation an epoch away; training is the same."""
    data = with_validation if owner == "argument" else lambda: {"datamodule": DrawsItsSplit()}
    trainer = lambda: {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}  # noqa: E731
    monitor = probing(10, query=True, at_steps=[0, 3])
    with nothing_said_of(".*validation data.*"):
        Scenario(Net, data, trainer).assert_undisturbed(tmp_path, monitor)
    first, second = monitor.influences
    assert not first.queries_are_train and len(first.query_index) == (8 if owner == "argument" else 5)
    assert torch.equal(first.query_index, second.query_index)


def two_keys(samples: list[Any]) -> list[Tensor]:
    return [torch.stack([s["points"] for s in samples]), torch.tensor([s["class"] for s in samples])]


def test_validation_data_that_is_collated_and_sampled_in_its_own_way(tmp_path: Path) -> None:
    items = [{"points": x, "class": int(y)} for x, y in zip(*tensors(8).tensors, strict=True)]
    sampler = torch.utils.data.SubsetRandomSampler([5, 2, 7])

    def data() -> dict[str, Any]:
        validation = DataLoader(items, batch_size=BATCH, sampler=sampler, collate_fn=two_keys)  # type: ignore[arg-type]
        return {**loaders(), "val_dataloaders": validation}

    monitor = probing(10, query=True, at_steps=[0])
    trace = Scenario(lambda: Validates(lr=0.0), data).run(tmp_path, monitor)
    (e,) = monitor.influences
    assert e.query_index.tolist() == [5, 2, 7]
    x, y = tensors(8).tensors
    with torch.no_grad():
        losses = cross_entropy(trace.module.net(x[e.query_index]), y[e.query_index], reduction="none")
    torch.testing.assert_close(e.query_init_loss, losses.double(), rtol=1e-5, atol=1e-6)


def test_groups_by_a_function(tmp_path: Path) -> None:
    monitor = probing(at_steps=[1], group_fn=lambda s: "right" if s[0][0] > 0 else None)
    Scenario(Net, loaders).run(tmp_path, monitor)
    (e,) = monitor.influences
    x = tensors().tensors[0]
    assert e.groups == ("right",) and e.group_matrix is not None
    assert e.train_group == tuple("right" if v > 0 else "" for v in x[:, 0])
    right = torch.tensor([g == "right" for g in e.train_group])
    assert float(e.group_matrix) == pytest.approx(float(e.matrix[right][:, right].mean()), rel=1e-6)


def test_groups_that_are_no_text_still_have_a_name(tmp_path: Path) -> None:
    monitor = probing(at_steps=[1], group_fn=lambda s: "half \ud83d" if s[0][0] > 0 else ("a", 1))
    Scenario(Net, loaders).run(tmp_path, monitor)
    assert set(monitor.influences[0].groups) == {"half ?", "('a', 1)"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probe": 0}, "probe=0: must be at least 1"),
        ({"probe": True, "query": -3}, "query=-3: must be at least 1"),
        ({"query": 4}, "^query=4: is given without probe: probe=True looks at the training data"),
        ({"query": models.tensors(3)}, "^query=TensorDataset: is given without probe"),
        ({"probe": False, "group_fn": str}, "group_fn=type: is given without probe"),
        ({"render": str}, "render=type: is given without probe"),
        ({"probe": models.Stream()}, "probe: expected a number of samples or a map-style Dataset .*, got Stream"),
        ({"probe": True, "query": "val"}, "query: expected a number of samples or a map-style Dataset .*, got str"),
        ({"probe": 0.5}, "got float"),
    ],
)
def test_what_is_no_choice_of_samples_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLTMonitor(**settings)


def test_settings_say_what_is_looked_at() -> None:
    assert ProbedSamples(True, 64).describe() == {"probe": True, "query": 64}
    assert ProbedSamples(tensors(9)).describe() == {"probe": "TensorDataset of 9", "query": None}
    assert ProbedSamples().describe() is None and ProbedSamples(False, False).describe() is None


def test_no_probe_no_influence(tmp_path: Path) -> None:
    logger, monitor = RecordingLogger(), tiny_monitor()
    Scenario(Net, loaders, lambda: {"logger": logger}).run(tmp_path, monitor)
    assert monitor.influences == [] and len(monitor.estimates) == 3
    assert not [key for row, _ in logger.of_callback() for key in row if "influence" in key]
    assert monitor.folder is not None and not (monitor.folder / "influence").exists()
