"""The curve of a run from its checkpoints: that of a monitor, done once, whatever comes in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_slt import RMSpropSGLD
from lightning_slt.callbacks.background.devices import WorkerDevice
from lightning_slt.cli import main
from lightning_slt.config import load
from lightning_slt.influence_record import InfluenceRecord
from lightning_slt.record import RunRecord
from lightning_slt.sweep import SweepConfig, sweep
from lightning_slt.sweep.executors import locally, on_cluster
from lightning_slt.transition_record import TransitionLog
from tests.sweep import runs
from tests.sweep.runs import assert_same_points, here

pytestmark = pytest.mark.timeout(240)


def test_every_argument_of_a_sampler_reaches_the_point_that_is_measured() -> None:
    """A result hangs on them, and a point is measured by what ``decides`` says and nothing else."""
    sampler = {"name": "RMSpropSGLD", "lr": 1e-4, "kappa": 0.3}
    config = load(runs.settings(sampler=sampler), schema=SweepConfig)
    told = load(json.loads(json.dumps(config.decides())), schema=SweepConfig)
    assert told.settings().sampler == config.settings().sampler == RMSpropSGLD(lr=1e-4, kappa=0.3)
    other = load(runs.settings(sampler={**sampler, "kappa": 0.4}), schema=SweepConfig)
    assert other.decides() != config.decides()


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
