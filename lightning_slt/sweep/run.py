"""The sweep: what is to be measured, what is measured already, and the curve of it all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from lightning_slt.durable import write_durably
from lightning_slt.estimate import default_localization
from lightning_slt.influence_record import InfluenceEstimate, InfluenceRecord
from lightning_slt.publish.files import FilesSink
from lightning_slt.record import Estimate, RunRecord
from lightning_slt.sweep.checkpoint import Checkpoint, in_order, read_state
from lightning_slt.sweep.executors import Executor, locally, named_devices
from lightning_slt.sweep.point import (
    POINTS_FOLDER,
    MisfitError,
    Point,
    Task,
    callable_with,
    make_objective,
    read_point,
)
from lightning_slt.sweep.settings import SweepConfig
from lightning_slt.transition_record import TransitionLog
from lightning_slt.transitions import Transition, detect_transitions
from lightning_slt.transitions.settings import threshold_of

SWEEP_FILE = "sweep.json"
"""What the points of a folder have in common."""


@dataclass(frozen=True)
class SweepResult:
    """A curve.

    Attributes:
        folder: the record: ``estimates.jsonl``, ``influence/``, ``transitions.json``, ``history.csv``.
        estimates, influences: in order of step.
        transitions: of the whole curve.
        measured, known: how many points were measured now, and how many before.
        failed: step -> what went wrong.
        weights: ``"raw"`` or ``"averaged"``.
        unread: files that are no checkpoints, such as one that a crash has cut off -> what is wrong with them.
    """

    folder: Path
    estimates: tuple[Estimate, ...]
    influences: tuple[InfluenceEstimate, ...]
    transitions: tuple[Transition, ...]
    measured: int
    known: int
    failed: dict[int, str]
    weights: str
    unread: dict[Path, str] = field(default_factory=dict)


def sweep(
    checkpoints: Sequence[Path],
    config: SweepConfig,
    executor: Optional[Executor] = None,
    say: Callable[[str], None] = lambda line: None,
) -> SweepResult:
    """Measure stored checkpoints, and the transitions of their curve.

    What an earlier call with the same settings has measured, also one that was interrupted, is taken from the folder.

    Args:
        checkpoints: files, in any order; a folder stands for the ``*.ckpt`` in it.
        config: how.
        executor: where; None for the devices of ``config``, see :mod:`lightning_slt.sweep.executors`.
        say: told what goes on, a line at a time.

    Raises:
        FileNotFoundError: for a checkpoint that is not there.
        ValueError: for a setting out of range, a folder with the record of a monitor, a module or data that cannot be
            had, files none of which is a checkpoint of that module.
        TypeError: for a single path, or something else than a :class:`~lightning_slt.sweep.SweepConfig`.
    """
    if isinstance(checkpoints, (str, os.PathLike)):
        given = os.fspath(checkpoints)
        raise TypeError(f"checkpoints={given!r}: expected a list of paths, got one. Give [{given!r}].")
    if not isinstance(config, SweepConfig):
        kind = type(config).__name__
        raise TypeError(f"config={config!r}: expected a SweepConfig, got {kind}. Give load(..., schema=SweepConfig).")
    config.check()
    unread: dict[Path, str] = {}
    points, left = in_order([Path(path) for path in checkpoints], unread)
    for path, reason in unread.items():
        say(f"{path}: failed: {reason}")
    for checkpoint in left:
        say(f"{checkpoint.path}: left out, another checkpoint is of step {checkpoint.step}")
    folder = Path(config.folder)
    if RunRecord(folder).path.exists() and not (folder / POINTS_FOLDER).exists():
        raise ValueError(
            f"folder={config.folder!r}: holds the record of a run that a monitor measured, which a sweep would write "
            "anew. Give another folder."
        )
    localization = config.localization if config.localization is not None else _settle(points, config, folder)
    tasks = [Task.of(checkpoint, config, localization) for checkpoint in points]
    found: dict[int, Point] = {task.step: point for task in tasks if (point := read_point(task)) is not None}
    known, failed = len(found), dict[int, str]()
    todo = [task for task in tasks if task.step not in found]
    many = f"{len(tasks)} checkpoint{'' if len(tasks) == 1 else 's'}"
    say(f"{many}, {known} measured already; {config.weights} weights, localization {localization:.4g}")
    if todo:  # once, and not at each of them; points that are all there need no data
        callable_with(config.data, "data", config.data_args)
    run = executor if executor is not None else locally(named_devices(config.devices))
    for task, error in run(todo):
        point = read_point(task) if error is None else None
        if point is None:
            failed[task.step] = error or "its result is not there"
            say(f"step {task.step}: failed: {failed[task.step]}")
        else:
            found[task.step] = point
            say(str(point[0]))
    estimates = [found[task.step][0] for task in tasks if task.step in found]
    influences = [i for task in tasks if task.step in found and (i := found[task.step][1]) is not None]
    transitions = transitions_of(estimates, config.false_alarms)
    if estimates or not RunRecord(folder).path.exists():
        _write_record(folder, estimates, influences, transitions, config)
    else:
        say(f"{folder}: the record of an earlier sweep is left as it was, since no point was measured")
    return SweepResult(
        folder,
        tuple(estimates),
        tuple(influences),
        tuple(transitions),
        len(found) - known,
        known,
        failed,
        config.weights,
        unread,
    )


def _settle(points: Sequence[Checkpoint], config: SweepConfig, folder: Path) -> float:
    """Gamma of the curve: that of an earlier call, else of the weights of the first checkpoint that has some.

    Raises:
        ValueError: where the module or the data cannot be had; where no checkpoint is of the module, or all are of
            weights that are not finite.
    """
    path = folder / SWEEP_FILE
    asked = {"weights": config.weights, "restrict": config.restrict, "module": config.module}
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if {key: before[key] for key in asked} == asked:
            return float(before["localization"])
    except (OSError, ValueError, KeyError):
        pass
    first, localization = _first_of(points, config)
    text = json.dumps({**asked, "localization": localization, "first": str(first.path)}, indent=1) + "\n"
    write_durably(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return localization


def _first_of(points: Sequence[Checkpoint], config: SweepConfig) -> tuple[Checkpoint, float]:
    """The first checkpoint whose weights fit the module and are finite, and gamma of them."""
    refused: list[ValueError] = []
    for point in points:
        try:
            objective, _ = make_objective(read_state(point.path), config, torch.device("cpu"), point.path)
        except MisfitError as error:
            refused.append(error)
            continue
        if objective.layout.all_finite(objective.anchor):
            return point, default_localization(objective.anchor)
        refused.append(ValueError(f"{point.path}: some of its weights are not finite."))
    raise refused[0]


def transitions_of(estimates: Sequence[Estimate], false_alarms: float) -> list[Transition]:
    """Those of a whole curve; points are held against each other as :class:`~lightning_slt.TransitionMonitor` does."""
    return detect_transitions(
        np.array([e.step for e in estimates], dtype=np.float64),
        np.array([e.mean for e in estimates]),
        np.array([e.chain_se for e in estimates]),
        np.array([e.init_loss for e in estimates]),
        np.array([e.comparable for e in estimates], dtype=bool),
        false_alarms=false_alarms,
    )


def _write_record(
    folder: Path,
    estimates: Sequence[Estimate],
    influences: Sequence[InfluenceEstimate],
    transitions: Sequence[Transition],
    config: SweepConfig,
) -> None:
    """As a monitor writes it, from the results: anew each time, since points may have come in between."""
    record = RunRecord(folder)
    record.path.unlink(missing_ok=True)
    shutil.rmtree(record.trace_path(estimates[0]).parent if estimates else folder / "none", ignore_errors=True)
    for estimate in estimates:
        record.append(estimate)
    samples = InfluenceRecord(folder)
    shutil.rmtree(samples.folder, ignore_errors=True)
    for influence in influences:
        samples.save(influence)
    TransitionLog("slt/llc/mean", threshold_of(config.false_alarms), offline=tuple(transitions)).write(folder)
    sink = FilesSink(folder)
    sink.start({**config.decides(), "weights": config.weights})
    sink.finish(estimates, "finished", None)


__all__ = ["SweepResult", "sweep", "transitions_of"]
