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
