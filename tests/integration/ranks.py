"""Runs the scenarios of several ranks: ``python -m tests.integration.ranks MODULE FOLDER NAME:RANKS ...``.

Imports take longer than any scenario, and so does what a process does once, at its first run: one process imports
everything, makes one run, and forks the ranks of each scenario in turn. A scenario that takes longer than its limit
hangs: its ranks are killed, and the others still run. Each rank leaves ``FOLDER/NAME-RANKS/RANK.pt`` with what its
function returned, or the error that it ended with. Tests start it by :func:`launched_once` and read with
:func:`results_of`.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import registry

from lightning_slt.publish import publisher
from lightning_slt.record import Estimate
from tests.integration import models
from tests.integration.harness import FIGURES

ROOT = Path(__file__).parents[2]
DEFAULT_LIMIT = 60.0
Results = dict[str, Any]
Function = Callable[[Path, int], Results]
Runs = tuple[tuple[str, int], ...]
"""Names and ranks of scenarios; 0 ranks leave their start to Lightning."""


# -------------------------------------------------------------------------------------------------- on the tests' side


def launched_once(factory: pytest.TempPathFactory, module: str, name: str, runs: Runs, limit: float) -> Path:
    """The scenarios run once, in whichever xdist worker asks first; the others wait for it.

    Args:
        factory: of temporary folders.
        module: in ``tests/integration``, with ``SCENARIOS``, ``LIMITS`` and ``ALONE``, the first of which is run before
            the others.
        name: of the folder.
        runs: which scenarios.
        limit: seconds for all of them.
    """
    base = factory.getbasetemp()
    shared = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "log").exists():
            _launch(shared, module, runs, limit)
    return shared


def _launch(shared: Path, module: str, runs: Runs, limit: float) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.integration.ranks",
        module,
        str(shared),
        *(f"{name}:{n}" for name, n in runs),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(shared / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def results_of(folder: Path, name: str, world: int) -> list[Results]:
    """What each rank returned; fails with what a rank ended with."""
    paths = [place(folder, name, world) / f"{rank}.pt" for rank in range(max(world, 1))]
    missing = [path for path in paths if not path.exists()]
    assert not missing, f"{missing} missing; the log says:\n{(folder / 'log').read_text()[-3000:]}"
    results = [torch.load(path, weights_only=False) for path in paths]
    for rank, result in enumerate(results):
        assert "error" not in result, f"rank {rank}: {result['error']}"
    return results


def estimates_of(result: Results) -> list[Estimate]:
    return [Estimate.from_state_dict(state) for state in result["estimates"]]


def assert_ranks_agree(results: list[Results], steps: list[int]) -> list[Estimate]:
    """Every rank has the same estimates, at ``steps``, to the last bit."""
    first, *others = (estimates_of(result) for result in results)
    assert [e.step for e in first] == steps
    assert others
    for other in others:
        assert [e.step for e in other] == steps
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a.trace, b.trace) and torch.equal(a.per_chain, b.per_chain)
            assert (a.mean, a.se, a.init_loss, a.step_size, a.x) == (b.mean, b.se, b.init_loss, b.step_size, b.x)
            assert a.trace.isfinite().all()
    return first


# -------------------------------------------------------------------------------------------------- on the ranks' side


def place(folder: Path, name: str, world: int) -> Path:
    return folder / f"{name}-{world}"


def _rank(function: Function, here: Path, world: int, rank: int, port: int) -> None:
    """What one rank does, in its own process and process group."""
    os.setsid()
    if world > 1:
        # read by Lightning as "the processes exist already"
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank), WORLD_SIZE=str(world)
        )
    try:
        result = function(here / "root", world)
    except BaseException:
        result = {"error": traceback.format_exc()}
    torch.save(result, here / f"{rank}.pt")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_scenario(function: Function, here: Path, world: int, limit: float) -> None:
    here.mkdir(parents=True, exist_ok=True)
    fork, port = multiprocessing.get_context("fork"), _free_port()
    ranks = [fork.Process(target=_rank, args=(function, here, world, r, port)) for r in range(max(world, 1))]
    for process in ranks:
        process.start()
    end = time.monotonic() + limit
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    for rank, process in enumerate(ranks):
        if process.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            torch.save({"error": f"hung: killed after {limit} s"}, here / f"{rank}.pt")


def warm_up(function: Function, here: Path) -> None:
    """One run in one process: what it imports late, and the classes that ABCs have seen, is there in every fork."""
    function(here, 1)
    models.CHAIN_SAW.clear()


def main() -> None:
    torch.set_num_threads(1)
    for name in FIGURES:
        setattr(publisher, name, lambda *_, **__: None)
    os.fsync = lambda _: None
    registry.entry_points = functools.cache(registry.entry_points)  # type: ignore[assignment]
    module, folder = importlib.import_module(f"tests.integration.{sys.argv[1]}"), Path(sys.argv[2])
    warm_up(module.SCENARIOS[module.ALONE[0]], folder / "warm_up")
    gc.collect()
    gc.freeze()  # or each rank's collector writes to, and so copies, every page that it has of this process
    for item in sys.argv[3:]:
        name, world = item.split(":")
        start = time.monotonic()
        limit = module.LIMITS.get(name, DEFAULT_LIMIT)
        run_scenario(module.SCENARIOS[name], place(folder, name, int(world)), int(world), limit)
        print(f"{item}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
