"""Influence while a model trains: which samples, whose losses, what is kept, and that training is the same."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_slt.callbacks import reporting
from lightning_slt.callbacks.data.samples import ProbedSamples
from lightning_slt.influence_record import InfluenceEstimate, InfluenceRecord
from lightning_slt.record import RunRecord
from lightning_slt.sampling.probe import CoupledLossError
from tests.integration import models
from tests.integration.harness import (
    RecordingLogger,
    Scenario,
    SLTMonitor,
    assert_same,
    nothing_said_of,
    steps_of,
    tiny_monitor,
)
from tests.integration.models import BATCH, IN, Net, Plain, loaders, tensors, with_validation


def probing(probe: Any = True, **changes: Any) -> SLTMonitor:
    """Chains that are read often enough for every number to be there: 8 draws, and a reading at every fourth step."""
    return tiny_monitor(**{"num_draws": 32, "probe": probe, **changes})


def still(**kwargs: Any) -> Scenario:
    """Weights that stay where they began."""
    return Scenario(lambda: Plain(lr=0.0), lambda: loaders(**kwargs))


def same(a: InfluenceEstimate, b: InfluenceEstimate) -> None:
    x, y = a.tensors(), b.tensors()
    assert x.keys() == y.keys()
    for name in x:
        assert torch.equal(x[name].nan_to_num(nan=-1.25), y[name].nan_to_num(nan=-1.25)), name


# ----------------------------------------------------------------------------------------------- training is the same


class Counts(Dataset[tuple[Tensor, int]]):
    """Counts what is read of it, and gives its samples a little noise of its own."""

    def __init__(self, n: int = models.SAMPLES) -> None:
        self.data, self.rng, self.num_reads = tensors(n), torch.Generator().manual_seed(1), 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.num_reads += 1
        x, y = self.data[index]
        return x + 0.01 * torch.randn(IN, generator=self.rng), int(y)


def with_counts() -> dict[str, Any]:
    return {**loaders(dataset=Counts()), "val_dataloaders": DataLoader(Counts(8), batch_size=BATCH)}


SCENARIOS: dict[str, tuple[Scenario, dict[str, Any]]] = {
    "the training set": (Scenario(Net, with_validation), {}),
    "some of it, on validation data": (Scenario(Net, with_validation), {"probe": 7, "query": 5}),
    "datasets of their own": (Scenario(Net, with_validation), {"probe": tensors(9), "query": tensors(3)}),
    "groups and pictures by functions": (
        Scenario(Net, loaders),
        {"group_fn": lambda s: int(s[0][0] > 0), "render": lambda s: f"{torch.rand(1)}"},
    ),
    "a dataset that counts and draws": (Scenario(Net, with_counts), {"probe": 6, "query": 4}),
    "persistent workers": (
        Scenario(Net, lambda: loaders(num_workers=1, persistent_workers=True)),
        {"every_n_train_steps": 6},
    ),
    "torchmetrics": (Scenario(models.WithMetric, with_validation), {"query": 4}),
    "frozen BatchNorm": (Scenario(models.FrozenNorm, loaders), {}),
    "random numbers in the step": (Scenario(models.OwnRandomness, loaders), {"probe": 5}),
    "recurrent net": (Scenario(models.Recurrent, loaders), {"probe": 5}),
    "bf16-mixed": (Scenario(Net, loaders, lambda: {"precision": "bf16-mixed"}), {}),
    "64-true": (Scenario(Net, loaders, lambda: {"precision": "64-true"}), {"probe": tensors(9)}),
    "accumulation": (Scenario(Net, loaders, lambda: {"accumulate_grad_batches": 3}), {"every_n_train_steps": 2}),
    "compiled module": (Scenario(models.compiled_module, loaders), {"probe": 5}),
    "a loss of its own": (Scenario(models.Manual, loaders), {"probe": 5, "loss_fn": models.loss_of_net}),
}


@pytest.mark.parametrize(("scenario", "settings"), SCENARIOS.values(), ids=SCENARIOS)
def test_training_is_the_same(scenario: Scenario, settings: dict[str, Any], tmp_path: Path) -> None:
    monitor = probing(**{"num_draws": 8, **settings})
    with nothing_said_of(".*could not.*"):
        scenario.assert_undisturbed(tmp_path, monitor)
    assert len(monitor.influences) == len(monitor.estimates) >= 2
    assert all(e.mean_loss.isfinite().all() and len(e.mean_loss) for e in monitor.influences)
    assert all((e.self_influence > 0).any() for e in monitor.influences)


CHAINS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "batched": {"method": "batched"},
    "calibrated": {"sampler": None, "num_burnin_steps": None, "num_steps_bw_draws": None, "num_draws": 20},
}


@pytest.mark.parametrize("settings", CHAINS.values(), ids=CHAINS)
def test_the_learning_coefficient_is_what_it_is_without(settings: dict[str, Any], tmp_path: Path) -> None:
    """The same chains are read: nothing of what they are used for depends on who else looks."""
    without, with_probe = tiny_monitor(**settings), tiny_monitor(**settings, probe=True, query=4)
    for monitor in (without, with_probe):
        Scenario(Net, with_validation).run(tmp_path, monitor)
    assert steps_of(without) == steps_of(with_probe) == [4, 8, 12]
    for a, b in zip(without.estimates, with_probe.estimates, strict=True):
        torch.testing.assert_close(a.trace, b.trace, rtol=1e-6, atol=1e-7)
        assert (a.step_size, a.num_steps_bw_draws, a.num_burnin_steps) == (
            b.step_size,
            b.num_steps_bw_draws,
            b.num_burnin_steps,
        )
        assert b.mean == pytest.approx(a.mean, rel=1e-6, abs=1e-8)


def test_the_llc_of_the_samples_is_that_of_the_chains(tmp_path: Path) -> None:
    """``nbeta (E[l_i] - l_i(w*))``, averaged over all samples, estimates what the chains' own losses do."""
    monitor = probing(num_draws=500, num_chains=4, at_steps=[240], sampler=None, num_burnin_steps=None)
    Scenario(lambda: Plain(lr=0.5), loaders, lambda: {"max_epochs": 40}).run(tmp_path, monitor)
    (llc,), (influence,) = monitor.estimates, monitor.influences
    assert llc.valid and influence.valid
    assert llc.mean > 5 * llc.se
    assert float(influence.per_sample_llc.mean()) == pytest.approx(llc.mean, abs=4 * llc.se)


