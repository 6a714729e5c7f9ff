"""The parts of the page in their order: what is written in words and tables, and where each chart goes."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.publish.diagnoses import diagnosis, diagnostics, diagnostics_sentence
from lightning_slt.publish.html.data import MAX_POINTS, with_influence
from lightning_slt.publish.influence_tables import pair_rows
from lightning_slt.publish.phrases import count_of, number, signed, with_error
from lightning_slt.publish.run import MonitorRecord, Run
from lightning_slt.publish.susceptibility_rows import LINES, WHOLE_SHIFT, cells, drawn, few
from lightning_slt.publish.words import (
    SUSCEPTIBILITY,
    cost_of,
    duration,
    headline,
    offline_only,
    pairs_sentence,
    seconds_of,
    susceptibility_verdict,
    transition_sentences,
    transition_title,
    transitions_sentence,
)
from lightning_slt.record import Estimate
from lightning_slt.susceptibility_record import SusceptibilityEstimate

MAX_TABLE_ROWS = 2000
MAX_GROUPS = 40
"""Groups in the table of susceptibility: of more, those that stand out most of their errors."""
MAX_LETTERS = 7
"""Of a number in a tile at its full size; a tile has room for eleven at the smaller one."""


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        id: its anchor.
        short: its name in the table of contents.
        markup: HTML, everything of the run escaped.
    """

    id: str
    short: str
    markup: str


def sections(run: Run, title: str, data: Mapping[str, Any]) -> list[Section]:
    """Those that this run has something for."""
    charts = data["charts"]
    made = [
        _overview(run, title),
        _curve(run, charts),
        _components(run, charts),
        _transitions(run.main, charts),
        _chains(data),
        _diagnostics(run, charts),
        _influence(run, data),
        _susceptibility(run, charts),
        _cost(run, charts),
        _numbers(run.main),
        _settings(run.main),
        _reading(),
    ]
    return [section for section in made if section is not None]


def _t(text: Any) -> str:
    # a number and its error stay on one line
    return html.escape(str(text)).replace(" ± ", "\u00a0±\u00a0")


def _section(id: str, short: str, heading: str, *parts: str) -> Section:
    body = "\n".join(part for part in parts if part)
    return Section(id, short, f'<section id="{id}"><h2>{_t(heading)}</h2>\n{body}\n</section>')


def _hint(text: str) -> str:
    return f'<p class="hint">{text}</p>'


def _place(name: str, charts: Mapping[str, Any]) -> str:
    return f'<div class="chart" data-chart="{_t(name)}"></div>' if name in charts else ""


def _overview(run: Run, title: str) -> Section:
    estimates, log = run.main.estimates, run.main.transitions
    valid = [e for e in estimates if e.valid]
    tiles = [_tile(f"{len(valid):,} / {len(estimates):,}", "estimates that are valid", "good" if valid else "bad")]
    if valid:
        last = valid[-1]
        where = f"LLC at step {last.step:,}" if last.step is not None else "LLC"
        tiles.append(_tile(with_error(last.mean, last.se), f"{where}, the last valid one"))
        tiles.append(_tile(number(last.init_loss), "loss of the same weights"))
    if log is not None:
        tiles.append(_tile(f"{len(log.standing):,}", "transitions flagged", "rule" if log.standing else ""))
    source = with_influence(run)
    if source is not None:
        tiles.append(_tile(f"{len(source.influences[-1].train_index):,}", "samples whose influence was read"))
    if math.isfinite(seconds_of(run)):
        tiles.append(_tile(duration(seconds_of(run)), "spent measuring"))
    story = "".join(f"<li>{_t(sentence)}</li>" for sentence in headline(run))
    markup = (
        f'<section id="overview"><h1>{_t(title)}</h1><p class="under">Structure over training: the local learning '
        f'coefficient, what it says, and how far to trust it</p><ul class="story">{story}</ul>'
        f'<div class="tiles">{"".join(tiles)}</div>'
        "<noscript><p>The charts here are drawn by scripts, which are switched off.</p></noscript></section>"
    )
    return Section("overview", "What it showed", markup)


def _tile(big: str, small: str, look: str = "") -> str:
    # a number breaks nowhere but before its error, and a long one is written smaller: a tile is narrow
    words = big.replace("± ", "±\u00a0").split(" ")
    look += " long" if max(map(len, words)) > MAX_LETTERS else ""
    parts = " ".join(f"<i>{_t(word)}</i>" for word in words)
    return f'<div class="tile {look}"><b>{parts}</b><span>{_t(small)}</span></div>'


