"""What the charts of :mod:`lightning_slt.publish.specs` draw: records as plain rows.

The rows of :func:`curve_rows` are also a table of the wandb run, so that the same chart is drawn there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from lightning_slt.influence_record import MIN_Z, InfluenceEstimate
from lightning_slt.publish.diagnoses import diagnosis, verdict_sentence
from lightning_slt.publish.phrases import number, signed, with_error
from lightning_slt.publish.specs.parts import (
    ABOVE,
    BELOW,
    COSTS,
    DIAGNOSTICS,
    INVALID,
    NONE,
    TRAJECTORIES,
    VALID,
    Scale,
    widened,
)
from lightning_slt.publish.tables import are_log_spaced, step_of
from lightning_slt.publish.trajectory_charts import followed
from lightning_slt.publish.transition_charts import free_energy_line, free_energy_range
from lightning_slt.publish.words import KIND_WORDS, transition_title
from lightning_slt.record import Estimate
from lightning_slt.transition_record import TransitionReport, size_text
from lightning_slt.transitions import Transition

CURVE_COLUMNS: tuple[str, ...] = (
    "row",
    "step",
    "llc",
    "low",
    "high",
    "loss",
    "state",
    "segment",
    "middle",
    "end",
    "kind",
    "boundary",
    "words",
)
"""``row`` is ``estimate``, ``transition`` or ``boundary``; ``llc``, ``low`` and ``high`` are cut at the frame."""

Row = dict[str, Any]


def curve_rows(
    estimates: Sequence[Estimate], transitions: Sequence[Transition] = (), boundaries: Sequence[float] = ()
) -> list[list[Any]]:
    """The curve in the order of :data:`CURVE_COLUMNS`: estimates, then transitions that stand, then boundaries.

    What is not valid widens the frame where it is within the height of what is: a point beyond is put on the frame, and
    its state says so. Neighbouring valid estimates share a ``segment``; what is not valid ends it.
    """
    low, high = _frame(estimates)

    def cut(value: float) -> Optional[float]:
        return min(max(value, low), high) if math.isfinite(value) else None

    rows: list[list[Any]] = []
    segment = 0
    for i, e in enumerate(estimates):
        state = _state(e, low, high)
        segment += state != VALID
        bottom, top = _band(e)
        # what could not be estimated still has a place in time: a cross at the foot
        llc = low if state == NONE else e.mean
        words = verdict_sentence(e)
        row = ["estimate", step_of(e, i), cut(llc), cut(bottom), cut(top), _plain(e.init_loss), state, str(segment)]
        rows.append([*row, None, None, None, None, words])
    for t in transitions:
        if t.state == "retracted":
            continue
        words = f"{transition_title(t)} (kind {t.kind}, {t.state}): LLC {signed(t.llc_change)}, "
        words += f"loss {signed(t.loss_change)}"
        row = ["transition", t.onset, None, None, None, None, t.state, None, t.step, t.end, t.kind, t.boundary, words]
        rows.append(row)
    for step in boundaries:
        words = f"Step {step:,.0f}: the learning rate jumped, or the data was loaded anew"
        rows.append(["boundary", step, *[None] * 10, words])
    return rows


def as_dicts(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[Row]:
    """Rows by the names of their columns, without what is None."""
    return [{k: v for k, v in zip(columns, row, strict=True) if v is not None} for row in rows]


def steps_scale(estimates: Sequence[Estimate]) -> Scale:
    """Logarithmic where steps span more than a factor of 100 and are spaced that way."""
    steps = [step_of(e, i) for i, e in enumerate(estimates)]
    if not are_log_spaced(steps):
        return "linear"
    return "log" if min(steps) > 0 else "symlog"


def loss_is_wide(estimates: Sequence[Estimate]) -> bool:
    """Whether the loss needs a logarithmic axis: it is positive and spans more than a factor of 50."""
    loss = [e.init_loss for e in estimates if math.isfinite(e.init_loss)]
    return bool(loss) and min(loss) > 0 and max(loss) / min(loss) > 50


def component_rows(name: str, estimates: Sequence[Estimate]) -> list[Row]:
    """One component's curve; of what has no number, nothing."""
    rows = as_dicts(CURVE_COLUMNS, curve_rows(estimates))
    kept = ("step", "llc", "low", "high", "state", "segment", "words")
    shown = [{k: row[k] for k in kept if k in row} for row in rows if row["state"] != NONE]
    return [{**row, "component": name, "words": f"{name}. {row['words']}"} for row in shown]


