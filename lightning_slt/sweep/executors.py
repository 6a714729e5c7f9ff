"""Where the points of a sweep are measured: in this process, in one process a device, or as jobs of a cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import torch

from lightning_slt.callbacks.background.devices import WorkerDevice
from lightning_slt.sweep.point import Task, measure_point

MAX_DEATHS = 2
"""Processes that a checkpoint may cost before it is given up."""
POLL_PARENT = 0.5

Outcome = tuple[Task, Optional[str]]
"""A task, and what went wrong with it; None where nothing did."""
Executor = Callable[[Sequence[Task]], Iterator[Outcome]]


def all_devices() -> list[WorkerDevice]:
    """Every GPU that this machine shows, or the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [WorkerDevice(f"cuda:{i}") for i in range(count)] or [WorkerDevice("cpu")]


def named_devices(names: Optional[Sequence[str]]) -> list[WorkerDevice]:
    """The devices of these names; all there are for None.

    Raises:
        ValueError: for a name that is not understood or a device that is not there.
    """
    if names is None:
        return all_devices()
    found = [WorkerDevice.parse(name) for name in names]
    if not found:
        raise ValueError("devices=[]: name at least one, or leave it out for all there are.")
    for device in found:
        device.check()
    return found


def locally(devices: Sequence[WorkerDevice]) -> Executor:
    """On these devices: one process each, which takes the next checkpoint when it is done with one.

    A process that dies is started again; a checkpoint at which it dies twice is given up. With this process gone (or
    Ctrl-C) the others end as well.
    """

    def run(tasks: Sequence[Task]) -> Iterator[Outcome]:
        waiting, deaths = deque(tasks), dict.fromkeys(tasks_by_path(tasks), 0)
        pools = {device: _pool(device) for device in devices[: max(1, len(tasks))]}
        busy: dict[Future[None], tuple[WorkerDevice, Task]] = {}
        try:
            while waiting or busy:
                free = [d for d in pools if d not in {device for device, _ in busy.values()}]
                for device in free:
                    if waiting:
                        task = waiting.popleft()
                        busy[pools[device].submit(measure_point, task, device.device)] = (device, task)
                done, _ = wait(busy, return_when=FIRST_COMPLETED)
                for future in done:
                    device, task = busy.pop(future)
                    error = future.exception()
                    if not isinstance(error, BrokenProcessPool):
                        yield task, None if error is None else f"{type(error).__name__}: {error}"
                        continue
                    pools[device].shutdown(wait=False)
                    pools[device] = _pool(device)
                    deaths[task.path] += 1
                    if deaths[task.path] < MAX_DEATHS:
                        waiting.appendleft(task)
                    else:
                        yield task, f"{MAX_DEATHS} processes died at it (out of memory?)"
        finally:
            for pool in pools.values():
                _end(pool)

    return run


def tasks_by_path(tasks: Sequence[Task]) -> dict[str, Task]:
    """The tasks by the files that they are of."""
    return {task.path: task for task in tasks}


def _pool(device: WorkerDevice) -> ProcessPoolExecutor:
    # spawned: a forked process cannot use a GPU that this one has touched
    return ProcessPoolExecutor(
        1,
        multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(device, torch.get_num_threads(), os.getpid()),
    )


def _begin(device: WorkerDevice, threads: int, parent: int) -> None:
    """In a new process: its device, and an eye on its parent."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    device.enter(threads)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_PARENT)
    os._exit(1)


def _end(pool: ProcessPoolExecutor) -> None:
    """At once: what a process is at is done again some other time."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def on_cluster(folder: Path, cluster: Optional[str] = None, parameters: Optional[Mapping[str, Any]] = None) -> Executor:
    """As an array of jobs, through submitit; this process waits for them.

    Args:
        folder: of submitit's own files, seen by all machines.
        cluster: ``"slurm"``, ``"local"`` (processes here, to try it), ``"debug"`` (in this process); None for what
            there is.
        parameters: of ``submitit.AutoExecutor.update_parameters``: ``timeout_min``, ``gpus_per_node``,
            ``slurm_partition``, ``slurm_array_parallelism`` ...

    Raises:
        ValueError: where submitit is not installed, or does not know a parameter.
    """
    try:
        import submitit
    except ImportError as error:
        raise ValueError("a cluster needs submitit: pip install 'lightning_slt[cluster]'.") from error
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    try:
        executor.update_parameters(**(parameters or {}))
    except (TypeError, NameError) as error:
        raise ValueError(f"cluster parameters {dict(parameters or {})}: {error}") from error

    def run(tasks: Sequence[Task]) -> Iterator[Outcome]:
        if not tasks:
            return
        jobs = executor.map_array(_job, tasks)
        try:
            for task, job in zip(tasks, jobs, strict=True):
                error = job.exception()
                yield task, None if error is None else _reason(error)
        finally:
            for job in jobs:
                with suppress(Exception):
                    if not job.done():
                        job.cancel(check=False)

    return run


def _reason(error: BaseException) -> str:
    """The last line of the traceback that submitit quotes between rules, else of what there is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    rules = [i for i, line in enumerate(lines) if line.startswith("-----")]
    if rules:
        lines = lines[: rules[-1]]
    return lines[-1] if lines else type(error).__name__


def _job(task: Task) -> None:
    """On a machine of the cluster: its GPU where the job has one."""
    measure_point(task, "cuda" if torch.cuda.is_available() else "cpu")


__all__ = ["Executor", "Outcome", "all_devices", "locally", "named_devices", "on_cluster"]
