"""The workers beside training, seen from training: snapshots go out, results come in, and neither may end a run.

Snapshots are measured one after another, in the order in which they were sent, by all workers together. A snapshot
stays on disk until its result has been taken, so that a worker that dies loses nothing: the workers are started again
and go on with it. A snapshot at which they die twice is given up.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Optional

import torch

from lightning_slt.callbacks.background.devices import WorkerDevice
from lightning_slt.callbacks.background.travel import read_pickled
from lightning_slt.callbacks.background.worker import Orders, result_path, snapshot_path, torch_flags
from lightning_slt.durable import save_tensors, write_durably
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.record import Estimate

MAX_DEATHS = 2
"""Workers that a snapshot may cost before it is given up."""
MAX_GIVEN_UP = 3
"""Snapshots given up in a row after which no worker is started any more."""
PAUSE = 0.02
"""Seconds between looks at the pipe while training waits."""
LAST_WORDS = 4
"""Lines of a dead worker's log that are reported."""
PATIENCE = 5.0
"""Seconds that a worker is given to end by itself."""


_LIFE = (
    # first of all: Ctrl-C goes to all of a terminal, and it is for training to say what ends
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from lightning_slt.callbacks.background.worker import main; main(sys.argv[1])"
)


@dataclass(frozen=True)
class Result:
    """What came of a snapshot.

    Attributes:
        step: of the snapshot.
        estimate, influence: what was measured; None where it failed.
        course: what the firing leaves, as of :meth:`~lightning_slt.firing.Course.state_dict`; None where it is not
            known.
        error: what went wrong; None where nothing did.
        influence_error: why there is an estimate and no influence; None where nothing went wrong.
    """

    step: int
    estimate: Optional[Estimate] = None
    influence: Optional[InfluenceEstimate] = None
    course: Optional[Mapping[str, Any]] = None
    error: Optional[str] = None
    influence_error: Optional[str] = None


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False


@dataclass
class _Sent:
    step: int
    deaths: int = 0
    done: bool = False


