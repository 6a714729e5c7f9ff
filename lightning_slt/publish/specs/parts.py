"""What the charts have in common: colours, how points look, axes of steps, layers, small frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Optional

from lightning_slt.functional.learning_coefficient import MAX_RHAT

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
"""A name of the format, never fetched: the library is given the spec, not its address."""

# Okabe and Ito's colours, which people with any colour vision tell apart; of the dark page lighter ones of the same hue
LIGHT: Mapping[str, str] = {
    "@good": "#0072b2",
    "@bad": "#c24e00",
    "@rule": "#7a3e9d",
    "@text": "#26303a",
    "@muted": "#75808b",
    "@grid": "#e3e7eb",
    "@loss": "#4a5560",
    "@paper": "#ffffff",
}
DARK: Mapping[str, str] = {
    "@good": "#56b4e9",
    "@bad": "#f08a3c",
    "@rule": "#c79be3",
    "@text": "#e2e7ec",
    "@muted": "#98a4b0",
    "@grid": "#303a44",
    "@loss": "#b9c3cd",
    "@paper": "#161b21",
}
CATEGORIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d1f", "#7f7f7f")
"""Chains, components, samples."""

VALID, INVALID, BELOW, ABOVE, NONE = (
    "valid",
    "not valid",
    "not valid, below the frame",
    "not valid, above the frame",
    "no estimate",
)
STATES = (VALID, INVALID, BELOW, ABOVE, NONE)
"""How a point of the curve looks: what is not valid is hollow, of another colour and of another shape."""

SHAPES: dict[str, Any] = {
    "domain": list(STATES),
    "range": ["circle", "diamond", "triangle-down", "triangle-up", "cross"],
}
"""How a point of each state is marked: one that lies beyond the frame is a triangle on it, not where it would be."""

LEFT_OUT = "chains left out"
DIAGNOSTICS: Mapping[str, Optional[float]] = {
    "R-hat (1 is mixed)": MAX_RHAT,
    "effective draws": None,
    LEFT_OUT: None,
    "virial ratio (1 has arrived)": 1.0,
}
"""Measures, and the line each is held against."""
COSTS = ("seconds of a firing", "share of the run so far")
TRAJECTORIES = ("mean loss over the posterior", "self-influence")

WHOLE, FEW_DIGITS = ",.12~g", ",~r"
"""Formats of counts and of measured numbers: the library's own has a row of zeros where an axis has one value."""
ROOMY = 100
"""Points of a line that are told apart at their full size."""

Spec = dict[str, Any]
Scale = Literal["linear", "log", "symlog"]


def widened(low: float, high: float, bad: Iterable[float]) -> tuple[float, float]:
    """The frame of a curve, with what is not valid in it where that is near.

    Args:
        low: of what is valid, its errors included.
        high: likewise.
        bad: numbers that are not valid.

    Returns:
        The range widened to those of ``bad`` that are within its own height of it; on a side where others are further
        away, there is room for their marks.

    Example:
        >>> widened(4.0, 8.0, [1.0, 9.0]), widened(4.0, 8.0, [-16.0])
        ((1.0, 9.0), (3.4, 8.0))
    """
    height = max(high - low, 0.1 * abs(high), 1e-12)
    values = list(bad)
    for_marks = 0.15 * height
    bottom = min([low, *(v for v in values if v >= low - height)])
    top = max([high, *(v for v in values if v <= high + height)])
    return (
        bottom - for_marks if min(values, default=low) < bottom else bottom,
        top + for_marks if max(values, default=high) > top else top,
    )


def column(name: str) -> str:
    return "${field:" + name + "}"


def datum(name: str) -> str:
    return f"datum['{column(name)}']"


def point_scale(count: int) -> float:
    """How large the points of a line of so many are drawn: smaller ones where they would hide it and its band.

    Example:
        >>> point_scale(40), point_scale(1000)
        (1.0, 0.1)
    """
    return min(1.0, ROOMY / max(count, 1))


def many_points(scale: float, valid: str, size: float, stroke: float) -> Spec:
    """The sizes of the points of a long line: those that are not valid stay large enough to be seen."""
    if scale == 1.0:
        return {}
    small = {"size": max(size * scale, 4.0), "strokeWidth": stroke * scale}
    seen = {"size": max(size * scale, 24.0), "strokeWidth": stroke}
    return {name: {"condition": {"test": valid, "value": small[name]}, "value": seen[name]} for name in small}


def frames_of(description: str, frames: list[Spec]) -> Spec:
    # by the frames and not by their labels: else neighbours stand at different heights
    aligned = {"bounds": "flush", "spacing": {"row": 84, "column": 70}}
    return {"$schema": SCHEMA, "description": description, "columns": "@columns", **aligned, "concat": frames}


def facets(description: str, by: str, height: int, layers: list[Spec], independent: tuple[str, ...] = ("y",)) -> Spec:
    """A frame of the same layers for each value of the column ``by``.

    Args:
        height: of a frame.
        independent: axes whose scale is that of their own frame.
    """
    return {
        "$schema": SCHEMA,
        "description": description,
        "data": {"name": "rows"},
        "facet": {"field": by, "type": "nominal", "title": None, "sort": "@order"},
        "columns": "@columns",
        "spec": {"width": "@cell", "height": height, "layer": layers},
        "resolve": {"scale": {axis: "independent" for axis in independent}},
    }


def small_frame(measure: str, height: int) -> Spec:
    """What a small chart of the rows of a measure has around it: its name, and the room for it."""
    return {
        "title": {"text": measure, "anchor": "start", "frame": "group", "offset": 8},
        "transform": [{"filter": f"datum.measure === '{measure}'"}],
        "width": "@cell",
        "height": height,
    }


def level(value: Optional[float], colour: str, dash: list[int]) -> Spec:
    """A dashed line across a frame, once, whatever rows there are."""
    return {
        "data": {"values": [{}]},
        "mark": {"type": "rule", "color": colour, "strokeDash": dash},
        "encoding": {"y": {"datum": value}},
    }


def band(x: Spec, y: Spec, named: Callable[[str], str] = str) -> Spec:
    """The channels of an error band along a line: columns ``low`` and ``high``, broken where a ``segment`` ends.

    Args:
        named: how a column is named in this spec.
    """
    ends = {"y": {**y, "field": named("low")}, "y2": {"field": named("high")}}
    return {"x": x, **ends, "detail": {"field": named("segment")}}


def layer(mark: Spec, filters: list[str], encoding: Spec) -> Spec:
    transform = {"transform": [{"filter": test} for test in filters]} if filters else {}
    return {**transform, "mark": mark, "encoding": encoding}


def tooltip(name: str) -> Spec:
    return {"field": column(name), "type": "nominal"}


def plain_tooltip(name: str) -> Spec:
    return {"field": name, "type": "nominal"}


def steps(scale: Scale, field: str, title: Optional[str] = "optimiser step") -> Spec:
    axis: Spec = {"title": title, "grid": False, "tickCount": 6, "labelOverlap": True}
    kinds: dict[Scale, Spec] = {
        "linear": {"zero": False, "nice": False},
        "log": {"type": "log", "nice": False},
        "symlog": {"type": "symlog", "constant": "@first", "nice": False},
    }
    if scale == "linear":
        axis["format"] = WHOLE
    if scale == "symlog":
        axis["values"] = "@ticks"  # the library's own are those of a linear axis, all at one end
    return {"field": field, "type": "quantitative", "scale": {**kinds[scale], "padding": 8}, "axis": axis}