# ------------------------------------------------------------------------------------------------------- which samples


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
        ({"query": 4}, "query is given without probe: probe=True looks at the training data"),
        ({"probe": False, "group_fn": str}, "group_fn is given without probe"),
        ({"render": str}, "render is given without probe"),
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


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_sample_without_a_finite_loss_is_dropped_and_named_and_training_goes_on(tmp_path: Path) -> None:
    x, y = tensors(6).tensors
    x = x.clone()
    x[4, 0] = float("nan")
    monitor = probing(TensorDataset(x, y), query=tensors(2))
    with pytest.warns(
        UserWarning, match=r"1 samples are left out of influence: train 4 \(its loss is not fin"
    ) as caught:
        trace = Scenario(Net, loaders).run(tmp_path, monitor)
    assert trace.num_batches == 12 and len([w for w in caught if "left out" in str(w.message)]) == 1
    for e in monitor.influences:
        assert e.train_index.tolist() == [0, 1, 2, 3, 5] and e.matrix.shape[-1] == 5
        assert [(d.kind, d.index) for d in e.dropped] == [("train", 4)]
        assert e.mean_loss.isfinite().all()
        assert not [reason for reason in e.reasons if "finite" in reason]
    assert monitor.influences[-1].matrix.isfinite().all()
    assert all(e.valid or e.reasons for e in monitor.estimates) and len(monitor.estimates) == 3


