"""The parts of the page in their order: what is written in words and tables, and where each chart goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from lightning_slt.publish.diagnoses import diagnosis, diagnostics, diagnostics_sentence
from lightning_slt.publish.html.data import MAX_POINTS, with_influence
from lightning_slt.publish.html.influence import influence
from lightning_slt.publish.html.markup import Section, esc, hint, picker, place_of, section
from lightning_slt.publish.html.susceptibility import susceptibility
from lightning_slt.publish.phrases import count_of, number, signed, with_error
from lightning_slt.publish.run import MonitorRecord, Run
from lightning_slt.publish.words import (
    cost_of,
    duration,
    headline,
    offline_only,
    seconds_of,
    transition_sentences,
    transition_title,
    transitions_sentence,
)
from lightning_slt.record import Estimate

MAX_TABLE_ROWS = 2000
MAX_LETTERS = 7
"""Of a number in a tile at its full size; a tile has room for eleven at the smaller one."""


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
        influence(run, data),
        susceptibility(run, charts),
        _cost(run, charts),
        _numbers(run.main),
        _settings(run.main),
        _reading(),
    ]
    return [section for section in made if section is not None]


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
    story = "".join(f"<li>{esc(sentence)}</li>" for sentence in headline(run))
    markup = (
        f'<section id="overview"><h1>{esc(title)}</h1><p class="under">Structure over training: the local learning '
        f'coefficient, what it says, and how far to trust it</p><ul class="story">{story}</ul>'
        f'<div class="tiles">{"".join(tiles)}</div>'
        "<noscript><p>The charts here are drawn by scripts, which are switched off.</p></noscript></section>"
    )
    return Section("overview", "What it showed", markup)


def _tile(big: str, small: str, look: str = "") -> str:
    # a number breaks nowhere but before its error, and a long one is written smaller: a tile is narrow
    words = big.replace("± ", "±\u00a0").split(" ")
    look += " long" if max(map(len, words)) > MAX_LETTERS else ""
    parts = " ".join(f"<i>{esc(word)}</i>" for word in words)
    return f'<div class="tile {look}"><b>{parts}</b><span>{esc(small)}</span></div>'


def _curve(run: Run, charts: Mapping[str, Any]) -> Section:
    count = len(run.main.estimates)
    few = f" Of {count:,} estimates {MAX_POINTS:,} are drawn; all are in history.csv." if count > MAX_POINTS else ""
    return section(
        "curve",
        "Structure over training",
        "Structure over training",
        hint(
            "Above, how much of the model the data holds fixed (LLC, band of 95 %); below, the loss of the same "
            "weights. Blue discs may be read; hollow orange marks are <b>not valid</b>. Violet rules are transitions, "
            "dashed while unconfirmed, grey where the learning rate or the data changed. Click a point to see its "
            f"chains.{few}"
        ),
        place_of("curve", charts),
    )


def _components(run: Run, charts: Mapping[str, Any]) -> Optional[Section]:
    if len(run.monitors) < 2:
        return None
    return section(
        "components",
        "Components",
        "Parts of the model",
        hint(
            "Every monitor has a frame of its own scale: compare when they change, not how high they are. Each is the "
            "LLC of the weights that its monitor moves, the others held fixed."
        ),
        place_of("components", charts),
    )


def _transitions(monitor: MonitorRecord, charts: Mapping[str, Any]) -> Optional[Section]:
    log = monitor.transitions
    if log is None:
        return None
    cards = []
    for report in log.reports:
        t = report.transition
        energy = f"energy{t.id}"
        picture = place_of(energy, charts)
        if picture:
            picture = (
                hint(
                    "Free energy of the two phases over the number of samples: the lower line is the phase that the "
                    "posterior prefers. The dotted rule is this run, the orange one where the lines cross, with its "
                    "95 % interval. A crossing is an order of magnitude, no more."
                )
                + picture
            )
        sentences = "".join(f"<p>{esc(sentence)}</p>" for sentence in transition_sentences(report))
        state = "retracted" if t.state == "retracted" else ""
        cards.append(
            f'<div class="transition {state}"><h3>{esc(transition_title(t))}<span class="badge">{esc(t.state)}</span>'
            f"</h3>{sentences}{picture}</div>"
        )
    for t in offline_only(log):
        cards.append(
            f'<div class="transition"><h3>{esc(transition_title(t))}<span class="badge">found afterwards</span></h3>'
            f"<p>Only the whole curve shows it: kind {esc(t.kind)}, between steps {t.onset:,.0f} and {t.end:,.0f}; LLC "
            f"{signed(t.llc_change)}, loss {signed(t.loss_change)}.</p></div>"
        )
    said = "" if cards else f"<p>{esc(transitions_sentence(log, monitor.estimates))}</p>"
    return section("transitions", "Transitions", "Transitions", said, *cards)


def _chains(data: Mapping[str, Any]) -> Optional[Section]:
    monitors = data["chains"]
    if not monitors:
        return None
    extra = (
        '<label>show <select class="form"><option value="running">running means</option>'
        '<option value="draws">the draws</option></select></label>'
    )
    if len(monitors) > 1:
        options = "".join(f'<option value="{k}">{esc(m["name"])}</option>' for k, m in enumerate(monitors))
        extra = f'<label>of <select class="monitor">{options}</select></label>' + extra
    return section(
        "chains",
        "Chains",
        "The chains of a firing",
        hint(
            "Chains that settle inside the band agree with each other; chains that fan out have not mixed, and the "
            "estimate says so."
        ),
        picker("firing", extra),
        '<p class="verdict"></p>',
        '<div class="chart"></div>',
    )


def _diagnostics(run: Run, charts: Mapping[str, Any]) -> Section:
    parts = []
    for monitor in run.monitors:
        remarks = diagnostics(monitor.estimates, monitor.step_given)
        items = "".join(f'<li class="{r.level}">{esc(r.text)}</li>' for r in remarks)
        heading = f"<h3>{esc(monitor.name)}</h3>" if len(run.monitors) > 1 else ""
        parts.append(
            f"{heading}<p>{esc(diagnostics_sentence(monitor.estimates))}</p>"
            + (f'<ul class="remarks">{items}</ul>' if items else "")
        )
    return section(
        "diagnostics",
        "Diagnostics",
        "How far to trust it",
        *parts,
        place_of("diagnostics", charts),
    )


def _cost(run: Run, charts: Mapping[str, Any]) -> Optional[Section]:
    sentence = cost_of(run)
    if not sentence:
        return None
    return section("cost", "Cost", "What measuring cost", f"<p>{esc(sentence)}</p>", place_of("cost", charts))


def _numbers(monitor: MonitorRecord) -> Section:
    head = "<th>step</th>" + "".join(
        f'<th class="number">{name}</th>' for name in ("LLC", "loss", "R-hat", "ESS", "chains out", "seconds")
    )
    rows = "".join(_row(e) for e in monitor.estimates[-MAX_TABLE_ROWS:])
    more = len(monitor.estimates) - MAX_TABLE_ROWS
    return section(
        "numbers",
        "All numbers",
        "All numbers",
        hint(f"The last {MAX_TABLE_ROWS:,}; all of them are in history.csv.") if more > 0 else "",
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
    cells = "".join(f'<td class="number">{esc(value)}</td>' for value in numbers)
    why = "; ".join(remark.text for remark in diagnosis(e))
    look = "" if e.valid else ' class="bad"'
    return f'<tr{look}><td>{step}</td>{cells}<td class="why">{esc(why)}</td></tr>'


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
    items = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in {**known, **given}.items())
    return section(
        "settings", "Settings", "Settings", hint("Of the last firing, and as they were given."), f"<dl>{items}</dl>"
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
    items = "".join(f"<dt>{esc(term)}</dt><dd>{esc(text)}</dd>" for term, text in terms)
    return section("reading", "How to read this", "How to read this", f"<dl>{items}</dl>")


__all__ = ["sections"]