def band_rows(estimate: Estimate) -> list[Row]:
    """The band of one estimate; none where it has no number."""
    if not math.isfinite(estimate.mean):
        return []
    low, high = _band(estimate)
    return [{"mean": estimate.mean, "low": low, "high": high, "valid": estimate.valid}]


def free_energy_rows(report: TransitionReport) -> list[Row]:
    """The two lines, the critical n and the present one, for each posterior; empty where a phase is not known."""
    before, after, n = report.before, report.after, report.num_samples
    if before is None or after is None or n is None:
        return []
    rows: list[Row] = []
    for verdict, name in ((report.tempered, "the posterior that was sampled"), (report.untempered, "beta = 1")):
        if verdict is None:
            continue
        said = "undecided" if verdict.preferred == "undecided" else f"prefers the phase {verdict.preferred}"
        title = f"{name}: {said}"
        sizes = free_energy_range(verdict, n)[::4]
        lowest = min(before.loss, after.loss)
        lines = {
            f"phase {side}": free_energy_line(phase, sizes, verdict.beta, lowest)
            for side, phase in (("before", before), ("after", after))
        }
        ceiling = math.inf
        if verdict.critical_n is not None:
            crossing = float(free_energy_line(before, np.array([verdict.critical_n]), verdict.beta, lowest)[0])
            ceiling = 3 * crossing if crossing > 0 else math.inf
        for phase_name, energy in lines.items():
            for size, value in zip(sizes.tolist(), energy.tolist(), strict=True):
                if value <= ceiling:
                    rows.append(
                        {
                            "row": "line",
                            "posterior": title,
                            "phase": phase_name,
                            "n": _short(size),
                            "energy": _short(value),
                        }
                    )
        rows.append({"row": "here", "posterior": title, "n": n, "words": f"n = {n:,}: the samples of this run"})
        if verdict.critical_n is not None and sizes[0] <= verdict.critical_n <= sizes[-1]:
            low = max(verdict.critical_n_low or sizes[0], sizes[0])
            high = min(verdict.critical_n_high if verdict.critical_n_high is not None else sizes[-1], sizes[-1])
            words = f"critical n about {size_text(verdict.critical_n)}: there both phases are equal"
            row = {
                "row": "critical",
                "posterior": title,
                "n": verdict.critical_n,
                "low": float(low),
                "high": float(high),
            }
            rows.append({**row, "words": words})
    return rows


def diagnostic_rows(estimates: Sequence[Estimate]) -> list[Row]:
    """R-hat, effective draws, chains left out, virial ratio; what is not finite is left out."""
    rows: list[Row] = []
    for i, e in enumerate(estimates):
        step = step_of(e, i)
        for measure, value in zip(DIAGNOSTICS, (e.rhat, e.ess, float(e.num_bad_chains), e.virial), strict=True):
            if math.isfinite(value):
                words = f"Step {step:,}: {measure.split(' (')[0]} {number(value)}"
                rows.append({"measure": measure, "step": step, "value": _short(value), "words": words})
    return rows


def cost_rows(estimates: Sequence[Estimate]) -> list[Row]:
    """Seconds a firing, share of the wall-clock."""
    rows: list[Row] = []
    for i, e in enumerate(estimates):
        step = step_of(e, i)
        for measure, value, text in zip(COSTS, (e.seconds, e.overhead), ("{:.3g} s", "{:.1%}"), strict=True):
            if math.isfinite(value):
                words = f"Step {step:,}: {text.format(value)}"
                rows.append({"measure": measure, "step": step, "value": _short(value), "words": words})
    return rows