def test_no_sample_with_a_finite_loss(tmp_path: Path) -> None:
    x, y = tensors(4).tensors
    monitor = probing(TensorDataset(torch.full_like(x, float("nan")), y), at_steps=[1])
    with pytest.warns(UserWarning, match="4 samples are left out"):
        Scenario(Net, loaders).run(tmp_path, monitor)
    (e,) = monitor.influences
    assert not e.valid and "no sample has finite losses" in e.reasons and len(e.train_index) == 0
    assert monitor.estimates[0].trace.isfinite().all()


class Contrastive(Net):
    """Each sample is told from the others of its batch."""

    def loss(self, batch: Any) -> Tensor:
        hidden = self.net(batch[0])
        return cross_entropy(hidden @ hidden.T, torch.arange(len(hidden)))


def test_a_loss_that_couples_samples_leaves_influence_out_and_nothing_else(tmp_path: Path) -> None:
    """Said once; and the learning coefficient is that of a monitor without samples, number by number."""
    monitor, plain = probing(on_failure="warn"), probing(probe=None)
    with pytest.warns(UserWarning, match="influence is left out of this run.*couples the samples.*loss_fn") as caught:
        trace = Scenario(Contrastive, loaders).assert_undisturbed(tmp_path / "a", monitor)
    Scenario(Contrastive, loaders).run(tmp_path / "b", plain)
    assert trace.num_batches == 12
    assert monitor.influences == [] and len(monitor.estimates) == 3
    assert [e.mean for e in monitor.estimates] == [e.mean for e in plain.estimates]
    assert len([w for w in caught if "couples" in str(w.message)]) == 1


def test_a_loss_that_couples_samples_raises_where_failures_raise(tmp_path: Path) -> None:
    with pytest.raises(CoupledLossError, match="not defined for such a loss"):
        Scenario(Contrastive, loaders).run(tmp_path, probing(on_failure="raise"))


class Weighs(Net):
    """Classes count by weights whose sum divides."""

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1], weight=torch.linspace(1.0, 9.0, models.CLASSES))


@pytest.mark.parametrize("changes", [{}, {"batch_size": models.SAMPLES}], ids=["minibatches", "all the data at once"])
def test_a_weighted_mean_is_said_to_read_samples_without_their_weights(changes: Any, tmp_path: Path) -> None:
    weighted, plain = probing(**changes), probing(**changes)
    Scenario(Weighs, loaders).run(tmp_path / "a", weighted)
    Scenario(Net, loaders).run(tmp_path / "b", plain)
    assert all("its loss alone, without its weight" in found.notes[-1] for found in weighted.influences)
    assert len(weighted.influences) == 3 and not any("alone" in note for i in plain.influences for note in i.notes)


def refuses(sample: Any) -> str:
    raise KeyError("no such field")


def test_a_group_fn_that_fails_names_the_sample(tmp_path: Path) -> None:
    monitor = probing(group_fn=refuses, on_failure="warn")
    with pytest.warns(UserWarning, match="group_fn failed on sample 0: KeyError: 'no such field'"):
        trace = Scenario(Net, loaders).run(tmp_path, monitor)
    assert trace.num_batches == 12 and monitor.influences == [] and len(monitor.estimates) == 3
    with pytest.raises(ValueError, match="group_fn failed on sample 0"):
        Scenario(Net, loaders).run(tmp_path, probing(group_fn=refuses))


def test_only_the_last_estimate_keeps_its_pairs(tmp_path: Path) -> None:
    monitor = probing(7, query=3)
    Scenario(Net, with_validation).run(tmp_path, monitor)
    assert [tuple(e.matrix.shape) for e in monitor.influences] == [(0, 7), (0, 7), (3, 7)]
    assert [len(e.self_influence) for e in monitor.influences] == [7, 7, 7]
    assert monitor.folder is not None
    recorded = list(InfluenceRecord(monitor.folder).read())
    assert [(e.step, tuple(e.matrix.shape)) for e in recorded] == [(4, (0, 7)), (8, (0, 7)), (12, (3, 7))]
    for kept, read in zip(monitor.influences, recorded, strict=True):
        same(kept, read)
        assert "influence of 7 samples on 3 queries" in str(read)
        assert (kept.passing, kept.max_abs) == (read.passing, pytest.approx(read.max_abs, rel=1e-6))


