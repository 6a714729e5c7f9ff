"""The folder of a run's record: where it is, that no earlier run loses its own, and what a resumed run finds in it."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Optional

from lightning.pytorch import Trainer

from lightning_slt.callbacks.arguments import local_folder
from lightning_slt.callbacks.background.worker import FOLDER
from lightning_slt.influence_record import InfluenceEstimate, InfluenceRecord
from lightning_slt.record import Estimate, RunRecord
from lightning_slt.warned import speaker, warn

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]

_CLAIMED: dict[Path, int] = {}
"""The folders that runs of this process write to, with the descriptor that holds each."""


def run_folder(trainer: Trainer, resumed: Optional[Path], dirpath: Optional[str], prefix: str) -> Path:
    """Where the record of this run goes.

    Args:
        trainer: whose first logger has a folder for the run.
        resumed: the folder of the run that is resumed, where one is.
        dirpath: the folder that was asked for; without it, and with a logger on a remote filesystem, it is a local one.
        prefix: of the monitor: each has a folder of its own.
    """
    if resumed is not None and (RunRecord(resumed).path.exists() or (resumed / FOLDER).exists()):
        return resumed
    if dirpath is not None:
        folder = Path(dirpath).expanduser()
        return folder if prefix == "slt" else folder / prefix
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or logger.version is None:
        return _local_root(trainer, trainer.default_root_dir, prefix) / prefix
    root = _local_root(trainer, logger.save_dir or trainer.default_root_dir, prefix)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return root / str(logger.name or "") / version / prefix


def _local_root(trainer: Trainer, wanted: str | os.PathLike[str], prefix: str) -> Path:
    """``wanted`` where it is a folder of this machine, else the trainer's root or the current directory, and said."""
    found = local_folder(wanted)
    if found is None:
        found = local_folder(trainer.default_root_dir) or Path.cwd()
        warn(
            f"{speaker(prefix)}: the record is kept in local files: it is below {found}, and not in {wanted}. Name a "
            "local folder with dirpath=."
        )
    return found


def fresh(folder: Path) -> Path:
    """A folder that no earlier run has its record in, and no other one is about to: it is claimed."""
    candidate, number = folder, 1
    while RunRecord(candidate).path.exists() or not claim(candidate):
        candidate, number = folder.with_name(f"{folder.name}_run{number}"), number + 1
    return candidate


def claim(folder: Path) -> bool:
    """Keep a folder from other runs until :func:`give_back`, or the end of this process, however it ends.

    Returns:
        False where another run has it. True also where that cannot be told: on a file system without locks, or where
        the folder cannot be made, which is said when something is to be written.
    """
    if fcntl is None or folder in _CLAIMED:
        return folder not in _CLAIMED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return not isinstance(error, BlockingIOError)
    _CLAIMED[folder] = descriptor
    return True


def give_back(folder: Optional[Path]) -> None:
    """Let other runs have a folder again; nothing happens where it was not claimed."""
    descriptor = _CLAIMED.pop(folder, None) if folder is not None else None
    if descriptor is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also where a worker of a loader has inherited it
        os.close(descriptor)


def restore_record(
    record: RunRecord,
    last_step: int,
    estimates: Sequence[Estimate],
    influences: Sequence[InfluenceEstimate],
    prefix: str = "slt",
) -> dict[int, tuple[Estimate, Optional[InfluenceEstimate]]]:
    """The history of a resumed run, complete in its folder: what came after the checkpoint is forgotten.

    Args:
        record: of the run.
        last_step: of the checkpoint.
        estimates, influences: the history in the checkpoint.
        prefix: of the monitor.

    Returns:
        What the record has and the checkpoint does not, in order of steps: measured after it was written and at its own
        step, as at the end of an epoch, or come late from the background.
    """
    try:
        record.drop_after(last_step)
        samples = InfluenceRecord(record.folder)
        samples.drop_after(last_step)
        known = {e.step for e in record.read(traces=False)}
        for estimate in estimates:
            if estimate.step not in known:
                record.append(estimate)
        for influence in influences:
            if not all(path.exists() for path in samples.paths(influence.step)):
                samples.save(influence)
    except OSError as error:
        warn(f"{speaker(prefix)}: the record in {record.folder} could not be restored: {error}")
        return {}
    lacking = known - {e.step for e in estimates}
    return _recorded(record.folder, {step for step in lacking if step is not None}, speaker(prefix))


def _recorded(
    folder: Path, steps: Collection[int], who: str
) -> dict[int, tuple[Estimate, Optional[InfluenceEstimate]]]:
    """What the record has of these steps, in their order."""
    if not steps:
        return {}
    try:
        found = {e.step: e for e in RunRecord(folder).read() if e.step in steps}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"{who}: the record in {folder} could not be read: {error}")
        return {}
    return {step: (found[step], _influence(folder, step, who)) for step in sorted(steps) if step in found}


def _influence(folder: Path, step: int, who: str) -> Optional[InfluenceEstimate]:
    samples = InfluenceRecord(folder)
    if not all(path.exists() for path in samples.paths(step)):
        return None
    try:
        return samples.load(step)
    except (OSError, ValueError) as error:
        warn(f"{who}: the influence at step {step} could not be read, and is left out: {error}")
        return None


__all__ = ["claim", "fresh", "give_back", "restore_record", "run_folder"]