def group_rows(influence: InfluenceEstimate) -> list[Row]:
    """Each group of queries with each of training samples; ``clear`` beyond 3 standard errors."""
    if influence.group_matrix is None or influence.group_se is None:
        return []
    values, errors = influence.group_matrix.tolist(), influence.group_se.tolist()
    most = max((abs(v) for row in values for v in row if math.isfinite(v)), default=0.0)
    unit = group_unit(influence)
    rows: list[Row] = []
    for q, query in enumerate(influence.groups):
        for t, train in enumerate(influence.groups):
            value, error = values[q][t], errors[q][t]
            if not math.isfinite(value):
                continue
            clear = abs(value) > MIN_Z * error
            effect = "help" if value > 0 else "harm"
            words = f"Samples of {train} {effect} queries of {query}: {with_error(value, error)}"
            words += "" if clear else " (within 3 standard errors of zero)"
            row: Row = {"query": query, "train": train, "value": _short(value), "clear": clear, "words": words}
            row["text"] = f"{value / unit:.1f}".replace("-0.0", "0.0").replace("-", "−")
            rows.append({**row, "dark": clear and abs(value) > 0.6 * most})
    return rows


def group_unit(influence: InfluenceEstimate) -> float:
    """The power of ten that the cells of the heat map are written in units of."""
    if influence.group_matrix is None:
        return 1.0
    known = influence.group_matrix[influence.group_matrix.isfinite()].abs()
    most = float(known.max()) if len(known) else 0.0
    return 10.0 ** math.floor(math.log10(most)) if most > 0 else 1.0


def sample_columns(influence: InfluenceEstimate, k: int = 20) -> dict[str, Any]:
    """Every sample's two losses and self-influence as columns, and the places of the ``k`` suspects.

    As columns, since a run may have a thousand samples at fifty firings; the page makes rows of one firing at a time.
    """
    plain, mean = influence.init_loss.tolist(), influence.mean_loss.tolist()
    both = [v for v in plain + mean if math.isfinite(v)]
    return {
        "plain": [_short(v) if math.isfinite(v) else None for v in plain],
        "mean": [_short(v) if math.isfinite(v) else None for v in mean],
        "own": [_short(v) if math.isfinite(v) else None for v in influence.self_influence.tolist()],
        "suspects": influence.suspects(k),
        "log": is_wide(both),
    }


def is_wide(values: Sequence[float]) -> bool:
    """Whether an axis of these should be logarithmic: all positive, over a factor of 100."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 100


def trajectory_rows(history: Sequence[InfluenceEstimate]) -> list[Row]:
    """The samples whose mean loss changed most, over training; empty with fewer than two firings."""
    found = followed(history)
    if found is None:
        return []
    steps, index, loss, influence = found
    last = history[-1]
    names = dict(zip(last.train_index.tolist(), last.train_group, strict=True)) if last.train_group is not None else {}
    rows: list[Row] = []
    for measure, values in zip(TRAJECTORIES, (loss, influence), strict=True):
        for k, i in enumerate(index):
            sample = f"{i} “{names[i]}”" if i in names else str(i)
            for step, value in zip(steps, values[:, k].tolist(), strict=True):
                if math.isfinite(value):
                    rows.append({"measure": measure, "sample": sample, "step": step, "value": _short(value)})
    return rows


def _band(estimate: Estimate) -> tuple[float, float]:
    """The interval; of no width where the error is not known."""
    return estimate.interval if math.isfinite(estimate.se) else (estimate.mean, estimate.mean)


def _frame(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """The heights between which points are drawn."""
    good = [_band(e) for e in estimates if e.valid and math.isfinite(e.mean)]
    doubtful = [e for e in estimates if not e.valid and math.isfinite(e.mean)]
    if not good:  # nothing that wide errors could flatten: cut, they would look small
        bands = [_band(e) for e in doubtful] or [(0.0, 0.0)]
        return min(b[0] for b in bands), max(b[1] for b in bands)
    return widened(min(b[0] for b in good), max(b[1] for b in good), [e.mean for e in doubtful])


def _state(estimate: Estimate, low: float, high: float) -> str:
    if not math.isfinite(estimate.mean):
        return NONE
    if estimate.valid:
        return VALID
    return BELOW if estimate.mean < low else ABOVE if estimate.mean > high else INVALID


def _plain(value: float) -> Optional[float]:
    return value if math.isfinite(value) else None


def _short(value: float) -> float:
    """Five digits: as many as can be seen."""
    return float(f"{value:.5g}")


__all__ = [
    "CURVE_COLUMNS",
    "KIND_WORDS",
    "band_rows",
    "component_rows",
    "cost_rows",
    "curve_rows",
    "diagnosis",
    "diagnostic_rows",
    "free_energy_rows",
    "group_rows",
    "sample_columns",
    "trajectory_rows",
]
