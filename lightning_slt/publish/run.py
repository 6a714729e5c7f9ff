"""A whole run read back from its folder: every monitor's estimates, influence, transitions and settings.

What the report and the terminal are made from. Nothing here needs the process, the server or the model of the run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from lightning_slt.influence_record import InfluenceEstimate, InfluenceRecord
from lightning_slt.publish.sink import RunCost
from lightning_slt.record import RECORD_FILE, Estimate, RunRecord
from lightning_slt.susceptibility_record import SusceptibilityEstimate, SusceptibilityRecord
from lightning_slt.transition_record import TransitionLog

log = logging.getLogger(__name__)

_OTHER_RUN = re.compile(r"_run\d+$")
"""How the folder of a later run with the same settings ends: it is no monitor of this one."""
_SUGGESTIONS = 5
CALIBRATED = "SGLD, calibrated"
"""What settings have for the sampler where none was given."""


@dataclass(frozen=True, eq=False)
class MonitorRecord:
    """What one monitor has left.

    Attributes:
        folder: of its record.
        estimates: in order of steps; the last one where a step was measured twice.
        influences: in order of steps; only the last one keeps its pairs.
        transitions: None where none were watched for.
        summary: ``summary.json``, empty where there is none.
        susceptibilities: in order of steps, without their single samples.
    """

    folder: Path
    estimates: tuple[Estimate, ...]
    influences: tuple[InfluenceEstimate, ...] = ()
    transitions: Optional[TransitionLog] = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    susceptibilities: tuple[SusceptibilityEstimate, ...] = ()

    @property
    def name(self) -> str:
        """What a person calls it: the monitor's own name, else the name of its folder."""
        return next((e.component for e in self.estimates if e.component), self.folder.name)

    @property
    def status(self) -> str:
        """``"running"``, ``"finished"`` or ``"failed"``; a record without a summary is of a run that died early."""
        return str(self.summary.get("status", "failed"))

    @property
    def cost(self) -> Optional[RunCost]:
        """What measuring cost the whole run; None of one that did not come to its end, and of older records."""
        found = self.summary.get("cost")
        spent = [found.get(name) for name in ("seconds", "run_seconds")] if isinstance(found, Mapping) else []
        numbers = [float(value) for value in spent if isinstance(value, (int, float))]
        if len(numbers) < 2 or not all(math.isfinite(value) and value >= 0 for value in numbers):
            return None
        return RunCost(*numbers)

    @property
    def step_given(self) -> Optional[bool]:
        """Whether ``lr`` or ``num_burnin_steps`` was, by the settings; None where they do not say."""
        config = self.summary.get("config")
        if not isinstance(config, Mapping) or "num_burnin_steps" not in config:
            return None
        sampler = str(config.get("sampler"))
        if config["num_burnin_steps"] is not None or re.search(r"\blr=[\d.]", sampler):
            return True
        return False if sampler == CALIBRATED or "lr=None" in sampler else None

    @property
    def beside_seconds(self) -> float:
        """What susceptibility took, whose chains run beside those of its firings."""
        return sum(found.seconds for found in self.susceptibilities if math.isfinite(found.seconds))


@dataclass(frozen=True, eq=False)
class Run:
    """All monitors of one run.

    Attributes:
        monitors: at least one; the first is the one that the story is told of.
    """

    monitors: tuple[MonitorRecord, ...]

    @property
    def main(self) -> MonitorRecord:
        """The monitor without a name, else the first by name."""
        return self.monitors[0]

    @property
    def title(self) -> str:
        """The folder's own name and the one above it, without the record's folder."""
        parts = [p for p in self.main.folder.resolve().parent.parts if p not in (os.sep, "")]
        return "/".join(parts[-2:]) or "run"