def _curve(run: Run, charts: Mapping[str, Any]) -> Section:
    count = len(run.main.estimates)
    few = f" Of {count:,} estimates {MAX_POINTS:,} are drawn; all are in history.csv." if count > MAX_POINTS else ""
    return _section(
        "curve",
        "Structure over training",
        "Structure over training",
        _hint(
            "Above, how much of the model the data holds fixed (LLC, band of 95 %); below, the loss of the same "
            "weights. Blue discs may be read; hollow orange marks are <b>not valid</b>. Violet rules are transitions, "
            "dashed while unconfirmed, grey where the learning rate or the data changed. Click a point to see its "
            f"chains.{few}"
        ),
        _place("curve", charts),
    )


def _components(run: Run, charts: Mapping[str, Any]) -> Optional[Section]:
    if len(run.monitors) < 2:
        return None
    return _section(
        "components",
        "Components",
        "Parts of the model",
        _hint(
            "Every monitor has a frame of its own scale: compare when they change, not how high they are. Each is the "
            "LLC of the weights that its monitor moves, the others held fixed."
        ),
        _place("components", charts),
    )


def _transitions(monitor: MonitorRecord, charts: Mapping[str, Any]) -> Optional[Section]:
    log = monitor.transitions
    if log is None:
        return None
    cards = []
    for report in log.reports:
        t = report.transition
        energy = f"energy{t.id}"
        picture = _place(energy, charts)
        if picture:
            picture = (
                _hint(
                    "Free energy of the two phases over the number of samples: the lower line is the phase that the "
                    "posterior prefers. The dotted rule is this run, the orange one where the lines cross, with its "
                    "95 % interval. A crossing is an order of magnitude, no more."
                )
                + picture
            )
        sentences = "".join(f"<p>{_t(sentence)}</p>" for sentence in transition_sentences(report))
        state = "retracted" if t.state == "retracted" else ""
        cards.append(
            f'<div class="transition {state}"><h3>{_t(transition_title(t))}<span class="badge">{_t(t.state)}</span>'
            f"</h3>{sentences}{picture}</div>"
        )
    for t in offline_only(log):
        cards.append(
            f'<div class="transition"><h3>{_t(transition_title(t))}<span class="badge">found afterwards</span></h3>'
            f"<p>Only the whole curve shows it: kind {_t(t.kind)}, between steps {t.onset:,.0f} and {t.end:,.0f}; LLC "
            f"{signed(t.llc_change)}, loss {signed(t.loss_change)}.</p></div>"
        )
    said = "" if cards else f"<p>{_t(transitions_sentence(log, monitor.estimates))}</p>"
    return _section("transitions", "Transitions", "Transitions", said, *cards)


def _picker(label: str, extra: str = "") -> str:
    return (
        f'<div class="picker"><button type="button" class="back" aria-label="earlier firing">‹</button>'
        f'<label>{label} <input type="range" min="0" max="0" step="1"></label>'
        f'<button type="button" class="forth" aria-label="later firing">›</button><output></output>{extra}</div>'
    )


def _chains(data: Mapping[str, Any]) -> Optional[Section]:
    monitors = data["chains"]
    if not monitors:
        return None
    extra = (
        '<label>show <select class="form"><option value="running">running means</option>'
        '<option value="draws">the draws</option></select></label>'
    )
    if len(monitors) > 1:
        options = "".join(f'<option value="{k}">{_t(m["name"])}</option>' for k, m in enumerate(monitors))
        extra = f'<label>of <select class="monitor">{options}</select></label>' + extra
    return _section(
        "chains",
        "Chains",
        "The chains of a firing",
        _hint(
            "Chains that settle inside the band agree with each other; chains that fan out have not mixed, and the "
            "estimate says so."
        ),
        _picker("firing", extra),
        '<p class="verdict"></p>',
        '<div class="chart"></div>',
    )


def _diagnostics(run: Run, charts: Mapping[str, Any]) -> Section:
    parts = []
    for monitor in run.monitors:
        remarks = diagnostics(monitor.estimates)
        items = "".join(f'<li class="{r.level}">{_t(r.text)}</li>' for r in remarks)
        heading = f"<h3>{_t(monitor.name)}</h3>" if len(run.monitors) > 1 else ""
        parts.append(
            f"{heading}<p>{_t(diagnostics_sentence(monitor.estimates))}</p>"
            + (f'<ul class="remarks">{items}</ul>' if items else "")
        )
    return _section(
        "diagnostics",
        "Diagnostics",
        "How far to trust it",
        *parts,
        _place("diagnostics", charts),
    )


