"""Transitions as plain rows: when, what changed, and what the posterior prefers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

from lightning_slt.transition_record import TransitionLog, TransitionReport, Verdict
from lightning_slt.transitions import Transition

TRANSITION_COLUMNS: tuple[str, ...] = (
    "id",
    "state",
    "kind",
    "step",
    "onset",
    "end",
    "known_at",
    "boundary",
    "score",
    "llc_change",
    "llc_change_se",
    "loss_change",
    "loss_change_se",
    "llc_before",
    "llc_before_se",
    "llc_after",
    "llc_after_se",
    "loss_before",
    "loss_before_se",
    "loss_after",
    "loss_after_se",
    "n",
    "preferred",
    "log_odds",
    "log_odds_se",
    "critical_n",
    "critical_n_low",
    "critical_n_high",
    "preferred_untempered",
    "log_odds_untempered",
    "log_odds_se_untempered",
    "critical_n_untempered",
    "critical_n_low_untempered",
    "critical_n_high_untempered",
    "moved_component",
    "moved_samples",
    "refined_step",
    "refined_onset",
    "sentence",
)


def transition_rows(log: TransitionLog) -> list[list[Any]]:
    """A row a transition, in the order of :data:`TRANSITION_COLUMNS`; unknown or non-finite values are None.

    Transitions that only the whole curve shows come last, with the state ``"offline"``.
    """
    rows = [_row(report.transition, report.transition.state, report) for report in log.reports]
    matched = {report.refined.id for report in log.reports if report.refined is not None}
    return rows + [_row(t, "offline", None) for t in log.offline if t.id not in matched]


def _row(t: Transition, state: str, report: Optional[TransitionReport]) -> list[Any]:
    phases: list[list[Optional[float]]] = []
    row: list[Any] = [t.id if report is not None else None, state, t.kind, t.step, t.onset, t.end, t.known_at]
    row += [t.boundary, t.score, t.llc_change, t.llc_change_se, t.loss_change, t.loss_change_se]
    for phase in (report.before, report.after) if report is not None else (None, None):
        phases.append([None] * 4 if phase is None else [phase.llc, phase.llc_se, phase.loss, phase.loss_se])
    row += [value for part in (slice(0, 2), slice(2, 4)) for numbers in phases for value in numbers[part]]
    row += [report.num_samples if report is not None else None]
    for verdict in (report.tempered, report.untempered) if report is not None else (None, None):
        row += _verdict(verdict)
    if report is None:
        row += ["", "", None, None, ""]
    else:
        refined = report.refined
        row += [
            report.components[0].name if report.components else "",
            " ".join(str(sample.index) for sample in report.samples),
            refined.step if refined is not None else None,
            refined.onset if refined is not None else None,
            report.sentence(),
        ]
    return [None if isinstance(value, float) and not math.isfinite(value) else value for value in row]


def _verdict(verdict: Optional[Verdict]) -> Sequence[Any]:
    if verdict is None:
        return ["", None, None, None, None, None]
    v = verdict
    return [v.preferred, v.log_odds, v.log_odds_se, v.critical_n, v.critical_n_low, v.critical_n_high]
