"""Firings beside training: what of a monitor's work is done elsewhere, and how it comes back.

A firing takes a snapshot and sends it to a :class:`~lightning_slt.callbacks.background.pool.WorkerPool`; its result is
taken up at a later batch, under the step of the snapshot. What is still out when a checkpoint is written stands in it,
and is found again by its files: the snapshot, or the result that came too late.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_slt.callbacks.background.data_files import DataFiles
from lightning_slt.callbacks.background.devices import worker_devices
from lightning_slt.callbacks.background.pool import Result, WorkerPool, read_result
from lightning_slt.callbacks.background.travel import (
    CannotTravelError,
    Kit,
    check_pickles,
    main_script,
    take_snapshot,
    write_pickled,
)
from lightning_slt.callbacks.background.worker import FOLDER, kit_path, probes_path, result_path, snapshot_path
from lightning_slt.callbacks.data.training import TrainingData
from lightning_slt.estimate import ChainSettings
from lightning_slt.influence import ProbeSet
from lightning_slt.kinds import check_count, check_number
from lightning_slt.sampling.restriction import Restriction
from lightning_slt.sampling.shadow import CopyError
from lightning_slt.sampling.steps import LossFn
from lightning_slt.warned import speaker, warn

GONE = "their snapshots are gone"
REMEMBERED = 2
"""Checkpoints whose pending results are kept after they were taken: the last may be half written at a crash."""


@dataclass(frozen=True)
class Late:
    """A result that came back.

    Attributes:
        result: what came of the snapshot.
        notes: fields of its estimate that were known when it was sent, such as its step.
    """

    result: Result
    notes: Mapping[str, Any]


class BackgroundFirings:
    """The firings of one monitor that are done beside training.

    Args:
        devices: see :class:`~lightning_slt.SLTMonitor`.
        max_pending: snapshots that may be out at a time.
        when_full: what becomes of a firing when so many are: ``"skip"`` leaves it out, ``"wait"`` waits.
        max_wait: seconds that training waits at the most, each time.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for one of another kind.
    """

    def __init__(
        self, devices: Optional[Sequence[str]], max_pending: int = 2, when_full: str = "skip", max_wait: float = 600.0
    ) -> None:
        if devices is not None:
            if isinstance(devices, str):
                raise ValueError(f"devices={devices!r}: give a list, such as [{devices!r}].")
            if not isinstance(devices, Sequence):
                raise TypeError(
                    f"devices={devices!r}: expected a list of names, got {type(devices).__name__}. Give one such as "
                    "['cuda:1'] or ['cpu'], a process each."
                )
            devices = [str(name) for name in devices]
            worker_devices(devices, None)
        check_count("max_pending", max_pending, optional=False)
        if when_full not in ("skip", "wait"):
            raise ValueError(f"when_full={when_full!r}: must be 'skip' or 'wait'.")
        remedy = "must not be negative; float('inf') waits for as long as it takes."
        check_number("max_wait", max_wait, False, lambda seconds: seconds >= 0, remedy)
        self._names, self._max_pending, self._when_full, self.max_wait = devices, max_pending, when_full, max_wait
        self._pool: Optional[WorkerPool] = None
        self._folder: Optional[Path] = None
        self._temporary = False
        self._notes: dict[int, dict[str, Any]] = {}
        self._promised: deque[set[int]] = deque(maxlen=REMEMBERED)
        self._has_probes = False
        self._data_files = DataFiles()
        self._said_data = False
        self._prefix = "slt"
        self.last_step = -1

    def __getstate__(self) -> dict[str, Any]:
        """For strategies that spawn: processes and what is out belong to the process that has them."""
        return {**self.__dict__, "_pool": None, "_folder": None, "_notes": {}, "_data_files": DataFiles()}

    @property
    def _who(self) -> str:
        return speaker(self._prefix, "execution='background'")

    def describe(self) -> dict[str, Any]:
        """For the run's settings."""
        return {
            "devices": list(self._names) if self._names is not None else None,
            "max_pending": self._max_pending,
            "when_full": self._when_full,
            "max_wait": self.max_wait,
        }

    # --- the run begins and ends ----------------------------------------------------------------------------------

    def open(
        self,
        trainer: Trainer,
        module: LightningModule,
        record: Optional[Path],
        data: TrainingData,
        loss_fn: Optional[LossFn],
        restrict: Restriction,
        settings: ChainSettings,
        under_plugin: bool,
        course: Callable[[], Mapping[str, Any]],
        warm_start: bool,
        prefix: str = "slt",
    ) -> None:
        """Hand over what stays the same over the run, and start the workers.

        Args:
            record: folder of the record; None where no files are written, for a temporary one.
            course: asked for what the firings so far have left.
            prefix: of the monitor, for what is said.

        Raises:
            MisconfigurationException: where there is no such device, or something cannot be handed to another process.
        """
        self._temporary, self._prefix = record is None, prefix
        folder = Path(tempfile.mkdtemp(prefix="slt_background_")) if record is None else record / FOLDER
        self._folder = folder
        try:
            root = trainer.strategy.root_device
            devices = worker_devices(self._names, root, trainer.num_devices)
            for device in devices:
                device.check()
            self._tidy(folder)
            # of a run that goes on: pending snapshots need them, and they are the same samples
            self._has_probes = probes_path(folder).exists()
            kit = Kit(trainer.precision_plugin, under_plugin, loss_fn)
            found = write_pickled(kit, kit_path(folder), "run")
            self._data_files.open(folder)
            main = self._data_files.write(trainer, data)
            copy = take_snapshot(trainer, module, restrict, settings, data, probed=False, number=0).module
            found |= check_pickles(copy, type(module).__name__)
            main = main_script(found) or main
        except (CopyError, ValueError) as error:
            self._drop_folder()
            raise MisconfigurationException(f"{self._who}: {error}") from error
        self._pool = WorkerPool(folder, devices, course, warm_start, main)
        names = ", ".join(d.device if not d.cores else f"cpu:{','.join(map(str, d.cores))}" for d in devices)
        rank_zero_info(
            f"{speaker(prefix)}: chains run beside training on {names}; {self._max_pending} snapshots may be out, "
            f"a firing beyond that {'is left out' if self._when_full == 'skip' else 'waits'}"
        )

    def _tidy(self, folder: Path) -> None:
        """What an earlier process of this run left, but for what is still to come."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = {path(folder, step).name for step in self._notes for path in (snapshot_path, result_path)}
        kept |= {probes_path(folder).name, *self._data_files.needed} if self._notes else set()
        for path in folder.iterdir():
            if path.name not in kept and path.is_file():
                path.unlink(missing_ok=True)

    def _drop_folder(self) -> None:
        if self._folder is not None and not self._notes:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def awaited(self) -> list[int]:
        """Steps whose results have not been taken up, those of an earlier process of this run included."""
        return sorted(self._notes)

    def recover(self, known: Collection[int]) -> tuple[list[Late], list[int]]:
        """What was out when the checkpoint was written, or when the last fit broke off.

        Args:
            known: steps whose results were taken up all the same: they are in the record.

        Returns:
            Results that are on disk, and steps of which nothing is. What is to be measured still is left to
            :meth:`begin`.
        """
        assert self._pool is not None and self._folder is not None
        late, lost = [], []
        for step in self.awaited:
            result = self.result_of(step)
            if step in known:
                self._drop(step)
            elif result is not None and result.error is None:
                late.append(Late(result, self._drop(step)))
            elif not snapshot_path(self._folder, step).exists():
                lost.append(step)
                self._drop(step)
                continue
            self.last_step = max(self.last_step, step)
        return late, lost

    def _drop(self, step: int) -> dict[str, Any]:
        """The notes of a snapshot that waits no more."""
        self._data_files.release(step)
        return self._notes.pop(step, {"step": step})

    def begin(self) -> None:
        """Start the workers, which have some seconds to be ready; snapshots that nobody has measured come first.

        Only now: chains go on from what the results that were recovered have left.
        """
        assert self._pool is not None
        self._pool.start()
        for step in self.awaited:
            self._pool.send(step)

    def result_of(self, step: int) -> Optional[Result]:
        """What is on disk of the result of a step."""
        assert self._folder is not None
        return read_result(self._folder, step) if result_path(self._folder, step).exists() else None

    def left_by(self, step: int) -> Optional[Mapping[str, Any]]:
        """The course after the firing of a step, where it is still on disk."""
        result = self.result_of(step)
        return result.course if result is not None else None

    def close(self, finished: bool = False) -> None:
        """End the workers. What is out stays on disk, unless the run is over.

        Args:
            finished: nothing will be asked for any more, but by a run that goes on from a checkpoint.
        """
        pool, self._pool = self._pool, None
        if pool is None:
            return
        pool.close()
        if self._temporary:
            shutil.rmtree(pool.folder, ignore_errors=True)
        elif finished:
            pool.clear(keep=sorted(set().union(*self._promised)))
        else:
            return
        self._notes.clear()
        self._data_files.forget()

    def forget(self) -> None:
        """A run that starts at its first step."""
        self._notes.clear()
        self._promised.clear()
        self._data_files.forget()
        self._said_data = False
        self.last_step = -1

    # --- while training -------------------------------------------------------------------------------------------

    @property
    def pending(self) -> list[int]:
        """Steps whose results are still to come."""
        return self._pool.pending if self._pool is not None else []

    @property
    def full(self) -> bool:
        """Whether a firing now would be one too many."""
        return len(self.pending) >= self._max_pending

    def full_text(self) -> str:
        """Why a firing is left out, and what can be done."""
        return (
            f"{len(self.pending)} snapshots are out and max_pending={self._max_pending}; further ones are not "
            "reported. Measure less often, give more devices or fewer draws, or let training wait: when_full='wait'."
        )

    @property
    def broken(self) -> Optional[str]:
        """Why nothing is measured any more; None while something is."""
        return self._pool.broken if self._pool is not None else None

    def take(self) -> list[Late]:
        """What has come back; does not wait."""
        return [self._late(result) for result in self._pool.take()] if self._pool is not None else []

    def make_room(self, progress: Callable[[int], None]) -> Iterator[Late]:
        """What has come back; where the queue is full and the policy is to wait, until it is not."""
        yield from self.take()
        if self._pool is not None and self._when_full == "wait" and self.full:
            for result in self._pool.wait(self.max_wait, lambda: not self.full, progress):
                yield self._late(result)

    def await_all(self, progress: Callable[[int], None]) -> Iterator[Late]:
        """All that is out, as it comes, within the limit."""
        if self._pool is not None:
            for result in self._pool.wait(self.max_wait, lambda: False, progress):
                yield self._late(result)

    def _late(self, result: Result) -> Late:
        assert self._folder is not None
        notes = self._drop(result.step)
        if not any(result.step in promised for promised in self._promised):
            result_path(self._folder, result.step).unlink(missing_ok=True)
        return Late(result, notes)

    def send(
        self,
        trainer: Trainer,
        module: LightningModule,
        restrict: Restriction,
        settings: ChainSettings,
        data: TrainingData,
        probes: Optional[ProbeSet],
        notes: Mapping[str, Any],
    ) -> None:
        """Take a snapshot and send it.

        Args:
            probes: samples to look at; None for none. Those of the first call are used in all.
            notes: fields of the estimate that are known now, ``step`` among them; plain types.

        Raises:
            CannotTravelError: where something does not pickle that did before training.
            OSError: where the file cannot be written.
        """
        assert self._pool is not None and self._folder is not None
        step = int(notes["step"])
        if probes is not None and not self._has_probes:
            write_pickled(probes, probes_path(self._folder), "samples")
            self._has_probes = True
        if self._data_files.stale:
            self._follow(trainer, data)
        number = self._data_files.give(step)
        try:
            snapshot = take_snapshot(trainer, module, restrict, settings, data, probes is not None, number)
            write_pickled(snapshot, snapshot_path(self._folder, step), "snapshot")
        except Exception:
            self._data_files.release(step)
            raise
        self._notes[step] = dict(notes)
        self.last_step = step
        self._pool.send(step)

    def data_is_other(self) -> None:
        """Training has been given other data: snapshots from here on are of that."""
        self._data_files.stale = True

    def _follow(self, trainer: Trainer, data: TrainingData) -> None:
        """Have workers read the data that training has now; where it cannot travel, they keep what they have."""
        assert self._pool is not None
        try:
            self._pool.import_main(self._data_files.write(trainer, data))
        except CannotTravelError as error:
            if not self._data_files.go_on(data):
                raise
            if not self._said_data:
                self._said_data = True
                warn(
                    f"{self._who}: {error} The training data has been loaded anew and is other data: until then chains "
                    "go on with that of before."
                )

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> list[dict[str, Any]]:
        """What is out, as plain types; its results are kept on disk from now on, until the checkpoint after the next
        one."""
        before = set().union(*self._promised)
        self._promised.append(set(self._notes))
        if self._folder is not None:
            for step in before - set().union(*self._promised) - set(self._notes):
                result_path(self._folder, step).unlink(missing_ok=True)
        return [{**self._notes[step], "data": self._data_files.number_of(step)} for step in sorted(self._notes)]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """What was out; found again by :meth:`recover`."""
        self._notes = {int(notes["step"]): dict(notes) for notes in state}
        for step, notes in self._notes.items():
            self._data_files.remember(step, notes.pop("data", None))
        self._promised.append(set(self._notes))


def warn_of_lost(steps: Sequence[int], who: str, why: str = GONE) -> None:
    """Results that were pending at the checkpoint and that this run cannot have."""
    if steps:
        warn(
            f"{who}: the firings at steps {list(steps)} were still out when the checkpoint was written, and {why}: "
            "these points are left out."
        )


__all__ = ["BackgroundFirings", "Late", "warn_of_lost"]