def test_with_a_large_budget_every_firing_keeps_its_pairs_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "LARGE_BUDGET", 16)
    monitor = probing(7, query=3)
    Scenario(Net, with_validation).run(tmp_path, monitor)
    assert [tuple(e.matrix.shape) for e in monitor.influences] == [(0, 7), (0, 7), (3, 7)]
    assert monitor.folder is not None
    assert [tuple(e.matrix.shape) for e in InfluenceRecord(monitor.folder).read()] == [(3, 7)] * 3


def test_local_files(pictures: None, tmp_path: Path) -> None:
    monitor = probing(every_n_train_steps=6, query=4)
    Scenario(Net, with_validation, lambda: {"logger": False}).run(tmp_path, monitor)
    assert monitor.folder is not None
    figures = sorted(path.name for path in (monitor.folder / "figures").iterdir())
    assert figures == [
        "chains_step_000000006.png",
        "chains_step_000000012.png",
        "history.png",
        "influence_step_000000006.png",
        "influence_step_000000012.png",
        "suspects_step_000000006.png",
        "suspects_step_000000012.png",
        "trajectories_step_000000012.png",
    ]
    assert json.loads((monitor.folder / "summary.json").read_text())["config"]["samples"] == {"probe": True, "query": 4}
    tables = {path.name for path in (monitor.folder / "tables").iterdir()}
    assert tables >= {"influence_top_step_000000006.csv", "influence_top_step_000000012.csv"}


def test_every_value_at_its_x_in_every_logger(tmp_path: Path) -> None:
    recording, written = RecordingLogger(), CSVLogger(tmp_path, "csv", "run")
    monitor = probing(every_n_train_steps=3)
    Scenario(Net, loaders, lambda: {"logger": [recording, written], "log_every_n_steps": 50}).run(tmp_path, monitor)
    rows = [(row, x) for row, x in recording.of_callback() if "slt/influence/max_abs" in row]
    assert [x for _, x in rows] == [2, 5, 8, 11] == [e.x for e in monitor.influences]
    assert [row["slt/influence/top_share"] for row, _ in rows] == [e.top_share for e in monitor.influences]
    assert [row["slt/influence/max_abs"] for row, _ in rows] == [e.max_abs for e in monitor.influences]
    with open(tmp_path / "csv" / "run" / "metrics.csv", encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if row.get("slt/influence/max_abs")]
    assert [(int(r["step"]), float(r["slt/influence/max_abs"])) for r in found] == [
        (e.x, e.max_abs) for e in monitor.influences
    ]


class Gone(RecordingLogger):
    def log_metrics(self, metrics: Any, step: Optional[int] = None) -> None:
        if any("influence" in key for key in metrics):
            raise ConnectionError("the server is gone")
        super().log_metrics(metrics, step)


def test_a_logger_that_raises_costs_nothing(tmp_path: Path) -> None:
    broken, monitor = Gone(), probing()
    reference = Scenario(Net, loaders).run(tmp_path / "without")
    with pytest.warns(UserWarning, match=r"Gone.*the server is gone"):
        trace = Scenario(Net, loaders, lambda: {"logger": broken}).run(tmp_path, monitor)
    reference.rows, trace.rows = [], []  # loggers of another kind
    assert_same(reference, trace)
    assert [e.step for e in monitor.influences] == steps_of(monitor) == [4, 8, 12]


# ----------------------------------------------------------------------------- resuming, two monitors, smoke runs


