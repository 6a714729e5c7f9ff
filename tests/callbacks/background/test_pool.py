"""Workers beside training on a machine that has run out of something: training goes on, and what is wrong is said."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_slt.callbacks.background import pool as pool_room
from lightning_slt.callbacks.background.devices import WorkerDevice
from lightning_slt.callbacks.background.pool import Result, WorkerPool
from lightning_slt.callbacks.background.travel import write_pickled
from lightning_slt.durable import save_tensors


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may be longer than 100 kB."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_said_to_be_one(tmp_path: Path, full_disk: None) -> None:
    """And not what torch makes of it, nor something that cannot be pickled."""
    weights = {"w": torch.zeros(100_000)}
    with pytest.raises(OSError, match="File too large"):
        save_tensors(weights, tmp_path / "direct.pt")
    with pytest.raises(OSError, match="File too large"):
        write_pickled(weights, tmp_path / "snapshot.pt", "snapshot")
    assert not (tmp_path / "snapshot.pt").exists()


def test_an_error_that_is_not_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="local object"):
        save_tensors(lambda: None, tmp_path / "function.pt")


@pytest.mark.parametrize("started", [0, 1], ids=["none at all", "none again"])
def test_training_goes_on_where_no_worker_can_be_started(
    started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that has ended a worker for its memory may have none for the next one either."""
    real, seen = subprocess.Popen, []

    def popen(command: list[str], **options: Any) -> Any:
        seen.append(command)
        if len(seen) > started:
            raise OSError(12, "Cannot allocate memory")
        return real([sys.executable, "-c", ""], stdin=subprocess.DEVNULL, pass_fds=options["pass_fds"])

    monkeypatch.setattr(pool_room.subprocess, "Popen", popen)
    pool = WorkerPool(tmp_path, [WorkerDevice("cpu")], course=dict)
    pool.send(10)
    results: list[Result] = []
    until = time.monotonic() + 4.0
    while not results and time.monotonic() < until:
        results += pool.take()
        time.sleep(0.02)
    assert [(r.step, r.error) for r in results] == [
        (10, "workers could not be started: OSError: [Errno 12] Cannot allocate memory")
    ]
    pool.send(20)
    assert [r.step for r in pool.take()] == [20]
    assert pool.pending == [] and pool.processes == [] and len(seen) == started + 1


def finished(folder: Path, step: int, **state: Any) -> None:
    nothing = {"estimate": None, "influence": None, "course": None, "error": None}
    save_tensors({**nothing, **state}, pool_room.result_path(folder, step))


def pool_with(folder: Path, *steps: int, **settings: Any) -> WorkerPool:
    """With these snapshots out, and no worker."""
    pool = WorkerPool(folder, [WorkerDevice("cpu")], course=lambda: {"from": "training"}, **settings)
    pool._sent += [pool_room._Sent(step) for step in steps]
    return pool


def test_new_workers_go_on_from_the_last_firing_that_is_finished(tmp_path: Path) -> None:
    """Whether its result was taken or not; one that failed has left nothing."""
    pool = pool_with(tmp_path, 5, 8, 9, 12)
    assert pool._latest_course() == {"from": "training"}
    finished(tmp_path, 5, course={"from": "5"})
    finished(tmp_path, 8, course={"from": "8"})
    finished(tmp_path, 9, error="it failed")
    pool._count_whole()
    assert [sent.done for sent in pool._sent] == [True, True, False, False]
    pool._sent[2].done = True
    assert pool._latest_course() == {"from": "8"}


def test_a_snapshot_is_done_when_the_worker_that_writes_has_said_so(tmp_path: Path) -> None:
    pool = pool_with(tmp_path, 5, 8)
    worker: Any = None
    pool._hear(1, worker, {"done": 5})
    assert not pool._sent[0].done
    pool._given_up = 2
    pool._hear(0, worker, {"done": 5})
    assert [sent.done for sent in pool._sent] == [True, False] and pool._given_up == 0
    finished(tmp_path, 5, error="it failed")
    assert [(result.step, result.error) for result in pool.take()] == [(5, "it failed")] and pool.pending == [8]


def test_steps_that_workers_have_done_are_told_once(tmp_path: Path) -> None:
    pool, told = pool_with(tmp_path, 5), []
    pool.steps_done = 40
    looks = iter([False, False, False, False, True, True])
    assert list(pool.wait(60.0, lambda: next(looks), told.append)) == [] and told == [40]


def test_the_folder_goes_but_for_results_that_are_promised(tmp_path: Path) -> None:
    folder = tmp_path / "background"
    folder.mkdir()
    for step in (5, 8):
        finished(folder, step)
    (folder / "kit.pt").touch()
    pool = pool_with(folder)
    pool.clear(keep=[5, 9])
    assert [path.name for path in folder.iterdir()] == ["result_000000005.pt"]
    pool.clear(keep=[9])
    assert not folder.exists()