def _influence(run: Run, data: Mapping[str, Any]) -> Optional[Section]:
    source = with_influence(run)
    if source is None or not data["influence"]:
        return None
    last = source.influences[-1]
    over = "" if last.suspicion is None else " at all firings up to the chosen one, whose own numbers these are"
    has_groups = any(firing["groups"] for firing in data["influence"])
    pictures = '<div class="chart samples"></div>'
    if has_groups:
        pictures = (
            '<div class="pair"><div><h3>What groups do to each other</h3>'
            + _hint("Blue helps, orange harms; pale cells are within 3 standard errors of zero.")
            + '<div class="chart groups"></div></div><div><h3>All samples</h3>'
            + _hint("Wrong labels that were learnt by heart: small loss, large mean loss.")
            + pictures
            + "</div></div>"
        )
    else:
        pictures = "<h3>All samples</h3>" + pictures
    lines = _place("trajectories", data["charts"])
    if lines:
        lines = "<h3>The samples that changed most</h3>" + lines
    return _section(
        "influence",
        "Influence",
        "Which data shapes the model",
        _picker("firing"),
        '<p class="verdict"></p>',
        "<h3>Likely wrong labels and outliers</h3>",
        _hint(
            f"The largest mean losses over the posterior{over}, with the label in quotes and the rank by plain loss "
            "beside. A wrong label stays expensive around the weights even where the model has learnt it."
        ),
        '<div class="gallery"></div>',
        pictures,
        lines,
        _pairs(last, data["samples"]),
    )


def _pairs(influence: InfluenceEstimate, samples: Mapping[str, Mapping[str, str]]) -> str:
    rows = pair_rows(influence)
    heading = "<h3>Single pairs of the last firing</h3>" + f'<p class="hint">{_t(pairs_sentence(influence))}</p>'
    if not rows:
        return heading
    body = []
    for query, token, query_group, side, index, group, value, error, z, rho in rows:
        where = f"#{query}" + (f", token {token}" if token is not None else "")
        asked = _sample(query, samples) if influence.queries_are_train else ""
        body.append(
            f"<tr><td>{asked}{_t(where)} {_quoted(query_group)}</td><td>{_t(side)}</td>"
            f"<td>{_sample(index, samples)}#{index} {_quoted(group)}</td>"
            f'<td class="number">{_t(with_error(value or 0.0, error or math.nan))}</td>'
            f'<td class="number">{_t(number(z))}</td><td class="number">{_t(number(rho))}</td></tr>'
        )
    head = "<th>query</th><th></th><th>training sample</th>"
    head += '<th class="number">influence</th><th class="number">in errors</th><th class="number">correlation</th>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    summary = f"<summary>{len(rows)} pairs that stand out of their errors</summary>"
    return f'{heading}<details>{summary}<div class="scroll">{table}</div></details>'


def _quoted(group: Any) -> str:
    return f"“{_t(group)}”" if group else ""


def _sample(index: int, samples: Mapping[str, Mapping[str, str]]) -> str:
    shown = samples.get(str(index), {})
    if "image" in shown:
        return f'<img src="{_t(shown["image"])}" alt="sample {index}">'
    return f"<small>{_t(shown['text'][:80])}</small><br>" if "text" in shown else ""


def _susceptibility(run: Run, charts: Mapping[str, Any]) -> Optional[Section]:
    parts = []
    for place, monitor in enumerate(run.monitors):
        history = monitor.susceptibilities
        if not history:
            continue
        last, picture = history[-1], _place(f"susceptibility{place}", charts)
        if picture:
            shown = len(drawn(history))
            some = f" Of {len(history):,} firings {shown:,} are drawn." if shown < len(history) else ""
            groups = f", and up to {LINES} groups that stand out most" if last.groups else ""
            picture = (
                "<h3>Over training</h3>"
                + _hint(
                    f"Every component has a frame of its own scale: the whole shift with its band of 95 %{groups}. "
                    f"Hollow orange marks are <b>not valid</b>.{some}"
                )
                + picture
            )
        notes = "".join(f'<li class="note">{_t(note)}</li>' for note in last.notes)
        parts += [
            f"<h3>{_t(monitor.name)}</h3>" if len(run.monitors) > 1 else "",
            f'<p class="verdict {"" if last.valid else "bad"}">{_t(susceptibility_verdict(history))}</p>',
            _answers(last),
            f'<ul class="remarks">{notes}</ul>' if notes else "",
            picture,
        ]
    if not parts:
        return None
    return _section(
        "susceptibility", "Susceptibility", "Which component answers to which data", _hint(_t(SUSCEPTIBILITY)), *parts
    )


