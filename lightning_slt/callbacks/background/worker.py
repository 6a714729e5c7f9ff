"""The process beside training that runs chains; :mod:`lightning_slt.callbacks.background.pool` starts it.

It is told on a pipe which snapshots to measure, and answers on it; snapshots and results are files. It ends when it is
told to, and when training is gone: at the end of the pipe, or when its parent is another process than it was (a process
that training has forked may hold the pipe open).
"""

from __future__ import annotations

import json
import os
import queue
import runpy
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

FOLDER = "background"
"""Of kit, snapshots and results, in the folder of the record."""
POLL_PARENT = 0.5
"""Seconds between looks at who the parent is."""
TELL_EVERY = 0.5
"""Seconds between words of progress, while somebody waits for it."""


@dataclass(frozen=True)
class Orders:
    """What a worker is started with: plain types, on its command line.

    Attributes:
        pipe: descriptor of its end of the pipe.
        parent: process id of training.
        folder: of kit, snapshots and results.
        rank, world_size: which of the workers that share the chains it is.
        device, cores: see :class:`~lightning_slt.callbacks.background.devices.WorkerDevice`.
        threads: of torch.
        course: file with what the firings so far have left.
        rendezvous: file by which the workers find each other.
        warm_start: see :class:`~lightning_slt.firing.Course`.
        sys_path: where Python finds modules.
        main: see :func:`~lightning_slt.callbacks.background.travel.main_script`.
        torch_flags: see :func:`torch_flags`.
    """

    pipe: int
    parent: int
    folder: str
    rank: int
    world_size: int
    device: str
    cores: tuple[int, ...]
    threads: int
    course: str
    rendezvous: str
    warm_start: bool
    sys_path: tuple[str, ...]
    main: dict[str, str]
    torch_flags: dict[str, Any]

    def as_json(self) -> str:
        """For the command line."""
        return json.dumps(vars(self))

    @staticmethod
    def from_json(text: str) -> Orders:
        """The inverse of :meth:`as_json`."""
        values: dict[str, Any] = json.loads(text)
        lists_as_tuples: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return Orders(**lists_as_tuples)


def snapshot_path(folder: Path, step: int) -> Path:
    """The file of the snapshot of a step."""
    return folder / f"snapshot_{step:09d}.pt"


def result_path(folder: Path, step: int) -> Path:
    """The file of what was found at it."""
    return folder / f"result_{step:09d}.pt"


def probes_path(folder: Path) -> Path:
    """The file of the samples whose influence is read."""
    return folder / "probes.pt"


def data_path(folder: Path, number: int) -> Path:
    """A file of the training data; there is another one each time that it was loaded anew."""
    return folder / f"data_{number:06d}.pt"


def kit_path(folder: Path) -> Path:
    """The file of what stays the same over a run."""
    return folder / "kit.pt"


def torch_flags() -> dict[str, Any]:
    """Settings of torch that numbers depend on, as plain types; a worker takes them over."""
    import torch

    return {
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32],
    }


def take_over(flags: dict[str, Any]) -> None:
    """Set what :func:`torch_flags` found in another process."""
    import torch

    torch.set_float32_matmul_precision(flags["matmul"])
    torch.use_deterministic_algorithms(flags["deterministic"], warn_only=flags["warn_only"])
    torch.set_default_dtype(getattr(torch, flags["dtype"]))
    cudnn = torch.backends.cudnn
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags["cudnn"]


class Mail:
    """The worker's end of the pipe: a thread reads it, so that its end is seen while chains run."""

    def __init__(self, connection: Connection, parent: int) -> None:
        self._connection, self._parent = connection, parent
        self._sending = threading.Lock()
        self.jobs: queue.Queue[Optional[int]] = queue.Queue()
        self.watched = False
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                word = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)  # training is gone, or wants no more; a chain in the middle of a step is not asked
            if "measure" in word:
                self.jobs.put(int(word["measure"]))
            elif "watch" in word:
                self.watched = bool(word["watch"])
            elif "stop" in word:
                os._exit(0)

    def _watch(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(POLL_PARENT)
        os._exit(0)

    def tell(self, **word: Any) -> None:
        """One word to training; nothing happens where it is gone."""
        with self._sending, suppress(OSError):
            self._connection.send_bytes(json.dumps(word).encode())


def main(text: str) -> None:
    """The life of a worker."""
    orders = Orders.from_json(text)
    mail = Mail(Connection(orders.pipe), orders.parent)
    try:
        bench = _set_up(orders)
    except BaseException as error:
        traceback.print_exc()
        mail.tell(failed=f"{type(error).__name__}: {error}")
        return
    mail.tell(ready=os.getpid())
    while True:
        step = mail.jobs.get()
        assert step is not None
        bench.measure(step, mail)
        mail.tell(done=step)


def _set_up(orders: Orders) -> Any:
    sys.path[:] = list(orders.sys_path)
    _import_main(orders.main)
    from lightning_slt.callbacks.background.bench import Bench

    return Bench(orders)


def _import_main(main: dict[str, str]) -> None:
    """The script that trains, imported under another name, so that what it defines can be found in ``__main__``."""
    if not main:
        return
    module = ModuleType("__mp_main__")  # the name that multiprocessing gives it: guards know it
    if "name" in main:
        content = runpy.run_module(main["name"], run_name="__mp_main__", alter_sys=True)
    else:
        content = runpy.run_path(main["path"], run_name="__mp_main__")
    module.__dict__.update(content)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module


__all__ = [
    "Mail",
    "Orders",
    "data_path",
    "kit_path",
    "main",
    "probes_path",
    "result_path",
    "snapshot_path",
    "take_over",
    "torch_flags",
]
