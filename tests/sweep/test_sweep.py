"""The curve of a run from its checkpoints: that of a monitor, done once, whatever comes in between."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_slt import RMSpropSGLD
from lightning_slt.callbacks.background.devices import WorkerDevice
from lightning_slt.cli import main
from lightning_slt.config import load
from lightning_slt.influence_record import InfluenceRecord
from lightning_slt.record import RunRecord
from lightning_slt.sweep import SweepConfig, sweep
from lightning_slt.sweep.checkpoint import Checkpoint, in_order, unwrapped
from lightning_slt.sweep.executors import Executor, Outcome, locally, on_cluster
from lightning_slt.sweep.point import Task, measure_point
from lightning_slt.transition_record import TransitionLog
from tests.sweep import runs

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def config(tmp_path: Path) -> SweepConfig:
    return load(runs.settings(folder=str(tmp_path / "sweep")), schema=SweepConfig)


def test_every_argument_of_a_sampler_reaches_the_point_that_is_measured() -> None:
    """A result hangs on them, and a point is measured by what ``decides`` says and nothing else."""
    sampler = {"name": "RMSpropSGLD", "lr": 1e-4, "kappa": 0.3}
    config = load(runs.settings(sampler=sampler), schema=SweepConfig)
    told = load(json.loads(json.dumps(config.decides())), schema=SweepConfig)
    assert told.settings().sampler == config.settings().sampler == RMSpropSGLD(lr=1e-4, kappa=0.3)
    other = load(runs.settings(sampler={**sampler, "kappa": 0.4}), schema=SweepConfig)
    assert other.decides() != config.decides()


def here(measured: list[int], fail_after: int = 1000) -> Executor:
    """In this process; keeps the steps, and is interrupted after some of them."""

    def run(tasks: Sequence[Task]) -> Iterator[Outcome]:
        for task in tasks:
            if len(measured) == fail_after:
                raise KeyboardInterrupt
            try:
                measure_point(task)
            except Exception as error:
                yield task, f"{type(error).__name__}: {error}"
                continue
            measured.append(task.step)
            yield task, None

    return run


def assert_same_points(ours: Any, theirs: Any) -> None:
    assert [e.step for e in ours] == [e.step for e in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.trace, b.trace)
        assert (a.mean, a.se, a.init_loss, a.nbeta, a.localization) == (
            b.mean, b.se, b.init_loss, b.nbeta, b.localization)  # fmt: skip


@pytest.mark.parametrize("data", ["loader", pytest.param("Data", marks=pytest.mark.slow)])
def test_the_curve_is_that_of_a_monitor_that_was_there(data: str, config: SweepConfig, tmp_path: Path) -> None:
    """Bit for bit, where the monitor starts every firing at the weights; with influence."""
    paths, monitor = runs.train(tmp_path, probe=8, num_draws=20)
    config.data, config.probe, config.num_draws = f"tests.sweep.runs:{data}", 8, 20
    result = sweep(paths[::-1], config, here([]))
    assert [e.step for e in result.estimates] == [2, 4, 6, 8, 10, 12]
    assert_same_points(result.estimates, monitor.estimates)
    for a, b in zip(result.influences, monitor.influences, strict=True):
        torch.testing.assert_close(a.self_influence, b.self_influence, rtol=0.0, atol=0.0)
    assert_same_points(list(RunRecord(result.folder).read()), monitor.estimates)
    assert [i.step for i in InfluenceRecord(result.folder).read()] == [2, 4, 6, 8, 10, 12]
    assert TransitionLog.read(result.folder).offline == ()  # six points are no curve


def test_queries_of_a_datamodule_are_those_it_validates_on(config: SweepConfig, tmp_path: Path) -> None:
    paths, _ = runs.train(tmp_path / "run")
    config.probe, config.num_draws = 12, 8
    curves = []
    for config.query_data in ("tests.sweep.runs:six", "tests.sweep.runs:Validated"):
        result = sweep(paths[:1], config, here([]))
        assert not result.failed
        curves.append(result.influences[0])
    plain, validated = curves
    assert validated.query_index.tolist() == list(range(6))
    assert validated.matrix.shape == (6, 12) and bool(validated.matrix.abs().max() > 0)
    assert torch.equal(validated.matrix, plain.matrix)
    config.query_data = "tests.sweep.runs:number"
    failed = sweep(paths[:1], config, here([])).failed[2]
    assert "query_data='tests.sweep.runs:number': expected a Dataset, a DataLoader" in failed and "got int" in failed


@pytest.mark.parametrize("data", ["loader", "Data"])
def test_a_plain_module_has_the_curve_of_the_one_that_was_trained(
    data: str, config: SweepConfig, tmp_path: Path
) -> None:
    """With a loss of the user's; it has none of the hooks for a batch on its way to the step."""
    paths, _ = runs.train(tmp_path)
    config.data = f"tests.sweep.runs:{data}"
    trained = sweep(paths[:2], config, here([]))
    config.module, config.loss_fn = "tests.sweep.runs:bare", "tests.sweep.runs:loss_of_bare"
    config.folder = str(tmp_path / "plain")
    config.localization = trained.estimates[0].localization
    plain = sweep(paths[:2], config, here([]))
    assert not plain.failed
    assert_same_points(plain.estimates, trained.estimates)


