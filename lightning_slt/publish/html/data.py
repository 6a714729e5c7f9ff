"""What the page's script is given: charts with their rows, the chains of each firing, influence, and the samples.

Long runs are thinned here, so that the file stays one that can be mailed: see the budgets below.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from PIL import Image

from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.publish.chart_rows import (
    CURVE_COLUMNS,
    as_dicts,
    band_rows,
    component_rows,
    cost_rows,
    curve_rows,
    diagnostic_rows,
    free_energy_rows,
    group_rows,
    group_unit,
    is_wide,
    loss_is_wide,
    sample_columns,
    steps_scale,
    trajectory_rows,
)
from lightning_slt.publish.diagnoses import bad_chains, verdict_sentence
from lightning_slt.publish.influence_tables import media_id
from lightning_slt.publish.phrases import number
from lightning_slt.publish.run import MonitorRecord, Run
from lightning_slt.publish.specs import influence as influence_specs
from lightning_slt.publish.specs.chains import chains, cost, diagnostics
from lightning_slt.publish.specs.curve import components, curve
from lightning_slt.publish.specs.filled import for_page
from lightning_slt.publish.specs.parts import STATES, Scale, Spec
from lightning_slt.publish.specs.susceptibility import course
from lightning_slt.publish.specs.transitions import free_energy
from lightning_slt.publish.susceptibility_rows import course_rows, drawn, line_names
from lightning_slt.publish.tables import step_of, thinned
from lightning_slt.publish.words import offline_only, pairs_sentence, suspects_sentence
from lightning_slt.record import Estimate

MAX_DRAWS = 300_000
"""Draws of chains in the whole page; a firing keeps every k-th, and of very many firings some are left out."""
MAX_FIRINGS = 150
MAX_POINTS = 3_000
"""Estimates of a monitor that are drawn as points; of more, so many are, evenly taken."""
MAX_CELLS = 20_000
"""Cells of heat maps; beyond, only the last firing has one."""
MAX_SAMPLE_VALUES = 300_000
MAX_SAMPLE_BYTES = 3_500_000
"""Of pictures, as text; the newest suspects come first."""
SIDE = 96
"""Pixels of a sample's picture, at the most."""
SUSPECTS = 20


def page_data(run: Run) -> dict[str, Any]:
    """Plain types without NaN."""
    monitor = run.main
    scale = steps_scale(monitor.estimates)
    steps = [s for s in (step_of(e, i) for i, e in enumerate(monitor.estimates)) if s > 0]
    ticks = {"@first": min(steps, default=1), "@ticks": [0, *(10**k for k in range(len(str(max(steps, default=1)))))]}
    source = with_influence(run)
    history = source.influences if source is not None else ()
    shown = thinned(history, _firings_that_fit(history))
    data: dict[str, Any] = {
        "charts": _charts(run, scale, ticks),
        "specs": {
            "running": for_page(chains(running=True)),
            "draws": for_page(chains(running=False)),
            "groups": influence_specs.groups(numbers=max((len(i.groups) for i in history), default=0) <= 12),
            "samples": influence_specs.samples(),
            "samplesLog": influence_specs.samples(log=True),
        },
        "chains": _chains(run),
        "influence": influence_firings(shown),
        "known": [{"index": index, "group": group} for index, group in _known(shown)],
        "samples": samples_of(source.folder, history) if source is not None else {},
    }
    return data


def with_influence(run: Run) -> Optional[MonitorRecord]:
    """The first monitor that measured influence."""
    return next((m for m in run.monitors if any(len(i.train_index) for i in m.influences)), None)


