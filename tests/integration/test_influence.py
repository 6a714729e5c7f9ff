"""Influence while a model trains: training is the same, and what is kept of the numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_slt.callbacks import reporting
from lightning_slt.influence_record import InfluenceRecord
from tests.integration import models
from tests.integration.harness import (
    RecordingLogger,
    Scenario,
    assert_same,
    nothing_said_of,
    steps_of,
    tiny_monitor,
)
from tests.integration.models import BATCH, Net, Plain, loaders, tensors, with_validation
from tests.integration.probing import Counts, probing, same


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