def test_what_is_done_is_not_done_again(config: SweepConfig, tmp_path: Path) -> None:
    paths, _ = runs.train(tmp_path)
    first: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        sweep(paths, config, here(first, fail_after=2))
    second: list[int] = []
    result = sweep(paths, config, here(second))
    assert (first, second) == ([2, 4], [6, 8, 10, 12])
    assert (result.known, result.measured, result.failed) == (2, 4, {})
    third: list[int] = []
    assert_same_points(sweep(paths, config, here(third)).estimates, result.estimates)
    assert third == []
    config.seed = 1  # another question
    assert sweep(paths[:1], config, here(third)).measured == 1 and third == [2]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_result_that_is_not_whole_is_not_trusted(damage: str, config: SweepConfig, tmp_path: Path) -> None:
    paths, _ = runs.train(tmp_path)
    whole = sweep(paths[:3], config, here([]))
    file = sorted((whole.folder / "points").iterdir())[1]
    data = file.read_bytes()
    damaged = {"cut": data[:-7], "changed": data[:-7] + b"?" + data[-6:], "empty": b""}
    file.write_bytes(damaged[damage])
    (whole.folder / "points" / (file.name + ".123.tmp")).write_bytes(data)  # a writer that was killed
    again: list[int] = []
    result = sweep(paths[:3], config, here(again))
    assert again == [4]
    assert_same_points(result.estimates, whole.estimates)


def test_raw_and_averaged_weights(config: SweepConfig, tmp_path: Path) -> None:
    paths, monitor = runs.train(tmp_path, EMAWeightAveraging(decay=0.5))
    lines: list[str] = []
    raw = sweep(paths, config, here([]), lines.append)
    assert "raw weights" in lines[0]
    assert lines[1:] == [str(e) for e in raw.estimates]
    assert all(line.startswith(f"step {e.step}: LLC") for line, e in zip(lines[1:], raw.estimates, strict=True))
    assert_same_points(raw.estimates, monitor.estimates)  # chains during training see raw weights
    config.weights = "averaged"
    averaged = sweep(paths, config, here([]), lines.append)
    assert averaged.weights == "averaged"
    stored = torch.load(paths[-1], weights_only=False)
    alone = {"state_dict": stored["state_dict"], "hyper_parameters": {"lr": 1e-2}, "step": 12, "epoch": 1}
    torch.save({**alone, "pytorch-lightning_version": "2.6.0"}, tmp_path / "averaged.ckpt")
    config.weights, config.localization = "raw", averaged.estimates[0].localization
    assert_same_points(sweep([tmp_path / "averaged.ckpt"], config, here([])).estimates, averaged.estimates[-1:])
    assert not torch.equal(raw.estimates[-1].trace, averaged.estimates[-1].trace)


def test_averaged_weights_that_are_not_there(config: SweepConfig, tmp_path: Path) -> None:
    paths, _ = runs.train(tmp_path)
    config.weights = "averaged"
    with pytest.raises(ValueError, match=r"weights='averaged': .* has no averaged weights .* Set weights='raw'"):
        sweep(paths, config, here([]))


@pytest.mark.slow
def test_two_devices_share_the_checkpoints_and_a_death_costs_one_point(config: SweepConfig, tmp_path: Path) -> None:
    paths, monitor = runs.train(tmp_path)
    config.module = "tests.sweep.runs:Dies"
    result = sweep(paths, config, locally([WorkerDevice("cpu", (0,)), WorkerDevice("cpu")]))
    assert result.failed == {4: "2 processes died at it (out of memory?)"}
    assert_same_points(result.estimates, [e for e in monitor.estimates if e.step != 4])