def _charts(run: Run, scale: Scale, ticks: dict[str, Any]) -> dict[str, Any]:
    monitor, log = run.main, run.main.transitions
    marks = [*log.standing, *offline_only(log)] if log is not None else []
    estimates = thinned(monitor.estimates, MAX_POINTS)
    rows = as_dicts(CURVE_COLUMNS, curve_rows(estimates, marks, log.boundaries if log is not None else ()))
    states = {row["state"] for row in rows if row["row"] == "estimate"}
    present = {"@states": [state for state in STATES if state in states]}
    charts: dict[str, Any] = {
        "curve": _chart(
            curve(
                scale,
                loss_is_wide(estimates),
                transitions=any(row["row"] == "transition" for row in rows),
                boundaries=any(row["row"] == "boundary" for row in rows),
                states=present["@states"],
                points=len(estimates),
            ),
            rows,
            {**ticks, **present},
        ),
        "diagnostics": _chart(
            diagnostics(scale, left_out=any(e.num_bad_chains for e in estimates)),
            diagnostic_rows(estimates),
            ticks,
            columns=2 if any(e.num_bad_chains for e in estimates) else 3,
        ),
        "cost": _chart(cost(scale), cost_rows(estimates), ticks),
    }
    if len(run.monitors) > 1:
        parts = [row for m in run.monitors for row in component_rows(m.name, thinned(m.estimates, MAX_POINTS))]
        most = min(MAX_POINTS, max(len(m.estimates) for m in run.monitors))
        charts["components"] = _chart(components(scale, most), parts, {**ticks, **_order(parts, "component")})
    for report in log.reports if log is not None else ():
        energies = free_energy_rows(report)
        if energies:
            charts[f"energy{report.transition.id}"] = _chart(free_energy(), energies, _order(energies, "posterior"))
    source = with_influence(run)
    lines = trajectory_rows(source.influences) if source is not None else []
    if lines:
        wide = is_wide([row["value"] for row in lines])
        charts["trajectories"] = _chart(influence_specs.trajectories(scale, wide), lines, ticks)
    for place, each in enumerate(run.monitors):
        found = course_rows(drawn(each.susceptibilities)) if len(each.susceptibilities) > 1 else []
        tokens = {**ticks, **_order(found, "component"), "@lines": line_names(found)}
        charts[f"susceptibility{place}"] = _chart(course(found, scale), found, tokens)
    return {name: chart for name, chart in charts.items() if chart["datasets"]["rows"]}


def _order(rows: Sequence[Any], name: str) -> dict[str, Any]:
    """Frames in the order in which their rows come."""
    return {"@order": list(dict.fromkeys(row[name] for row in rows))}


def _chart(spec: Spec, rows: Sequence[Any], tokens: dict[str, Any], columns: int = 2) -> dict[str, Any]:
    return {"spec": for_page(spec), "datasets": {"rows": list(rows)}, "tokens": tokens, "columns": columns}


def _chains(run: Run) -> list[dict[str, Any]]:
    """Of each monitor whose chains are there: their files may be lost."""
    found = [{"name": m.name, "firings": chain_firings(m.estimates, len(run.monitors))} for m in run.monitors]
    return [monitor for monitor in found if monitor["firings"]]


def chain_firings(estimates: Sequence[Estimate], num_monitors: int = 1) -> list[dict[str, Any]]:
    """The chains of each firing with what is to be said of it; every k-th draw where there are many."""
    kept = thinned([e for e in enumerate(estimates) if e[1].trace.numel()], MAX_FIRINGS)
    room = MAX_DRAWS // max(1, num_monitors) // max(1, len(kept))
    firings = []
    for i, e in kept:
        num_chains, num_draws = e.trace.shape
        every = max(1, math.ceil(num_draws * num_chains / max(room, 50 * num_chains)))
        draws = [[_short(v) for v in chain] for chain in e.trace[:, ::every].tolist()]
        step = step_of(e, i)
        firings.append(
            {
                "step": step,
                "label": f"step {step:,}",
                "words": verdict_sentence(e),
                "valid": e.valid,
                "band": [{k: _short(v) if isinstance(v, float) else v for k, v in row.items()} for row in band_rows(e)],
                "every": every,
                "out": bad_chains(e),
                "draws": draws,
            }
        )
    return firings


