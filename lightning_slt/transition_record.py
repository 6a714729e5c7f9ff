"""What is known of the transitions of a run, as plain data, and its file on disk.

``transitions.json`` in the run's folder is written anew whenever something becomes known, and is readable without this
package: ``{"monitor", "threshold", "boundaries", "transitions": [...], "offline": [...]}``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from lightning_slt.durable import write_whole
from lightning_slt.transitions import Phase, PhaseComparison, Transition, compare_phases

_MOST_DIGITS = 9
"""Of a number in a sentence, however small its error is."""
TRANSITIONS_FILE = "transitions.json"


@dataclass(frozen=True)
class MovedSample:
    """A training sample whose numbers changed much across a transition.

    Attributes:
        index: its number in the training data.
        group: its group, empty where there are none.
        mean_loss_change: posterior mean loss after less before.
        mean_loss_change_se: its standard error.
        self_influence_change: variance of the sample's own loss, after less before.
        self_influence_change_se: its standard error.
    """

    index: int
    group: str
    mean_loss_change: float
    mean_loss_change_se: float
    self_influence_change: float
    self_influence_change_se: float

    @property
    def stands_out(self) -> bool:
        """Whether one of the two changes is more than three standard errors."""
        changes = (self.mean_loss_change, self.self_influence_change)
        errors = (self.mean_loss_change_se, self.self_influence_change_se)
        return any(abs(change) > 3 * error for change, error in zip(changes, errors, strict=True))


@dataclass(frozen=True)
class MovedComponent:
    """How far the LLC of one monitored component moved across a transition.

    Attributes:
        name: of its monitor; the key prefix where it has none.
        change: LLC after less before.
        scatters: the same in units of the component's own scatter from point to point.
    """

    name: str
    change: float
    scatters: float


@dataclass(frozen=True)
class Verdict:
    """Which of the two phases a posterior prefers.

    Attributes:
        beta: inverse temperature of that posterior.
        preferred: ``"before"``, ``"after"``, or ``"undecided"`` within two standard errors.
        log_odds: log of the odds of the phase after against the phase before: above 0, the new phase is preferred.
        log_odds_se: its standard error.
        critical_n: number of samples at which the two are equal, None where there is no such number.
        critical_n_low, critical_n_high: 95 % interval of it; the upper end None where it is unbounded.
    """

    beta: float
    preferred: str
    log_odds: float
    log_odds_se: float
    critical_n: Optional[float] = None
    critical_n_low: Optional[float] = None
    critical_n_high: Optional[float] = None


@dataclass(frozen=True)
class TransitionReport:
    """A transition with all that is known about it.

    Attributes:
        transition: what the online detector says, in its current state.
        x: the logger's step of the firing that flagged it.
        num_samples: n, where it is known.
        before, after: the phases on its two sides, None where a side has fewer than two usable points.
        tempered: what the posterior that the chains sample prefers at n samples, None where it cannot be said.
        untempered: the same for the posterior at inverse temperature 1.
        samples: those that moved most, where influence is measured.
        components: every monitored component, the one that moved most first; empty with a single monitor.
        checkpoints: role ("before", "onset", "after", "flag") -> path of the pinned weights.
        refined: the transition of the whole curve that belongs to this one, known at the end of the run.
    """

    transition: Transition
    x: Optional[int] = None
    num_samples: Optional[int] = None
    before: Optional[Phase] = None
    after: Optional[Phase] = None
    tempered: Optional[Verdict] = None
    untempered: Optional[Verdict] = None
    samples: tuple[MovedSample, ...] = ()
    components: tuple[MovedComponent, ...] = ()
    checkpoints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refined: Optional[Transition] = None

    def replace(self, **changes: Any) -> TransitionReport:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def compared(self, beta: float) -> Optional[PhaseComparison]:
        """The phase after against the phase before at an inverse temperature; None where a phase is not known."""
        if self.before is None or self.after is None:
            return None
        return compare_phases(self.after, self.before, beta)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only: numbers that are not finite become None."""
        values = dataclasses.asdict(self.replace(checkpoints=dict(self.checkpoints)))
        return {**_plain(values), "sentence": self.sentence()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransitionReport:
        """The inverse of :meth:`as_dict`; unknown keys are passed over."""
        refined = values.get("refined")
        return cls(
            transition=_transition(values["transition"]),
            x=values.get("x"),
            num_samples=values.get("num_samples"),
            before=_built(Phase, values.get("before")),
            after=_built(Phase, values.get("after")),
            tempered=_built(Verdict, values.get("tempered")),
            untempered=_built(Verdict, values.get("untempered")),
            samples=tuple(_built(MovedSample, sample) for sample in values.get("samples", ())),
            components=tuple(_built(MovedComponent, component) for component in values.get("components", ())),
            checkpoints=dict(values.get("checkpoints", {})),
            refined=_transition(refined) if refined is not None else None,
        )

    def sentence(self) -> str:
        """What changed, for a person to read."""
        t = self.transition
        text = (
            f"transition {t.id} (kind {t.kind}, {t.state}) around step {t.step:.0f} ({t.onset:.0f} to {t.end:.0f}), "
            f"known at step {t.known_at:.0f}: "
        )
        if self.before is not None and self.after is not None:
            # of whole plateaus, where the detector had the few points up to the flag
            text += (
                f"LLC {_went(self.before.llc, self.before.llc_se, self.after.llc, self.after.llc_se)}, "
                f"loss {_went(self.before.loss, self.before.loss_se, self.after.loss, self.after.loss_se)}"
            )
        else:
            text += f"LLC {_changed(t.llc_change, t.llc_change_se)}, loss {_changed(t.loss_change, t.loss_change_se)}"
        if t.boundary is not None:
            text += f"; the learning rate or the data changed at step {t.boundary:.0f}"
        if self.components:
            first = self.components[0]
            text += (
                f"; of the components {first.name} moved most ({_minus(f'{first.change:+.3g}')}{_times_usual(first)})"
            )
        moved = [str(sample.index) for sample in self.samples if sample.stands_out]
        if moved:
            text += f"; samples that moved most: {', '.join(moved)}"
        if self.tempered is not None:
            text += f"; {_preference(self.tempered, self.num_samples)}"
        return text


@dataclass(frozen=True)
class TransitionLog:
    """All transitions of one monitored curve.

    Attributes:
        monitor: key of the curve.
        threshold: score from which on there is a flag.
        reports: the online flags, in the order in which they became known.
        boundaries: steps at which the learning rate or the data changed.
        offline: transitions of the whole curve, known at the end of the run.
    """

    monitor: str
    threshold: float
    reports: tuple[TransitionReport, ...] = ()
    boundaries: tuple[float, ...] = ()
    offline: tuple[Transition, ...] = ()

    @property
    def standing(self) -> list[Transition]:
        """Those that were not retracted."""
        return [r.transition for r in self.reports if r.transition.state != "retracted"]

    def as_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {
            "monitor": self.monitor,
            "threshold": self.threshold,
            "boundaries": list(self.boundaries),
            "transitions": [report.as_dict() for report in self.reports],
            "offline": [_plain(t.as_dict()) for t in self.offline],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransitionLog:
        """The inverse of :meth:`as_dict`."""
        return cls(
            monitor=values["monitor"],
            threshold=float(values["threshold"]),
            reports=tuple(TransitionReport.from_dict(report) for report in values["transitions"]),
            boundaries=tuple(float(step) for step in values["boundaries"]),
            offline=tuple(_transition(t) for t in values["offline"]),
        )

    def write(self, folder: Union[str, os.PathLike[str]]) -> Path:
        """Into ``transitions.json`` of a folder, in one step.

        Raises:
            OSError: where the folder cannot be written.
        """
        path = Path(folder) / TRANSITIONS_FILE
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return path

    @classmethod
    def read(cls, folder: Union[str, os.PathLike[str]]) -> TransitionLog:
        """From ``transitions.json`` of a folder.

        Raises:
            FileNotFoundError: where no transitions were monitored.
            ValueError: where the file is broken, naming it.
        """
        path = Path(folder) / TRANSITIONS_FILE
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: cannot be read ({type(error).__name__}: {error}). Restore the file from a copy, or delete it."
            ) from error


def _plain(value: Any) -> Any:
    """Nested data without numbers that JSON does not know, and with lists for tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _transition(values: Mapping[str, Any]) -> Transition:
    # what was not finite when it was written: only an error or the score can be
    lost = ("llc_change_se", "loss_change_se", "score")
    return Transition.from_dict({k: math.nan if v is None and k in lost else v for k, v in values.items()})


def _built(kind: Any, values: Optional[Mapping[str, Any]]) -> Any:
    if values is None:
        return None
    fields = {f.name: f for f in dataclasses.fields(kind)}
    known = {k: v for k, v in values.items() if k in fields}
    return kind(**{k: math.nan if v is None and fields[k].type == "float" else v for k, v in known.items()})


def _changed(change: float, error: float) -> str:
    way = "rose" if change > 0 else "fell"
    return f"{way} by {_with_error(abs(change), error, 3, 2)}"


def _went(before: float, before_se: float, after: float, after_se: float) -> str:
    return f"from {_with_error(before, before_se, 4, 1)} to {_with_error(after, after_se, 4, 1)}"


def _with_error(value: float, error: float, least: int, of_error: int) -> str:
    """A number with its error, to ``of_error`` digits of that where this takes more than ``least`` of its own.

    Example:
        >>> _with_error(-20987.0, 3.0, 4, 1), _with_error(1.5, 0.01, 4, 1), _with_error(1.5, math.nan, 3, 2)
        ('−20987 ± 3', '1.5 ± 0.01', '1.5')
    """
    if not math.isfinite(error):
        return _rounded(value, least)
    digits = least
    if value and error > 0 and math.isfinite(value):
        digits = max(least, math.floor(math.log10(abs(value))) - math.floor(math.log10(error)) + of_error)
    return f"{_rounded(value, min(digits, _MOST_DIGITS))} ± {_rounded(error, of_error)}"


def _rounded(value: float, digits: int) -> str:
    """To so many digits, in plain figures below 1e7.

    Example:
        >>> _rounded(-20987.0, 2), _rounded(3.2e9, 2)
        ('−21000', '3.2e+09')
    """
    return _minus(f"{float(f'{value:.{digits}g}'):.{max(digits, 7)}g}")


def _minus(number: str) -> str:
    """With the sign that is no hyphen."""
    return f"−{number[1:]}" if number.startswith("-") else number


def _times_usual(moved: MovedComponent) -> str:
    """How large the change of a component is beside what it changes by anyway; nothing where that is not known."""
    if not math.isfinite(moved.scatters):
        return ""
    times = f"{moved.scatters:.2g}" if moved.scatters < 10 else f"{moved.scatters:,.0f}"
    return f", {times} times as much as it varies from point to point"


def size_text(n: float) -> str:
    """A number of samples to two digits.

    Example:
        >>> size_text(977.9), size_text(3.14e9)
        ('980', '3.1e+09')
    """
    rounded = float(f"{n:.2g}")
    return f"{rounded:,.0f}" if 1 <= rounded < 1e7 else f"{rounded:.2g}"


def critical_interval(verdict: Verdict) -> str:
    """The 95 % interval of a critical n.

    Example:
        >>> critical_interval(Verdict(0.15, "before", -7.0, 2.0, 978.0, 700.0, None))
        '95 % 700 to unbounded'
    """
    low = 0.0 if verdict.critical_n_low is None else verdict.critical_n_low
    high = "unbounded" if verdict.critical_n_high is None else size_text(verdict.critical_n_high)
    return f"95 % {size_text(low)} to {high}"


def _preference(verdict: Verdict, n: Optional[int]) -> str:
    way = f"prefers the phase {verdict.preferred}" if verdict.preferred != "undecided" else "is undecided between them"
    odds = _with_error(verdict.log_odds, verdict.log_odds_se, 3, 2)
    text = f"the sampled posterior {way} at n = {n} (log-odds of the new phase {odds}"
    if verdict.critical_n is not None:
        text += f"; equal at n = {size_text(verdict.critical_n)}, {critical_interval(verdict)}"
    return text + ")"


__all__ = ["MovedComponent", "MovedSample", "TransitionLog", "TransitionReport", "Verdict"]