@pytest.mark.slow
def test_jobs_of_a_cluster(config: SweepConfig, tmp_path: Path) -> None:
    """submitit's local executor: processes of their own, as on a machine of the cluster."""
    pytest.importorskip("submitit")
    paths, monitor = runs.train(tmp_path)
    config.module = "tests.sweep.runs:Fails"
    executor = on_cluster(tmp_path / "jobs", "local", {"timeout_min": 5})
    result = sweep(paths[:2], config, executor)
    assert list(result.failed) == [4] and "the step failed inside a chain" in result.failed[4]
    assert_same_points(result.estimates, monitor.estimates[:1])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that fails is named, and tried again by the next call, which does nothing else."""
    paths, monitor = runs.train(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_slt.sweep.run.locally", lambda devices: here([]))
    file = tmp_path / "cfg.yaml"
    file.write_text(yaml.safe_dump(runs.settings(module="tests.sweep.runs:Fails", folder="found")))
    command = ["sweep", *map(str, [*paths, paths[0]]), "--config", str(file)]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "6 checkpoints, 0 measured already; raw weights" in said
    assert "step 4: failed: RuntimeError: the step failed inside a chain" in said
    assert "5 points of raw weights (5 measured now), 0 transitions, in found" in said
    (tmp_path / "repaired").touch()
    assert main(command) == 0
    assert "6 points of raw weights (1 measured now)" in capsys.readouterr().out
    assert_same_points(list(RunRecord(tmp_path / "found").read()), monitor.estimates)
    assert main([*command, "--set", "weights=mean"]) == 1
    assert "weights='mean': must be 'raw' or 'averaged'" in capsys.readouterr().err


def test_settings_stand_behind_the_file_or_after_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints, whose names have equals signs too, may stand behind the file as well."""
    paths, _ = runs.train(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_slt.sweep.run.locally", lambda devices: here([]))
    path = tmp_path / "epoch=0-step=2.ckpt"
    path.write_bytes(Path(paths[0]).read_bytes())
    file = tmp_path / "cfg.yaml"
    file.write_text(yaml.safe_dump(runs.settings(folder="found")))
    quick = ["num_draws=8", "num_chains=3"]
    assert main(["sweep", str(path), "--config", str(file), *quick, "--set", "num_chains=2"]) == 0
    out = capsys.readouterr().out
    assert "1 checkpoint, 0 measured already" in out and "2 chains x 8 draws" in out
    assert "1 point of raw weights (1 measured now), 0 transitions, in found" in out
    assert main(["sweep", "--config", str(file), *quick, str(path), "--set", "num_chains=2"]) == 0
    assert "1 checkpoint, 1 measured already" in capsys.readouterr().out
    assert main(["sweep", "--config", str(file), *quick]) == 1
    assert "no checkpoints were given" in capsys.readouterr().err
    assert main(["sweep", "none=1.ckpt", "--config", str(file)]) == 1
    assert "none=1.ckpt: no such checkpoint. Give a file that is there." in capsys.readouterr().err


def test_a_sweep_that_is_killed_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    paths, monitor = runs.train(tmp_path)
    file = tmp_path / "cfg.yaml"
    file.write_text(yaml.safe_dump(runs.settings(folder=str(tmp_path / "found"), devices=["cpu"])))
    arguments = ["sweep", *map(str, paths), "--config", str(file)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-m", "lightning_slt.cli", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd=root)
    points = tmp_path / "found" / "points"
    while not list(points.glob("*.pt")):  # the test's own timeout ends this
        assert process.poll() is None
        time.sleep(0.05)
    started = _descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert started
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        time.sleep(0.1)
    done = len(list(points.glob("*.pt")))
    assert 1 <= done <= 6
    measured: list[int] = []
    result = sweep(paths, load(str(file), schema=SweepConfig), here(measured))
    assert result.known == done and len(measured) == 6 - done
    assert_same_points(result.estimates, monitor.estimates)


def _descendants(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found += [int(stat.parent.name), *_descendants(int(stat.parent.name))]
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": "tests.sweep.runs"}, r"module='tests\.sweep\.runs': write it as package\.module:Name"),
        (
            {"module": "tests.sweep.runs:Nobody"},
            r"module='tests\.sweep\.runs:Nobody': cannot be imported: AttributeErr",
        ),
        ({"module": "nowhere.py:Net"}, r"module='nowhere\.py:Net': cannot be imported: FileNotFoundError"),
        ({"module": "tests.sweep.runs:dataset"}, r"gave a TensorDataset, and no torch module"),
        ({"module": "tests.sweep.runs:Model"}, r"module_args={}: do not fit .*missing a required argument: 'lr'"),
        (
            {"data": "tests.sweep.runs:of_size", "localization": 1.0},
            r"data_args={}: do not fit .*missing a required argument: 'size'",
        ),
        (
            {"data_args": {"sise": 3}, "localization": 1.0},
            r"data_args={'sise': 3}: do not fit data=.*unexpected keyword argument 'sise'",
        ),
        ({"probe": 0}, r"probe=0: must be at least 1"),
        ({"query": 3}, r"given without probe"),
        ({"num_draws": 0}, r"num_draws=0: must be at least 1"),
        ({"false_alarms": -1.0}, r"false_alarms: expected a rate above 0 .*got -1\.0"),
    ],
)
def test_what_cannot_be_measured_is_said(
    changes: dict[str, Any], message: str, config: SweepConfig, tmp_path: Path
) -> None:
    torch.save({"state_dict": runs.Model(0.1).state_dict(), "step": 5}, tmp_path / "a.pt")
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        sweep([tmp_path / "a.pt"], config, here([]))


def test_arguments_that_do_not_fit_the_data_leave_the_curve_of_before(config: SweepConfig, tmp_path: Path) -> None:
    """Localization is kept in the folder, so that nothing else asks for the data before the points do."""
    paths, _ = runs.train(tmp_path / "run")
    before = sweep(paths[:2], config, here([]))
    with pytest.raises(ValueError, match=r"data_args={'size': 3}: do not fit"):
        sweep(paths[:2], dataclasses.replace(config, data_args={"size": 3}), here([]))
    assert_same_points(list(RunRecord(before.folder).read()), before.estimates)


def test_a_sweep_that_measures_nothing_leaves_the_curve_of_before(config: SweepConfig, tmp_path: Path) -> None:
    paths, _ = runs.train(tmp_path / "run")
    before = sweep(paths[:2], config, here([]))
    said: list[str] = []
    other = dataclasses.replace(config, num_draws=config.num_draws + 10)
    result = sweep(paths[:2], other, lambda tasks: ((task, "out of memory") for task in tasks), say=said.append)
    assert not result.estimates and len(result.failed) == 2
    assert_same_points(list(RunRecord(before.folder).read()), before.estimates)
    assert said[-1] == f"{before.folder}: the record of an earlier sweep is left as it was, since no point was measured"


def test_nothing_is_said_of_names_inside_wrappers_that_are_put_right(
    config: SweepConfig, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Lightning, which does not put them right, says of each that the checkpoint lacks it."""
    paths, _ = runs.train(tmp_path / "run")
    plain = sweep(paths[:1], config, here([]))
    stored = torch.load(paths[0], weights_only=False)
    stored["state_dict"] = {name.replace("net.", "net._orig_mod."): w for name, w in stored["state_dict"].items()}
    torch.save(stored, tmp_path / "compiled.ckpt")
    recwarn.clear()
    compiled = sweep([tmp_path / "compiled.ckpt"], config, here([]))
    assert_same_points(compiled.estimates, plain.estimates)
    assert [str(w.message) for w in recwarn if "Found keys" in str(w.message)] == []
    stored["state_dict"].popitem()
    torch.save(stored, tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match=r"cut\.ckpt: its weights do not fit module="):
        sweep([tmp_path / "cut.ckpt"], dataclasses.replace(config, folder=str(tmp_path / "other")), here([]))


def test_the_record_of_a_monitor_is_not_written_anew(config: SweepConfig, tmp_path: Path) -> None:
    torch.save({"state_dict": runs.Model(0.1).state_dict(), "step": 5}, tmp_path / "a.pt")
    record = Path(config.folder) / "estimates.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("kept\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"folder=.*holds the record of a run that a monitor measured.*another folder"):
        sweep([tmp_path / "a.pt"], config, here([]))
    assert record.read_text(encoding="utf-8") == "kept\n"


def test_what_is_of_another_kind_is_named(config: SweepConfig, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"checkpoints='last\.ckpt': expected a list of paths.*Give \['last\.ckpt'\]"):
        sweep("last.ckpt", config, here([]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"config=3: expected a SweepConfig, got int"):
        sweep([tmp_path / "a.pt"], 3, here([]))  # type: ignore[arg-type]
    config.probe = "a"  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"probe='a': expected a whole number, got str.*or left out"):
        sweep([tmp_path / "a.pt"], config, here([]))


def test_a_checkpoint_without_the_hyperparameters_of_its_module(config: SweepConfig, tmp_path: Path) -> None:
    """As of a module that does not call ``save_hyperparameters``."""
    stored = {"state_dict": runs.Model(0.1).state_dict(), "pytorch-lightning_version": "2.4.0", "global_step": 5}
    torch.save(stored, tmp_path / "a.ckpt")
    config.module, config.module_args = "tests.sweep.runs:Model", {}
    with pytest.raises(ValueError, match=r"module_args={}: do not fit .*'lr'. Hyperparameters in .*a\.ckpt: none"):
        sweep([tmp_path / "a.ckpt"], config, here([]))
    config.module_args = {"lr": 0.1}
    assert sweep([tmp_path / "a.ckpt"], config, here([])).measured == 1


def test_files_that_are_no_checkpoints(config: SweepConfig, tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "unnamed.ckpt")
    for name, message in (
        ("text", "cannot be read as a checkpoint"),
        ("list", "holds no 'state_dict'"),
        ("unnamed", "says nowhere which step it is of"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep([tmp_path / f"{name}.ckpt"], config, here([]))
    with pytest.raises(FileNotFoundError):
        sweep([tmp_path / "nothing.ckpt"], config, here([]))
    with pytest.raises(ValueError, match="no checkpoints were given"):
        sweep([], config, here([]))


def _damaged(path: Path, how: str) -> None:
    """A checkpoint of another module, of weights that are not finite, or one that a crash has cut off."""
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:1000])
        return
    state = torch.load(path, weights_only=False)
    for name, weight in state["state_dict"].items():
        if how == "another module":
            state["state_dict"][name] = torch.zeros(*weight.shape, 2)
        elif weight.is_floating_point():
            weight.fill_(float("nan"))
    torch.save(state, path)


@pytest.mark.parametrize("where", [0, 3], ids=["the first", "one of them"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", "cannot be read as a checkpoint"),
        ("another module", "its weights do not fit module='tests.sweep.runs:Model'"),
        ("not finite", "some of the current weights are not finite"),
    ],
)
def test_one_damaged_checkpoint_costs_its_point_alone(
    how: str, message: str, where: int, config: SweepConfig, tmp_path: Path
) -> None:
    paths, monitor = runs.train(tmp_path / "run")
    config.localization = None
    _damaged(paths[where], how)
    told: list[str] = []
    result = sweep(paths, config, here([]), told.append)
    step = 2 * (where + 1)
    assert [e.step for e in result.estimates] == [s for s in range(2, 13, 2) if s != step]
    # one posterior for the whole curve: that of the first weights that there are
    first = torch.load(paths[0 if where else 1], weights_only=False)["state_dict"]
    flat = torch.cat([first[name].flatten() for name, _ in runs.plain().named_parameters()])
    gamma = len(flat) / float(flat.square().sum())
    assert 1 < gamma < 100
    assert [e.localization for e in result.estimates] == pytest.approx([gamma] * 5)
    if where:
        assert_same_points(result.estimates, [e for e in monitor.estimates if e.step != step])
    if how == "cut off":
        assert not result.failed and list(result.unread) == [paths[where]] and message in result.unread[paths[where]]
    else:
        assert not result.unread and list(result.failed) == [step] and message in result.failed[step]
    assert sum("failed" in line and message in line for line in told) == 1


def test_none_of_the_checkpoints_is_of_the_module(config: SweepConfig, tmp_path: Path) -> None:
    paths, _ = runs.train(tmp_path / "run")
    for path in paths:
        _damaged(path, "another module")
    with pytest.raises(ValueError, match=r"step=2\.ckpt: its weights do not fit module='tests\.sweep\.runs:Model'"):
        sweep(paths, config, here([]))


def test_a_folder_stands_for_the_checkpoints_in_it(tmp_path: Path) -> None:
    for step in (7, 5):
        torch.save({"state_dict": runs.plain().state_dict()}, tmp_path / f"step={step}.ckpt")
    (tmp_path / "notes.txt").touch()
    found, left = in_order([tmp_path, tmp_path / "step=5.ckpt"])
    assert [(c.step, c.path.name) for c in found] == [(5, "step=5.ckpt"), (7, "step=7.ckpt")] and not left
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: a folder without checkpoints"):
        in_order([empty])
    (empty / ".metadata").touch()
    with pytest.raises(ValueError, match=r"in shards.*consolidate_checkpoint .*empty"):
        in_order([empty])


@pytest.mark.parametrize("module", ["plain", "Model"])
def test_pinned_snapshots_are_checkpoints_too(module: str, config: SweepConfig, tmp_path: Path) -> None:
    """Of a module that a function gives or a class; the step is in the file or in its name."""
    config.module, config.module_args = f"tests.sweep.runs:{module}", {"lr": 0.1}
    config.data = "tests.sweep.runs:dataset"
    torch.save({"state_dict": runs.plain().state_dict(), "step": 5, "epoch": 0}, tmp_path / "a.pt")
    torch.save({"state_dict": runs.plain().state_dict()}, tmp_path / "step=7.ckpt")
    result = sweep([tmp_path / "step=7.ckpt", tmp_path / "a.pt"], config, here([]))
    assert [(e.step, e.epoch) for e in result.estimates] == [(5, 0), (7, None)]


@pytest.mark.parametrize("key", ["global_step", "epoch"])
def test_a_checkpoint_of_no_step_costs_its_point_alone(key: str, config: SweepConfig, tmp_path: Path) -> None:
    config.module, config.data, state = "tests.sweep.runs:plain", "tests.sweep.runs:dataset", runs.plain().state_dict()
    good, bad = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"state_dict": state, "global_step": 5}, good)
    torch.save({"state_dict": state, "global_step": 6, key: None if key == "global_step" else []}, bad)
    told: list[str] = []
    result = sweep([good, bad], config, here([]), told.append)
    assert [e.step for e in result.estimates] == [5]
    assert list(result.unread) == [bad] and f"'{key}'" in result.unread[bad] and "whole number" in result.unread[bad]
    assert sum(line.startswith(f"{bad}: failed: ") for line in told) == 1


@pytest.mark.parametrize("prefix", ["_forward_module.", "_forward_module.module.", "_forward_module._orig_mod."])
def test_weights_stored_from_inside_fabric(prefix: str) -> None:
    module = runs.plain()
    state = module.state_dict()
    found = unwrapped({f"{prefix}{name}": w for name, w in state.items()}, module)
    assert found.keys() == state.keys() and all(found[name] is w for name, w in state.items())


def test_weights_stored_from_inside_ddp(config: SweepConfig, tmp_path: Path) -> None:
    """The point of the same weights; a module that has a ``module`` of its own keeps its names."""
    config.module, config.data, state = "tests.sweep.runs:plain", "tests.sweep.runs:dataset", runs.plain().state_dict()
    torch.save({"state_dict": state, "step": 5}, tmp_path / "a.pt")
    torch.save({"state_dict": {f"module.{name}": w for name, w in state.items()}, "step": 5}, tmp_path / "b.pt")
    bare, wrapped = (sweep([tmp_path / name], config, here([])).estimates for name in ("a.pt", "b.pt"))
    assert len(wrapped) == 1
    assert_same_points(wrapped, bare)
    inner = nn.Sequential(OrderedDict(module=nn.Linear(2, 1)))
    assert unwrapped(inner.state_dict(), inner).keys() == {"module.weight", "module.bias"}


@pytest.mark.parametrize(
    ("global_step", "optimizers", "batches", "step"),
    [(6, 1, 5, 6), (6, 1, 6, 6), (12, 2, 5, 6), (12, 2, 6, 6), (9, 2, 8, 9), (7, 1, None, 7)],
)
def test_the_step_is_the_count_of_batches_that_stepped(
    global_step: int, optimizers: int, batches: Any, step: int, tmp_path: Path
) -> None:
    """At the end of a batch Lightning's count is one behind, and two optimisers count twice."""
    state: dict[str, Any] = {"state_dict": {}, "global_step": global_step, "optimizer_states": [{}] * optimizers}
    if batches is not None:
        state["loops"] = {"fit_loop": {"epoch_loop.state_dict": {"_batches_that_stepped": batches}}}
    torch.save(state, tmp_path / "a.ckpt")
    assert Checkpoint.of(tmp_path / "a.ckpt").step == step
