"""The section of susceptibility: which component answers to which data, at the last firing and over training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from lightning_slt.publish.html.markup import Section, esc, hint, place_of, section
from lightning_slt.publish.phrases import with_error
from lightning_slt.publish.run import Run
from lightning_slt.publish.susceptibility_rows import LINES, WHOLE_SHIFT, cells, drawn, few
from lightning_slt.publish.words import (
    SUSCEPTIBILITY,
    susceptibility_verdict,
)
from lightning_slt.susceptibility_record import SusceptibilityEstimate

MAX_GROUPS = 40
"""Groups in the table: of more, those that stand out most of their errors."""


def susceptibility(run: Run, charts: Mapping[str, Any]) -> Optional[Section]:
    parts = []
    for place, monitor in enumerate(run.monitors):
        history = monitor.susceptibilities
        if not history:
            continue
        last, picture = history[-1], place_of(f"susceptibility{place}", charts)
        if picture:
            shown = len(drawn(history))
            some = f" Of {len(history):,} firings {shown:,} are drawn." if shown < len(history) else ""
            groups = f", and up to {LINES} groups that stand out most" if last.groups else ""
            picture = (
                "<h3>Over training</h3>"
                + hint(
                    f"Every component has a frame of its own scale: the whole shift with its band of 95 %{groups}. "
                    f"Hollow orange marks are <b>not valid</b>.{some}"
                )
                + picture
            )
        notes = "".join(f'<li class="note">{esc(note)}</li>' for note in last.notes)
        parts += [
            f"<h3>{esc(monitor.name)}</h3>" if len(run.monitors) > 1 else "",
            f'<p class="verdict {"" if last.valid else "bad"}">{esc(susceptibility_verdict(history))}</p>',
            _answers(last),
            f'<ul class="remarks">{notes}</ul>' if notes else "",
            picture,
        ]
    if not parts:
        return None
    return section(
        "susceptibility",
        "Susceptibility",
        "Which component answers to which data",
        hint(esc(SUSCEPTIBILITY)),
        *parts,
    )


def _answers(last: SusceptibilityEstimate) -> str:
    """The table of the last firing: a row for each group of data, a column for each component."""
    rows = few(cells(last), MAX_GROUPS)
    left = len(last.groups) - MAX_GROUPS
    some = f" Of {len(last.groups):,} groups these are the {MAX_GROUPS} that stand out most." if left > 0 else ""
    head = "".join(f'<th class="number">{esc(name)}</th>' for name in last.components)
    body = []
    for row in rows:
        group = row[0].group
        name = f"<b>{WHOLE_SHIFT}</b>" if group is None else esc(group)
        numbers = "".join(
            f'<td class="number{"" if cell.clear else " faint"}">{esc(with_error(cell.chi, cell.se))}</td>'
            for cell in row
        )
        body.append(f"<tr><td>{name}</td>{numbers}</tr>")
    return (
        hint(
            "At the last firing, in units of the loss, with standard errors; grey where it is within 3 of them from "
            f"zero. Compare down a column: components differ in size.{some}"
        )
        + f'<div class="scroll"><table class="answers"><thead><tr><th>data</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


__all__ = ["susceptibility"]