def _firings_that_fit(history: Sequence[InfluenceEstimate]) -> int:
    most = max((len(i.train_index) for i in history), default=1)
    return max(2, min(MAX_FIRINGS, MAX_SAMPLE_VALUES // (3 * max(1, most))))


def _known(history: Sequence[InfluenceEstimate]) -> list[tuple[list[int], Optional[list[str]]]]:
    """The different sets of samples: nearly always one, the same at every firing."""
    found: list[tuple[list[int], Optional[list[str]]]] = []
    for influence in history:
        groups = list(influence.train_group) if influence.train_group is not None else None
        item = (influence.train_index.tolist(), groups)
        if item not in found:
            found.append(item)
    return found


def influence_firings(history: Sequence[InfluenceEstimate]) -> list[dict[str, Any]]:
    """Suspects, groups and samples of each firing."""
    known = _known(history)
    cells = sum(len(i.groups) ** 2 for i in history)
    firings = []
    for place, influence in enumerate(history):
        groups = list(influence.train_group) if influence.train_group is not None else None
        ranks = influence.loss_rank().tolist()
        suspects = [
            {
                "index": int(influence.train_index[j]),
                "group": groups[j] if groups is not None else "",
                "mean": number(float(influence.mean_loss[j])),
                "plain": number(float(influence.init_loss[j])),
                "rank": ranks[j],
            }
            for j in influence.suspects(SUSPECTS)
        ]
        step = influence.step if influence.step is not None else place
        last = place == len(history) - 1
        words = f"Step {step:,}: {suspects_sentence(influence)} {pairs_sentence(influence)}"
        firings.append(
            {
                "step": step,
                "label": f"step {step:,}",
                "words": words,
                "valid": influence.valid,
                "suspects": suspects,
                "unit": f"cells in units of {group_unit(influence):g}",
                "groups": group_rows(influence) if last or cells <= MAX_CELLS else [],
                "samples": {
                    **sample_columns(influence, SUSPECTS),
                    "known": known.index((influence.train_index.tolist(), groups)),
                }
                if len(influence.train_index)
                else None,
            }
        )
    return firings


def samples_of(folder: Path, history: Sequence[InfluenceEstimate]) -> dict[str, dict[str, str]]:
    """How the suspects look, by their number: pictures as data URLs, texts as they are. The newest come first."""
    found: dict[str, dict[str, str]] = {}
    size = 0
    for influence in reversed(history):
        for j in influence.suspects(SUSPECTS):
            index = int(influence.train_index[j])
            if str(index) in found:
                continue
            path = folder / "samples" / media_id(index)
            shown = _shown(path)
            if shown is None:
                continue
            size += sum(map(len, shown.values()))
            if size > MAX_SAMPLE_BYTES:
                return found
            found[str(index)] = shown
    return found


def _shown(path: Path) -> Optional[dict[str, str]]:
    try:
        if path.with_suffix(".png").exists():
            return {"image": picture_url(path.with_suffix(".png"))}
        if path.with_suffix(".txt").exists():
            return {"text": path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").strip()}
    except (OSError, ValueError):
        pass  # a picture that cannot be read is shown by its number
    return None


def picture_url(path: Path) -> str:
    """A picture as ``data:image/...``, its longer side at most :data:`SIDE` pixels.

    Raises:
        OSError: for a file that is no picture.
    """
    with Image.open(path) as opened:
        picture = opened.convert("L" if opened.mode in ("1", "L", "I", "I;16") else "RGB")
    picture.thumbnail((SIDE, SIDE))
    best = b""
    for form, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 85})):
        out = io.BytesIO()
        picture.save(out, format=form, **options)
        # photographs are smaller as JPEG, drawings and digits as PNG, which keeps them exact
        if not best or len(out.getvalue()) < 0.5 * len(best):
            best, kind = out.getvalue(), form.lower()
    return f"data:image/{kind};base64,{base64.b64encode(best).decode()}"


def _short(value: float) -> Optional[float]:
    return float(f"{value:.4g}") if math.isfinite(value) else None


__all__ = ["page_data", "with_influence"]