@dataclass
class WorkerPool:
    """Workers that share the chains of each snapshot, and the queue in front of them.

    Args:
        folder: of kit, snapshots and results; the kit must be there before the first snapshot is sent.
        devices: one worker each.
        course: asked for what the firings so far have left, whenever workers are started.
        warm_start: see :class:`~lightning_slt.firing.Course`.
        main: see :func:`~lightning_slt.callbacks.background.travel.main_script`.

    Attributes:
        restarts: how often workers had to be started again.
        broken: why none is started any more; None while there is hope.
    """

    folder: Path
    devices: Sequence[WorkerDevice]
    course: Callable[[], Mapping[str, Any]]
    warm_start: bool = True
    main: Mapping[str, str] = field(default_factory=dict)
    restarts: int = 0
    broken: Optional[str] = None
    steps_done: int = 0
    _workers: list[_Worker] = field(default_factory=list)
    _sent: list[_Sent] = field(default_factory=list)
    _given_up: int = 0
    _starts: int = 0

    @property
    def pending(self) -> list[int]:
        """Steps whose results have not been taken yet, oldest first."""
        return [sent.step for sent in self._sent]

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers that were started and not yet seen to end."""
        return [worker.process.pid for worker in self._workers]

    def import_main(self, main: Mapping[str, str]) -> None:
        """Have workers import the script that trains, where they need it from now on and have not done so."""
        if not main or self.main:
            return
        self.main = main
        if self._workers:
            self._end_processes()
            self._count_whole()
            if any(not sent.done for sent in self._sent):
                self._start_or_break()

    def _start_or_break(self) -> None:
        """In the middle of training, which goes on where the machine has no memory or disk for workers any more."""
        try:
            self.start()
        except OSError as error:
            self._break(f"workers could not be started: {type(error).__name__}: {error}")

    def start(self) -> None:
        """Start the workers; returns at once, they need some seconds to be ready."""
        self._starts += 1
        course = self.folder / "course.pt"
        state = dict(self._latest_course())
        write_durably(course, lambda temporary: save_tensors(state, temporary))
        rendezvous = self.folder / f"rendezvous_{self._starts}"
        rendezvous.unlink(missing_ok=True)
        for rank, device in enumerate(self.devices):
            ours, theirs = Pipe(duplex=True)
            orders = Orders(
                pipe=theirs.fileno(),
                parent=os.getpid(),
                folder=str(self.folder),
                rank=rank,
                world_size=len(self.devices),
                device=device.device,
                cores=device.cores,
                threads=torch.get_num_threads(),
                course=str(course),
                rendezvous=str(rendezvous.resolve()),
                warm_start=self.warm_start,
                sys_path=tuple(path or os.getcwd() for path in sys.path),
                main=dict(self.main),
                torch_flags=torch_flags(),
            )
            with theirs, open(self._log(rank), "ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", _LIFE, orders.as_json()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs.fileno(),),
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(orders.sys_path)},
                )
            self._workers.append(_Worker(process, ours))
        for sent in self._sent:
            if not sent.done:
                self._order(sent.step)

    def _latest_course(self) -> Mapping[str, Any]:
        """What the last finished firing has left, whether its result was taken or not."""
        for sent in reversed([sent for sent in self._sent if sent.done]):
            left = read_result(self.folder, sent.step).course
            if left is not None:
                return left
        return self.course()

    def send(self, step: int) -> None:
        """Have the snapshot of a step measured; its file must be there."""
        self._sent.append(_Sent(step))
        if self.broken is None and not self._workers:
            self._start_or_break()
        elif self.broken is None:
            self._order(step)

    def _order(self, step: int) -> None:
        for worker in self._workers:
            # a worker that is gone is found at the next look
            with suppress(OSError):
                worker.connection.send_bytes(json.dumps({"measure": step}).encode())

    def take(self) -> list[Result]:
        """The results that are there, in the order in which the snapshots were sent; does not wait."""
        self._look()
        results = []
        while self._sent and (self._sent[0].done or self.broken is not None):
            sent = self._sent.pop(0)
            results.append(read_result(self.folder, sent.step) if sent.done else Result(sent.step, error=self.broken))
            snapshot_path(self.folder, sent.step).unlink(missing_ok=True)
        return results

    def wait(self, seconds: float, enough: Callable[[], bool], progress: Callable[[int], None]) -> Iterator[Result]:
        """Results as they come, until there are enough of them or time is up.

        Args:
            seconds: at the most.
            enough: asked before each look.
            progress: told of chain-steps done.
        """
        until = time.monotonic() + seconds
        self._tell_all({"watch": True})
        try:
            while not enough() and self._sent:
                yield from self.take()
                if self.steps_done:
                    progress(self.steps_done)
                    self.steps_done = 0
                if enough() or not self._sent or time.monotonic() > until:
                    break
                time.sleep(PAUSE)
        finally:
            self._tell_all({"watch": False})

    def _tell_all(self, word: dict[str, Any]) -> None:
        for worker in self._workers:
            with suppress(OSError):
                worker.connection.send_bytes(json.dumps(word).encode())

    def _look(self) -> None:
        """Hear what the workers have to say, and see whether they live."""
        for rank, worker in enumerate(self._workers):
            try:
                # what it says may be that all of them have been ended
                while self.broken is None and worker.connection.poll(0):
                    self._hear(rank, worker, json.loads(worker.connection.recv_bytes()))
            except (EOFError, OSError):
                self._bury(rank)
                return
            if self.broken is not None:
                return

    def _hear(self, rank: int, worker: _Worker, word: Mapping[str, Any]) -> None:
        if "ready" in word:
            worker.ready = True
        elif "steps" in word:
            self.steps_done += int(word["steps"])
        elif "done" in word and rank == 0:
            for sent in self._sent:
                if sent.step == word["done"]:
                    sent.done = True
            self._given_up = 0
        elif "failed" in word:
            self._break(f"a worker could not start: {word['failed']}")

    def _bury(self, rank: int) -> None:
        """A worker is dead: what it was at is begun again by new ones, or given up."""
        worker = self._workers[rank]
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(PATIENCE)
        code = worker.process.returncode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        words = self._last_words(rank)
        self._end_processes()
        self._count_whole()
        current = next((sent for sent in self._sent if not sent.done), None)
        if current is None:
            return  # nothing is lost; the next snapshot starts new ones
        current.deaths += 1
        if current.deaths >= MAX_DEATHS:
            current.done = True
            self._given_up += 1
            reason = f"{current.deaths} background workers died at it, the last one {how}{words}"
            self._write_error(current.step, reason)
            if self._given_up >= MAX_GIVEN_UP:
                self._break(f"{self._given_up} firings in a row were lost with their workers: {how}{words}")
                return
        if any(not sent.done for sent in self._sent):
            self.restarts += 1
            self._start_or_break()

    def _count_whole(self) -> None:
        """What workers had finished before their end counts."""
        for sent in self._sent:
            sent.done = sent.done or self._is_whole(sent.step)

    def _is_whole(self, step: int) -> bool:
        path = result_path(self.folder, step)
        if not path.exists():
            return False
        return read_result(self.folder, step).error is None

    def _write_error(self, step: int, reason: str) -> None:
        path = result_path(self.folder, step)
        state = {"estimate": None, "influence": None, "course": None, "error": reason}
        with suppress(OSError):
            write_durably(path, lambda temporary: save_tensors(state, temporary))

    def _break(self, reason: str) -> None:
        self.broken = reason
        self._end_processes()

    def _log(self, rank: int) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"worker_{rank}.log"

    def _last_words(self, rank: int) -> str:
        try:
            lines = self._log(rank).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f" ({' | '.join(lines[-LAST_WORDS:])})" if lines else ""

    def close(self) -> None:
        """End the workers, now; what is pending stays on disk."""
        self._tell_all({"stop": True})
        self._end_processes(patience=PATIENCE)

    def _end_processes(self, patience: float = 0.0) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            with suppress(OSError):
                worker.connection.close()
        for worker in workers:
            try:
                worker.process.wait(patience)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def clear(self, keep: Sequence[int] = ()) -> None:
        """Take the folder away, but for the results of some steps.

        Args:
            keep: steps that a checkpoint still waits for.
        """
        kept = {result_path(self.folder, step).name for step in keep}
        if not any((self.folder / name).exists() for name in kept):
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)


def read_result(folder: Path, step: int) -> Result:
    """The result of a step from its file; one that is not whole is an error."""
    try:
        state = read_pickled(result_path(folder, step))
        keys = ("estimate", "influence", "course", "error", "influence_error")
        return Result(step, *(state.get(key) for key in keys))
    except Exception as error:
        return Result(step, error=f"its result cannot be read: {type(error).__name__}: {error}")


__all__ = ["Result", "WorkerPool", "read_result"]