def _answers(last: SusceptibilityEstimate) -> str:
    """The table of the last firing: a row for each group of data, a column for each component."""
    rows = few(cells(last), MAX_GROUPS)
    left = len(last.groups) - MAX_GROUPS
    some = f" Of {len(last.groups):,} groups these are the {MAX_GROUPS} that stand out most." if left > 0 else ""
    head = "".join(f'<th class="number">{_t(name)}</th>' for name in last.components)
    body = []
    for row in rows:
        group = row[0].group
        name = f"<b>{WHOLE_SHIFT}</b>" if group is None else _t(group)
        numbers = "".join(
            f'<td class="number{"" if cell.clear else " faint"}">{_t(with_error(cell.chi, cell.se))}</td>'
            for cell in row
        )
        body.append(f"<tr><td>{name}</td>{numbers}</tr>")
    return (
        _hint(
            "At the last firing, in units of the loss, with standard errors; grey where it is within 3 of them from "
            f"zero. Compare down a column: components differ in size.{some}"
        )
        + f'<div class="scroll"><table class="answers"><thead><tr><th>data</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cost(run: Run, charts: Mapping[str, Any]) -> Optional[Section]:
    sentence = cost_of(run)
    if not sentence:
        return None
    return _section("cost", "Cost", "What measuring cost", f"<p>{_t(sentence)}</p>", _place("cost", charts))


def _numbers(monitor: MonitorRecord) -> Section:
    head = "<th>step</th>" + "".join(
        f'<th class="number">{name}</th>' for name in ("LLC", "loss", "R-hat", "ESS", "chains out", "seconds")
    )
    rows = "".join(_row(e) for e in monitor.estimates[-MAX_TABLE_ROWS:])
    more = len(monitor.estimates) - MAX_TABLE_ROWS
    return _section(
        "numbers",
        "All numbers",
        "All numbers",
        _hint(f"The last {MAX_TABLE_ROWS:,}; all of them are in history.csv.") if more > 0 else "",
        f"<details><summary>The table of {count_of(len(monitor.estimates), 'estimate')}</summary>"
        f'<div class="scroll"><table><thead><tr>{head}<th>remarks</th></tr></thead><tbody>{rows}</tbody></table></div>'
        "</details>",
    )


def _row(e: Estimate) -> str:
    step = f"{e.step:,}" if e.step is not None else "–"
    numbers = (
        with_error(e.mean, e.se),
        number(e.init_loss),
        number(e.rhat),
        number(e.ess),
        str(e.num_bad_chains),
        number(e.seconds),
    )
    cells = "".join(f'<td class="number">{_t(value)}</td>' for value in numbers)
    why = "; ".join(remark.text for remark in diagnosis(e))
    look = "" if e.valid else ' class="bad"'
    return f'<tr{look}><td>{step}</td>{cells}<td class="why">{_t(why)}</td></tr>'


def _settings(monitor: MonitorRecord) -> Optional[Section]:
    last = monitor.estimates[-1]
    known: dict[str, Any] = {
        "weights that moved": f"{last.num_weights:,}",
        "training samples n": f"{last.num_samples:,}" if last.num_samples is not None else "not known",
        "inverse temperature nbeta": number(last.nbeta, 4),
        "localization": number(last.localization, 4),
        "chains x draws": f"{last.num_chains} x {last.num_draws}",
        "step size": number(last.step_size),
    }
    config = monitor.summary.get("config") or {}
    given = {k: v for k, v in config.items() if v is not None and v != {}}
    items = "".join(f"<dt>{_t(k)}</dt><dd>{_t(v)}</dd>" for k, v in {**known, **given}.items())
    return _section(
        "settings", "Settings", "Settings", _hint("Of the last firing, and as they were given."), f"<dl>{items}</dl>"
    )


def _reading() -> Section:
    terms: Sequence[tuple[str, str]] = (
        (
            "LLC",
            "The local learning coefficient: how many directions of the weights, counted in halves, the data holds "
            "fixed. A rise with a falling loss is structure being built, a fall at a level loss structure being "
            "simplified, a level stretch a phase. It depends on localization and nbeta: compare at equal settings.",
        ),
        ("valid", "Whether the number may be read. A negative LLC is no error: the weights are at no minimum."),
        ("R-hat, ESS", "Have the chains mixed (1 is perfect), and how many independent draws they are worth."),
        (
            "virial ratio",
            "1 where chains have spread to their full width in every direction; less is allowed where flat directions "
            "do not matter for the number.",
        ),
        ("kind A, B, C, D", "LLC up and loss down; LLC down; LLC down and loss up; LLC up at a level loss."),
        (
            "mean loss over the posterior",
            "The loss of a sample averaged over weights near by: what was only memorised is expensive there.",
        ),
    )
    items = "".join(f"<dt>{_t(term)}</dt><dd>{_t(text)}</dd>" for term, text in terms)
    return _section("reading", "How to read this", "How to read this", f"<dl>{items}</dl>")


__all__ = ["Section", "sections"]
