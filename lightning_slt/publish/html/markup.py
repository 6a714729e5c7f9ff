"""What the sections of the page are written with."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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


def esc(text: Any) -> str:
    # a number and its error stay on one line
    return html.escape(str(text)).replace(" ± ", "\u00a0±\u00a0")


def section(id: str, short: str, heading: str, *parts: str) -> Section:
    body = "\n".join(part for part in parts if part)
    return Section(id, short, f'<section id="{id}"><h2>{esc(heading)}</h2>\n{body}\n</section>')


def hint(text: str) -> str:
    return f'<p class="hint">{text}</p>'


def place_of(name: str, charts: Mapping[str, Any]) -> str:
    return f'<div class="chart" data-chart="{esc(name)}"></div>' if name in charts else ""


def picker(label: str, extra: str = "") -> str:
    return (
        f'<div class="picker"><button type="button" class="back" aria-label="earlier firing">‹</button>'
        f'<label>{label} <input type="range" min="0" max="0" step="1"></label>'
        f'<button type="button" class="forth" aria-label="later firing">›</button><output></output>{extra}</div>'
    )


__all__ = ["Section", "esc", "hint", "picker", "place_of", "section"]
