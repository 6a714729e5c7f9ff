"""Services that an attribute of a module may be: loggers and their writers, queues, pipes.

Such an object has a thread, a process, a file or a server at its other end, which a copy of it has not; and what chains
send is no part of the training.
"""

from __future__ import annotations

import multiprocessing.queues
import queue
from multiprocessing.connection import Connection
from typing import Any

from lightning.fabric.loggers.logger import Logger

from lightning_slt.sampling.stand_ins import LiveQueue, Silenced

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


def stand_in(value: Any, path: str) -> Any:
    """What a chain has in the place of a service; None where ``value`` is none.

    Args:
        path: where it is, for messages.
    """
    if isinstance(value, Connection):
        return value  # a copy would close the module's own when it is given up
    if isinstance(value, _QUEUES):
        return LiveQueue(path)
    packages = [kind.__module__ for kind in type(value).__mro__]
    if isinstance(value, Logger) or any(package.startswith(_WRITERS) for package in packages):
        return Silenced(value)
    return value if _SETTINGS in packages else None


__all__ = ["stand_in"]
