"""The training data that snapshots are of, as files: one for each time that it was loaded anew and was other data.

A worker reads a file when a snapshot names another one than the snapshot before. A file stays on disk while a snapshot
that waits to be measured is of it, so that a firing late in the queue is of the data that training had at its step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_slt.callbacks.background.travel import CannotTravelError, main_script, pickles, write_pickled
from lightning_slt.callbacks.background.worker import data_path
from lightning_slt.callbacks.data.hooks import BATCH_HOOKS
from lightning_slt.callbacks.data.training import SourcePlan, TrainingData, datamodule_of


@dataclass(frozen=True)
class RunData:
    """What a worker needs of the data.

    Attributes:
        plan: how minibatches are read; None where batches of training are replayed, which come with the snapshots.
        datamodule: without its trainer; None where there is none, or where it cannot be pickled and is not needed.
    """

    plan: Optional[SourcePlan]
    datamodule: Any


class DataFiles:
    """The files of one monitor's runs, and which snapshot is of which."""

    def __init__(self) -> None:
        self._folder: Optional[Path] = None
        self._of: dict[int, int] = {}
        self._number: Optional[int] = None
        self._can_be_read = False
        self.stale = True
        """The data is other data than that of the newest file."""

    def open(self, folder: Path) -> None:
        """In the folder of a run; there may be files that snapshots of an earlier process are of."""
        self._folder, self._number, self.stale = folder, None, True

    def write(self, trainer: Trainer, data: TrainingData) -> dict[str, str]:
        """Write the data as it is now, for the snapshots from here on.

        Returns:
            How a worker finds what it needs of the running script, see
            :func:`~lightning_slt.callbacks.background.travel.main_script`.

        Raises:
            CannotTravelError: where it cannot be handed to another process; the newest file is the one before.
            OSError: where the file cannot be written.
        """
        assert self._folder is not None
        number = 1 + max(self._there(), default=-1)
        path = data_path(self._folder, number)
        try:
            main = main_script(write_pickled(_run_data(trainer, data), path, "data"))
        except CannotTravelError:
            path.unlink(missing_ok=True)
            raise
        self._number, self._can_be_read, self.stale = number, not data.replays, False
        self._tidy()
        return main

    def go_on(self, data: TrainingData) -> bool:
        """Stay with the newest file, where the data could not be written; False where chains would have no data."""
        if self._number is None or not (self._can_be_read or data.replays):
            return False
        self.stale = False
        return True

    def give(self, step: int) -> int:
        """The number of the file that the snapshot of a step is of; it stays until :meth:`release`."""
        assert self._number is not None
        self._of[step] = self._number
        return self._number

    def release(self, step: int) -> None:
        """The snapshot of a step needs its data no more."""
        self._of.pop(step, None)
        self._tidy()

    def number_of(self, step: int) -> Optional[int]:
        """For a checkpoint, which file a snapshot that waits is of."""
        return self._of.get(step)

    def remember(self, step: int, number: Optional[int]) -> None:
        """The inverse of :meth:`number_of`, when the checkpoint is loaded."""
        if number is not None:
            self._of[step] = number

    def forget(self) -> None:
        """No snapshot waits any more."""
        self._of.clear()

    @property
    def needed(self) -> set[str]:
        """Names of the files that must stay."""
        numbers = {*self._of.values(), *([] if self._number is None else [self._number])}
        return {data_path(Path(), number).name for number in numbers}

    def _there(self) -> Iterator[int]:
        assert self._folder is not None
        return (int(path.stem.rpartition("_")[2]) for path in self._folder.glob("data_*.pt"))

    def _tidy(self) -> None:
        if self._folder is None:
            return
        for number in list(self._there()):
            path = data_path(self._folder, number)
            if path.name not in self.needed:
                path.unlink(missing_ok=True)


def _run_data(trainer: Trainer, data: TrainingData) -> RunData:
    datamodule = datamodule_of(trainer)
    if datamodule is not None:
        datamodule = copy.copy(datamodule)
        datamodule.trainer = None
        needed = any(is_overridden(name, datamodule) for name in BATCH_HOOKS)
        if not needed and not pickles(datamodule):
            datamodule = None
    return RunData(None if data.replays else data.plan(), datamodule)


__all__ = ["DataFiles", "RunData"]
