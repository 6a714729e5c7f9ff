"""Services that an attribute of a module may be: loggers and their writers, queues, pipes, numbers that are shared.

Such an object has a thread, a process, a file or a server at its other end, which a copy of it has not; and what chains
send is no part of the training.
"""

from __future__ import annotations

import ctypes
import multiprocessing.queues
import queue
import types
from multiprocessing import sharedctypes, synchronize
from multiprocessing.connection import Connection
from multiprocessing.managers import BaseProxy
from typing import Any

from lightning.fabric.loggers.logger import Logger

from lightning_slt.sampling.stand_ins import SILENT, LiveQueue, Silenced

_WRITERS = (
    "torch.utils.tensorboard", "tensorboard.summary", "tensorboardX", "mlflow.tracking", "comet_ml",
    "lightning.fabric.loggers", "lightning.pytorch.loggers",
)  # fmt: skip
"""Packages whose objects write to a log."""
_SETTINGS = "wandb.sdk.wandb_config"
"""Of a run: read by a step, and bound to the run."""
_QUEUES = (
    queue.Queue,
    queue.SimpleQueue,
    multiprocessing.queues.Queue,
    multiprocessing.queues.SimpleQueue,
)


_SHARED = (Connection, synchronize.SemLock, synchronize.Condition, synchronize.Event)
"""A copy of a pipe would close the module's own when it is given up; the others hold nothing."""


SHARED_NUMBERS = (sharedctypes.SynchronizedBase, ctypes._SimpleCData, ctypes.Array)
"""Numbers and arrays that processes share, with a lock and without."""


def stand_in(value: Any, path: str) -> Any:
    """What a chain has in the place of a service; None where ``value`` is none.

    Args:
        path: where it is, for messages.
    """
    if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        return method_of(stand_in(value.__self__, path), value)
    if isinstance(value, _SHARED):
        return value
    if isinstance(value, SHARED_NUMBERS):
        return _own(value)
    if isinstance(value, _QUEUES) or (isinstance(value, BaseProxy) and hasattr(value, "put")):
        return LiveQueue(path, getattr(value, "maxsize", getattr(value, "_maxsize", 0)))
    packages = [kind.__module__ for kind in type(value).__mro__]
    if isinstance(value, Logger) or any(package.startswith(_WRITERS) for package in packages):
        return Silenced(value)
    return value if _SETTINGS in packages else None


def method_of(found: Any, method: Any) -> Any:
    """The method of that name that a stand-in has; None where there is no stand-in."""
    return None if found is None else getattr(found, method.__name__, SILENT)


def renewed(value: Any) -> Any:
    """A stand-in as it was made: shared numbers that a step counts up begin anew with each call."""
    if isinstance(value, SHARED_NUMBERS):
        return _own(value)
    return LiveQueue(value.path, value.maxsize) if isinstance(value, LiveQueue) else value


def numbers_in(value: Any) -> bytes:
    """What shared numbers are."""
    return bytes(value.get_obj() if isinstance(value, sharedctypes.SynchronizedBase) else value)


def _own(value: Any) -> Any:
    """A number, or an array, that processes share, in memory of its own."""
    if not isinstance(value, sharedctypes.SynchronizedBase):
        return type(value).from_buffer_copy(value)
    shared: Any = value.get_obj()
    kind: type[ctypes.Array[Any]] = type(shared)
    return sharedctypes.synchronized(kind.from_buffer_copy(shared), value.get_lock())  # type: ignore[call-overload]


__all__ = ["SHARED_NUMBERS", "method_of", "numbers_in", "renewed", "stand_in"]