def saving(folder: Path, **kwargs: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
        return {"callbacks": [saver], "enable_checkpointing": True, **kwargs}

    return make


def test_resume_goes_on_with_the_history_and_its_samples(tmp_path: Path) -> None:
    first, again = (probing(7, query=3, every_n_train_steps=2) for _ in range(2))
    Scenario(Net, with_validation, saving(tmp_path, max_epochs=1)).run(tmp_path, first)
    without = Scenario(Net, with_validation).run(tmp_path / "other", ckpt_path=str(tmp_path / "step=5.ckpt"))
    resumed = Scenario(Net, with_validation).run(tmp_path / "other", again, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert_same(without, resumed)
    assert [e.step for e in first.influences] == [2, 4, 6]
    assert [e.step for e in again.influences] == [2, 4, 6, 8, 10, 12]
    for before, after in zip(first.influences[:2], again.influences, strict=False):
        same(before, after)
    assert len({tuple(e.train_index.tolist()) for e in again.influences}) == 1
    assert [len(e.matrix) for e in again.influences] == [0, 0, 0, 0, 0, 3]
    # complete in its folder, each step once, although that of the first run may be gone
    assert again.folder is not None
    assert [e.step for e in InfluenceRecord(again.folder).read()] == [2, 4, 6, 8, 10, 12]
    assert [e.step for e in RunRecord(again.folder).read()] == [2, 4, 6, 8, 10, 12]


def test_resume_in_a_new_folder_has_the_whole_history_there(tmp_path: Path) -> None:
    first = probing(7, every_n_train_steps=2, dirpath=str(tmp_path / "first"))
    again = probing(7, every_n_train_steps=2, dirpath=str(tmp_path / "again"))
    Scenario(Net, loaders, saving(tmp_path, max_epochs=1)).run(tmp_path, first)
    (tmp_path / "first").rename(tmp_path / "moved")
    Scenario(Net, loaders).run(tmp_path, again, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert again.folder == tmp_path / "again"
    assert [e.step for e in InfluenceRecord(tmp_path / "again").read()] == [2, 4, 6, 8, 10, 12]


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """Step 6 was measured by the run that died; the one that goes on from step 5 does not measure there."""
    folder = str(tmp_path / "slt")
    first = probing(7, every_n_train_steps=2, name="m", dirpath=folder)
    again = probing(7, every_n_train_steps=4, name="m", dirpath=folder)
    Scenario(Net, loaders, saving(tmp_path, max_epochs=1)).run(tmp_path, first)
    assert first.folder is not None
    assert [e.step for e in InfluenceRecord(first.folder).read()] == [2, 4, 6]
    Scenario(Net, loaders).run(tmp_path, again, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert again.folder == first.folder
    assert [e.step for e in InfluenceRecord(first.folder).read()] == [2, 4, 8, 12]
    assert [e.step for e in again.influences] == [2, 4, 8, 12]


def test_a_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    monitor, again = probing(every_n_train_steps=2), probing(every_n_train_steps=2)
    Scenario(Net, loaders, saving(tmp_path, max_epochs=1)).run(tmp_path, monitor)
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "SLTMonitor" in k]
    again.load_state_dict(state)
    assert [e.step for e in again.influences] == [2, 4, 6]
    for kept, loaded in zip(monitor.influences, again.influences, strict=True):
        same(kept.without_pairs(), loaded)
    del state["influences"]  # written before there were any
    again.load_state_dict(state)
    assert again.influences == [] and len(again.estimates) == 3


def test_two_monitors_keep_apart(tmp_path: Path) -> None:
    logger = RecordingLogger()
    pair = [probing(5, name="head", restrict="net.4.*"), probing(9, query=3, name="body", restrict="net.0.*")]
    scenario = Scenario(Net, with_validation, lambda: {"logger": logger})
    without = Scenario(Net, with_validation).run(tmp_path / "without")
    trace = scenario.run(tmp_path, *pair)
    without.rows, trace.rows = [], []
    assert_same(without, trace)
    assert [tuple(m.influences[-1].matrix.shape) for m in pair] == [(5, 5), (3, 9)]
    assert [m.influences[-1].component for m in pair] == ["head", "body"]
    for m, name in zip(pair, ("slt_head", "slt_body"), strict=True):
        rows = [row for row, _ in logger.rows if f"{name}/influence/max_abs" in row]
        assert [row[f"{name}/influence/max_abs"] for row in rows] == [e.max_abs for e in m.influences]
        assert m.folder is not None and len(list(InfluenceRecord(m.folder).read())) == 3
    assert pair[0].folder != pair[1].folder


@pytest.mark.parametrize(
    "settings",
    [{"probe": True}, {"probe": 5, "query": 3}, {"probe": tensors(9)}],
    ids=["training data", "numbers of samples", "a dataset"],
)
def test_fast_dev_run_is_quick_and_writes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    monitor = SLTMonitor(every_n_train_steps=500, **settings)
    scenario = Scenario(Net, with_validation, lambda: {"fast_dev_run": True})
    scenario.assert_undisturbed(tmp_path, monitor)
    (e,) = monitor.influences
    assert not e.valid and any("too few" in reason for reason in e.reasons)
    assert monitor.estimates[0].seconds < 5
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_fast_dev_run_makes_a_failure_a_failure(tmp_path: Path) -> None:
    with pytest.raises(CoupledLossError):
        Scenario(Contrastive, loaders, lambda: {"fast_dev_run": True}).run(tmp_path, SLTMonitor(probe=True))


def test_a_second_fit_looks_at_its_own_data(tmp_path: Path) -> None:
    monitor = probing(every_n_train_steps=2)
    Scenario(Net, lambda: loaders(8), lambda: {"max_epochs": 1}).run(tmp_path / "first", monitor)
    assert [len(e.train_index) for e in monitor.influences] == [8]
    Scenario(Plain, lambda: loaders(16), lambda: {"max_epochs": 1}).run(tmp_path / "second", monitor)
    assert [(e.step, len(e.train_index)) for e in monitor.influences] == [(2, 16), (4, 16)]


def test_samples_that_change_are_looked_at_as_they_were_read_once(tmp_path: Path) -> None:
    """The weights stand still, and the dataset gives other noise at every read."""
    monitor = probing(6, query=Counts(8))
    still(dataset=Counts()).run(tmp_path, monitor)
    first, *others = monitor.influences
    assert len(others) == 2
    for e in others:
        assert torch.equal(e.init_loss, first.init_loss) and torch.equal(e.query_init_loss, first.query_init_loss)


def test_training_data_that_is_given_anew_keeps_the_samples(tmp_path: Path) -> None:
    """Loaders that are made again for every epoch, over other datasets."""

    class Anew(Net):
        def __init__(self) -> None:
            super().__init__()
            self.num_loaders = 0

        def train_dataloader(self) -> DataLoader[Any]:
            self.num_loaders += 1
            return DataLoader(tensors(models.SAMPLES * self.num_loaders), BATCH)

    monitor = probing(7, every_n_epochs=1)
    trainer = lambda: {"reload_dataloaders_every_n_epochs": 1}  # noqa: E731
    Scenario(Anew, dict, trainer).run(tmp_path, monitor)
    first, second = monitor.influences
    assert torch.equal(first.train_index, second.train_index)


def test_a_monitor_can_be_pickled_before_and_after_a_run(tmp_path: Path) -> None:
    """As strategies that spawn do."""
    import pickle

    monitor = probing(5, query=tensors(3))
    assert pickle.loads(pickle.dumps(monitor)).influences == []
    Scenario(Net, loaders).run(tmp_path, monitor)
    again = pickle.loads(pickle.dumps(monitor))
    assert [e.step for e in again.influences] == [4, 8, 12]


def test_the_key_of_a_state_says_what_was_asked_for_alone() -> None:
    """A setting that a later version adds is not in it: the checkpoints of this one are found."""
    key = SLTMonitor(every_n_train_steps=5, num_draws=50, nbeta=3.0).state_key
    assert "'num_draws': 50" in key and "'nbeta': 3.0" in key
    assert not {"num_burnin_steps", "second_moment", "tolerance_llc", "method"} & set(re.findall(r"'(\w+)'", key))


def test_monitors_that_look_at_other_samples_have_states_of_their_own() -> None:
    keys = [
        SLTMonitor(every_n_epochs=1, **probes).state_key
        for probes in ({}, {"probe": 8}, {"probe": 9}, {"probe": 9, "query": 2})
    ]  # type: ignore[arg-type]
    assert len(set(keys)) == 4
    assert "samples" not in keys[0]  # as it was before there were any: older checkpoints are found
