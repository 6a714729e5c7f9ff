"""The section of influence: suspects, groups, all samples, and the pairs that stand out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Optional

from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.publish.html.data import with_influence
from lightning_slt.publish.html.markup import Section, esc, hint, picker, place_of, section
from lightning_slt.publish.influence_tables import pair_rows
from lightning_slt.publish.phrases import number, with_error
from lightning_slt.publish.run import Run
from lightning_slt.publish.words import (
    pairs_sentence,
)


def influence(run: Run, data: Mapping[str, Any]) -> Optional[Section]:
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
            + hint("Blue helps, orange harms; pale cells are within 3 standard errors of zero.")
            + '<div class="chart groups"></div></div><div><h3>All samples</h3>'
            + hint("Wrong labels that were learnt by heart: small loss, large mean loss.")
            + pictures
            + "</div></div>"
        )
    else:
        pictures = "<h3>All samples</h3>" + pictures
    lines = place_of("trajectories", data["charts"])
    if lines:
        lines = "<h3>The samples that changed most</h3>" + lines
    return section(
        "influence",
        "Influence",
        "Which data shapes the model",
        picker("firing"),
        '<p class="verdict"></p>',
        "<h3>Likely wrong labels and outliers</h3>",
        hint(
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
    heading = "<h3>Single pairs of the last firing</h3>" + f'<p class="hint">{esc(pairs_sentence(influence))}</p>'
    if not rows:
        return heading
    body = []
    for query, token, query_group, side, index, group, value, error, z, rho in rows:
        where = f"#{query}" + (f", token {token}" if token is not None else "")
        asked = _sample(query, samples) if influence.queries_are_train else ""
        body.append(
            f"<tr><td>{asked}{esc(where)} {_quoted(query_group)}</td><td>{esc(side)}</td>"
            f"<td>{_sample(index, samples)}#{index} {_quoted(group)}</td>"
            f'<td class="number">{esc(with_error(value or 0.0, error or math.nan))}</td>'
            f'<td class="number">{esc(number(z))}</td><td class="number">{esc(number(rho))}</td></tr>'
        )
    head = "<th>query</th><th></th><th>training sample</th>"
    head += '<th class="number">influence</th><th class="number">in errors</th><th class="number">correlation</th>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    summary = f"<summary>{len(rows)} pairs that stand out of their errors</summary>"
    return f'{heading}<details>{summary}<div class="scroll">{table}</div></details>'


def _quoted(group: Any) -> str:
    return f"“{esc(group)}”" if group else ""


def _sample(index: int, samples: Mapping[str, Mapping[str, str]]) -> str:
    shown = samples.get(str(index), {})
    if "image" in shown:
        return f'<img src="{esc(shown["image"])}" alt="sample {index}">'
    return f"<small>{esc(shown['text'][:80])}</small><br>" if "text" in shown else ""


__all__ = ["influence"]
