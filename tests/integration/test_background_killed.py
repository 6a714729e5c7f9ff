"""Firings beside training whose workers die, or whose training does; and what two hundred of them leave behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from lightning_slt.record import RunRecord
from tests.integration import models
from tests.integration.background_runs import (  # noqa: F401 - the fixture is for all tests here
    _no_process_is_left,
    beside,
    children,
    workers_of,
)
from tests.integration.beside import STEPS, data, monitor_of
from tests.integration.harness import Scenario, SLTMonitor, assert_same, steps_of, tiny_monitor
from tests.integration.models import Net, loaders

pytestmark = pytest.mark.timeout(240)


class DiesInChains(Net):
    """The process ends in the step, as where memory runs out; never that of training."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.training and 4 < self.trainer.global_step < 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def test_a_snapshot_that_kills_its_worker_twice_is_given_up(tmp_path: Path) -> None:
    monitor = beside(on_failure="warn")
    with pytest.warns(
        UserWarning, match=r"step 8 failed .* 2 background workers died at it, the last one killed by sig"
    ):
        Scenario(DiesInChains, loaders).run(tmp_path, monitor)
    assert steps_of(monitor) == [4, 12]


class Killer(Callback):
    """Kills the workers at a random moment after each of the first ten batches."""

    def __init__(self, monitor: SLTMonitor, seed: int) -> None:
        self.monitor, self.random, self.kills = monitor, random.Random(seed), 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.kills < 10 and workers_of(self.monitor):
            # long enough for all of a worker's life: starting, reading, chains, writing, waiting
            time.sleep(self.random.uniform(0.0, 5.0))
            os.kill(self.random.choice(workers_of(self.monitor)), signal.SIGKILL)
            self.kills += 1


@pytest.mark.slow
@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]])
def test_workers_killed_at_ten_random_moments(devices: list[str], tmp_path: Path) -> None:
    """Every firing is reported or named as failed, none twice, and what is reported is right to the last bit."""
    scenario = Scenario(Net, lambda: loaders(56))
    settings: dict[str, Any] = {"every_n_train_steps": 1, "num_draws": 40, "warm_start": False}
    inline = tiny_monitor(**settings)
    without = scenario.run(tmp_path / "inline", inline)
    monitor = beside(devices=devices, on_failure="warn", max_pending=4, **settings)
    killer = Killer(monitor, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(without, scenario.run(tmp_path / "background", monitor, killer))
    assert killer.kills == 10
    failed = [
        int(str(w.message).split("at step ")[1].split()[0]) for w in caught if "failed and is left" in str(w.message)
    ]
    assert sorted(steps_of(monitor) + failed) == steps_of(inline) == list(range(1, 29))
    assert len(failed) <= 5  # each costs two workers
    by_step = {e.step: e for e in inline.estimates}
    for estimate in monitor.estimates:
        assert torch.equal(estimate.trace, by_step[estimate.step].trace)


# ------------------------------------------------------------------------------------------------------------- 200 fold


class Counts(Callback):
    """What training and its worker hold, each time a batch is done."""

    def __init__(self, monitor: SLTMonitor) -> None:
        self.monitor = monitor
        self.seen: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        [worker] = workers_of(self.monitor)
        self.seen.append(
            {
                "processes": len(children()),
                "workers": worker,
                **{f"files of {n}": len(os.listdir(f"/proc/{p}/fd")) for n, p in (("us", os.getpid()), ("it", worker))},
                **{f"MiB of {n}": resident(p) for n, p in (("us", os.getpid()), ("it", worker))},
                "files in the folder": sum(1 for _ in Path(str(self.monitor.folder)).glob("background/*")),
            }
        )


def resident(pid: int) -> int:
    """MiB of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.slow
def test_two_hundred_firings_leave_nothing_behind(tmp_path: Path) -> None:
    monitor = beside(every_n_train_steps=1, max_pending=1)
    counts = Counts(monitor)
    scenario = Scenario(models.Plain, lambda: loaders(400), lambda: {"max_epochs": 2})
    scenario.run(tmp_path, monitor, counts)
    assert steps_of(monitor) == list(range(1, 201))
    early, late = counts.seen[50], counts.seen[-1]
    for name in ("processes", "workers", "files of us"):
        assert late[name] == early[name], name
    # it may be in the middle of a file when we look: one that leaked at each firing would be 150
    assert abs(late["files of it"] - early["files of it"]) <= 2
    assert late["files in the folder"] <= early["files in the folder"] + 2
    assert late["MiB of it"] - early["MiB of it"] <= 16
    # the history itself: 200 estimates with their traces, and what the test keeps of training
    assert late["MiB of us"] - early["MiB of us"] <= 32


# ------------------------------------------------------------------------------------------------- training is killed


def start(folder: Path, *arguments: float) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "tests.integration.beside", str(folder), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": root}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=root, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)


def wait_for_the_end_of(pids: Iterable[int]) -> None:
    """Until none is there any more; the test's own timeout ends it."""
    while any(_is_alive(pid) for pid in pids):
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers_told(folder: Path) -> set[int]:
    return {int(line) for line in (folder / "workers.txt").read_text().split()}


@pytest.mark.slow
def test_training_killed_and_resumed_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    """Three times, at random moments after random steps; the record is that of a run that nobody killed."""
    moments = random.Random(0)
    for last in sorted(moments.sample(range(2, STEPS), 3)):
        process = start(tmp_path, last, moments.uniform(0.0, 8.0))
        assert process.wait() == -signal.SIGKILL
        reported = {e.step: e.trace for e in RunRecord(tmp_path / "slt").read()}
        wait_for_the_end_of(workers_told(tmp_path))
    assert start(tmp_path).wait() == 0
    wait_for_the_end_of(workers_told(tmp_path))
    record = list(RunRecord(tmp_path / "slt").read())
    assert sorted(e.step or 0 for e in record) == list(range(1, STEPS + 1))
    inline = monitor_of(tmp_path / "inline")
    Scenario(models.Plain, data).run(tmp_path, inline)
    expected = {e.step: e.trace for e in inline.estimates}
    for estimate in record:
        assert torch.equal(estimate.trace, expected[estimate.step])
    for step, trace in reported.items():
        assert torch.equal(trace, expected[step])
    left = {path.name.split("_")[0] for path in (tmp_path / "slt" / "background").glob("*")}
    assert left <= {"result"}  # those that the last checkpoints wait for


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_no_worker_outlives_training(how: signal.Signals, tmp_path: Path) -> None:
    """A signal to the whole group, as Ctrl-C sends it, or to training alone, as a scheduler does."""
    process = start(tmp_path, -1, 0.5)
    while not (tmp_path / "trains").exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = workers_told(tmp_path)
    assert len(workers) == 1 and all(map(_is_alive, workers))
    if how is signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    process.wait()
    wait_for_the_end_of(workers)