def load_run(folder: Union[str, os.PathLike[str]], traces: bool = True) -> Run:
    """Read the record of a run.

    Args:
        folder: the record's own folder (``.../slt``), the run's folder that has it inside, or one further up that has
            no other run below it, as far as four levels.
        traces: whether the chains are read as well.

    Raises:
        FileNotFoundError: where there is no record; names the records below, if any.
    """
    given = Path(folder)
    if not given.exists():
        raise FileNotFoundError(f"RUN_DIR={str(given)!r}: no such folder.")
    found = [monitor_record(place, traces) for place in folders_of(given)]
    monitors = [m for m in found if m.estimates]
    if not monitors:
        below = _runs_below(given)
        if len({tuple(folders_of(place)) for place in below}) == 1:
            return load_run(below[0], traces)
        named = ", ".join(str(place) for place in below[:_SUGGESTIONS])
        hint = f" Name one of: {named}." if below else " Give the folder that the monitor names at its end."
        raise FileNotFoundError(f"RUN_DIR={str(given)!r}: no estimates in it.{hint}")
    return Run(tuple(monitors))


def folders_of(given: Path) -> list[Path]:
    """The record folders of one run, the main one first: of monitors with names they lie in it or beside it."""
    if (given / RECORD_FILE).exists():
        inside = [p for p in sorted(given.glob("*_*")) if p.is_dir() and (p / RECORD_FILE).exists()]
        base = given.name
        beside = []
        if base == "slt" or base.startswith("slt_"):
            beside = [p for p in [given.parent / "slt", *sorted(given.parent.glob("slt_*"))] if p != given]
        # a later run has its other monitors elsewhere; a folder that a user has named so has them inside
        near = inside if _is_other_run(given) else [*beside, *inside]
        others = [p for p in near if (p / RECORD_FILE).exists() and not _is_other_run(p)]
        return sorted([given, *others], key=lambda p: (_is_named(p), p != given, p.name))
    places = [p for p in [given / "slt", *sorted(given.glob("slt_*"))] if (p / RECORD_FILE).exists()]
    places = [p for p in places if not _is_other_run(p)]
    if places and places[0].name == "slt":
        return folders_of(places[0])
    return places


def _is_other_run(folder: Path) -> bool:
    """Whether it is named as the folder of a later run; and not since its monitor is called so."""
    if not _OTHER_RUN.search(folder.name):
        return False
    first = next(RunRecord(folder).read(traces=False), None)
    return first is None or folder.name != f"slt_{first.component}"


def _is_named(folder: Path) -> bool:
    return folder.name.startswith("slt_")


def monitor_record(folder: Path, traces: bool = True) -> MonitorRecord:
    """What is in one record folder; a file that cannot be read is as one that is not there, and the log names it."""
    by_step: dict[Any, Estimate] = {}
    for number, estimate in enumerate(RunRecord(folder).read(traces)):
        by_step[estimate.step if estimate.step is not None else f"number {number}"] = estimate
    estimates = sorted(by_step.values(), key=lambda e: e.step or 0)
    return MonitorRecord(
        folder,
        tuple(estimates),
        tuple(_influences(folder)),
        _transitions(folder),
        _json(folder / "summary.json"),
        tuple(_susceptibilities(folder)),
    )


def _influences(folder: Path) -> Iterator[InfluenceEstimate]:
    held: Optional[InfluenceEstimate] = None
    for estimate in InfluenceRecord(folder).read():
        if held is not None:
            # the pairs of every firing would be gigabytes
            yield held.without_pairs()
        held = estimate
    if held is not None:
        yield held


def _susceptibilities(folder: Path) -> Iterator[SusceptibilityEstimate]:
    for found in SusceptibilityRecord(folder).read():
        none = found.matrix[:, :0]
        # those of every firing would be gigabytes where many samples are looked at
        yield found.replace(matrix=none, matrix_se=none, sample_index=found.sample_index[:0])


def _transitions(folder: Path) -> Optional[TransitionLog]:
    try:
        return TransitionLog.read(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning(f"the transitions are left out: {error}")
        return None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _runs_below(folder: Path, depth: int = 4) -> list[Path]:
    """Folders of records below this one that have anything in them, without those that lie within another of them."""
    levels = ("/".join(["*"] * level + [RECORD_FILE]) for level in range(1, depth + 1))
    found = {path.parent for pattern in levels for path in folder.glob(pattern) if path.stat().st_size}
    return sorted(place for place in found if found.isdisjoint(place.parents))


__all__ = ["CALIBRATED", "MonitorRecord", "Run", "folders_of", "load_run", "monitor_record"]
