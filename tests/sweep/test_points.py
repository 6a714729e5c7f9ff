"""The parts of a point: the file of its result, its minibatches and samples, and what is said where it fails."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from lightning_slt.callbacks.background.devices import WorkerDevice
from lightning_slt.config import load
from lightning_slt.sampling.batches import DatasetSource, ReplaySource
from lightning_slt.sweep import SweepConfig, executors
from lightning_slt.sweep.checkpoint import CURRENT, STATE, Checkpoint, in_order, unwrapped, weights_in
from lightning_slt.sweep.executors import _reason, named_devices, on_cluster
from lightning_slt.sweep.point import Task, _probes, make_source
from lightning_slt.sweep.run import SWEEP_FILE, _settle, transitions_of
from tests.publish.helpers import make_estimate
from tests.sweep import runs

CPU = torch.device("cpu")


def config_of(folder: Path, **changes: Any) -> SweepConfig:
    return load(runs.settings(folder=str(folder), **changes), schema=SweepConfig)


def test_another_question_or_other_weights_have_another_file(tmp_path: Path) -> None:
    """The place of the checkpoint has not: its weights are what is measured."""
    config = config_of(tmp_path)
    point = Checkpoint(tmp_path / "a.ckpt", 12, 1, "digest")
    task = Task.of(point, config, 2.0)
    assert task.result_path.parent == tmp_path / "points" and task.result_path.name.startswith("step_000000012_")
    same = Task.of(dataclasses.replace(point, path=tmp_path / "b.ckpt", epoch=2), config, 2.0)
    others = [
        Task.of(dataclasses.replace(point, content="other"), config, 2.0),
        Task.of(dataclasses.replace(point, step=13), config, 2.0),
        Task.of(point, config, 2.5),
        Task.of(point, config_of(tmp_path, seed=1), 2.0),
    ]
    assert same.result_path == task.result_path
    assert len({task.result_path, *(t.result_path for t in others)}) == 5


def transfer() -> Any:
    made: Any = lambda batch: batch  # noqa: E731
    made.device = CPU
    return made


def numbers(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(n))


@pytest.mark.parametrize(
    ("data", "changes", "batch_size", "n", "kept"),
    [
        (numbers(200), {}, 64, 200, range(200)),
        (numbers(10), {}, 10, 10, range(10)),
        (numbers(200), {"batch_size": 7}, 7, 200, range(200)),
        (numbers(200), {"num_samples": 999}, 64, 999, range(200)),
        (DataLoader(numbers(20), 5, shuffle=True), {}, 5, 20, range(20)),
        (DataLoader(numbers(20), 5, sampler=SubsetRandomSampler(range(4, 12))), {}, 5, 8, range(4, 12)),
        (DataLoader(numbers(20), 5, sampler=SubsetRandomSampler(range(4, 12))), {"batch_size": 3}, 3, 8, range(4, 12)),
    ],
    ids=["dataset", "a small one", "batch_size", "num_samples", "loader", "some of it", "some of it in others"],
)
def test_minibatches_are_those_of_the_data_as_it_is_given(
    data: Any, changes: dict[str, Any], batch_size: int, n: int, kept: range, tmp_path: Path
) -> None:
    source = make_source(data, config_of(tmp_path, **changes), transfer())
    assert isinstance(source, DatasetSource) and (source.batch_size, source.num_samples) == (batch_size, n)
    seen = {int(i) for batch in source.window(0).batches for i in batch[0]}
    assert seen == set(kept) and len(source.window(0).batches[0][0]) == batch_size


def test_the_seed_is_that_of_the_minibatches(tmp_path: Path) -> None:
    batches = [
        torch.cat([b[0] for b in make_source(numbers(50), config_of(tmp_path, seed=s), transfer()).window(0).batches])
        for s in (0, 0, 1)
    ]
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


def test_samples_that_are_probed_are_asked_for_by_number(tmp_path: Path) -> None:
    config = config_of(tmp_path, probe=6, query_data="tests.sweep.runs:six", query=4)
    source = DatasetSource(runs.dataset(), 4)
    probes = _probes(source, config, CPU)
    assert probes is not None and probes.query is not None
    assert (len(probes.train.index), len(probes.query.index)) == (6, 4)
    assert _probes(source, config_of(tmp_path), CPU) is None
    chosen = [_probes(source, config_of(tmp_path, probe=6, seed=seed), CPU) for seed in (0, 0, 1)]
    indices = [found.train.index for found in chosen if found is not None]
    assert indices[0] == indices[1] != indices[2] and len(indices) == 3
    assert _probes(source, config_of(tmp_path, probe=6), CPU).query is None  # type: ignore[union-attr]
    batches = ReplaySource([torch.zeros(4, 2)], 4, 4)
    with pytest.raises(ValueError, match=r"probe=6: data='.*' gives no samples that can be asked for by number"):
        _probes(batches, config, CPU)


def test_which_weights_of_a_checkpoint_are_meant() -> None:
    trained, mean = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    both, one, path = {STATE: mean, CURRENT: trained}, {STATE: trained}, Path("a.ckpt")
    found = [weights_in(state, which, path)["w"] for state, which in ((both, "raw"), (both, "averaged"), (one, "raw"))]
    assert [float(w) for w in found] == [1.0, 0.0, 1.0]
    assert unwrapped({"module.w": trained["w"], "b": mean["w"]}, torch.nn.Linear(1, 1)).keys() == {"module.w", "b"}


def test_of_two_checkpoints_of_a_step_the_first_by_name_is_kept(tmp_path: Path) -> None:
    for name, step in (("last.ckpt", 7), ("a.ckpt", 7), ("b.ckpt", 3)):
        torch.save({"state_dict": {}, "step": step}, tmp_path / name)
    found, left = in_order([tmp_path / "last.ckpt", tmp_path / "b.ckpt", tmp_path / "a.ckpt"])
    assert [c.path.name for c in found] == ["b.ckpt", "a.ckpt"] and [c.path.name for c in left] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Job failed:\n-----\nTraceback ...\nValueError: no loss\n-----\nsee the log\n", "ValueError: no loss"),
        ("first\n\n  last  \n", "last"),
        ("", "RuntimeError"),
    ],
)
def test_what_a_job_failed_with_is_the_last_line_of_its_traceback(text: str, said: str) -> None:
    assert _reason(RuntimeError(text)) == said


def test_devices_are_all_there_are_or_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert named_devices(None) == [WorkerDevice("cpu")] == named_devices(["cpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert named_devices(None) == [WorkerDevice("cuda:0"), WorkerDevice("cuda:1")]
    with pytest.raises(ValueError, match=r"devices=\[\]: name at least one"):
        named_devices([])
    with pytest.raises(ValueError, match="cuda:7"):
        named_devices(["cuda:7"])


def test_a_cluster_is_told_what_it_does_not_know_and_is_asked_nothing_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match=r"cluster parameters \{'minutes': 3\}: "):
        on_cluster(tmp_path, "debug", {"minutes": 3})
    assert list(on_cluster(tmp_path, "debug")([])) == []
    found: list[Any] = []
    monkeypatch.setattr(executors, "measure_point", lambda task, device: found.append((task, device)))
    for gpu, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        executors._job("task")  # type: ignore[arg-type]
        assert found[-1] == ("task", device)


def test_gamma_of_a_curve_is_settled_once_for_the_weights_it_is_of(tmp_path: Path) -> None:
    """Other weights, a part of them, or another module have their own; a file that says nothing is none."""
    point = tmp_path / "step=5.ckpt"
    torch.save({"state_dict": runs.plain().state_dict()}, point)
    points = in_order([point])[0]
    config = config_of(tmp_path, module="tests.sweep.runs:plain")
    first = _settle(points, config, tmp_path)
    kept = json.loads((tmp_path / SWEEP_FILE).read_text(encoding="utf-8"))
    assert kept["localization"] == first and kept["first"] == str(point)
    for change, expected in (
        ({}, 123.0),
        ({"weights": "averaged"}, first),
        ({"restrict": ["net.0.*"]}, first),
        ({"module": "other:Net"}, first),
        ({"localization": "much"}, first),
    ):
        (tmp_path / SWEEP_FILE).write_text(json.dumps({**kept, "localization": 123.0, **change}), encoding="utf-8")
        assert _settle(points, config, tmp_path) == expected, change
    some = _settle(points, config_of(tmp_path, module="tests.sweep.runs:plain", restrict=["*.weight"]), tmp_path)
    assert some != first


def test_points_of_a_curve_are_held_against_each_other_by_the_chains_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the monitor does."""
    told: list[Any] = []
    monkeypatch.setattr("lightning_slt.sweep.run.detect_transitions", lambda *a, **k: told.append((a, k)) or [])
    estimates = [make_estimate(step=step, se=0.5, owed=0.3, lean=0.1, valid=step > 3) for step in (3, 9)]
    transitions_of(estimates, 0.2)
    (steps, means, errors, losses, comparable), options = told[0]
    assert steps.tolist() == [3.0, 9.0] and options == {"false_alarms": 0.2}
    columns = {"mean": means, "chain_se": errors, "init_loss": losses, "comparable": comparable}
    for name, column in columns.items():
        assert np.array_equal(column, [getattr(e, name) for e in estimates])
