"""Susceptibility of components over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_slt.publish.specs.parts import (
    CATEGORIES,
    FEW_DIGITS,
    SHAPES,
    VALID,
    Scale,
    Spec,
    band,
    facets,
    layer,
    level,
    plain_tooltip,
    steps,
)


def course(rows: Sequence[Mapping[str, Any]], scale: Scale = "linear") -> Spec:
    """A frame for each component, of its own scale.

    Args:
        rows: of :func:`~lightning_slt.publish.susceptibility_rows.course_rows`. What they have nothing of has no
            layer: the library complains of an empty one.
        scale: of the steps.
    """
    valid, whole = f"datum.state === '{VALID}'", "datum.whole"
    x = steps(scale, "step")
    y: Spec = {
        "field": "chi",
        "type": "quantitative",
        "title": "susceptibility",
        "scale": {"zero": True},
        "axis": {"format": FEW_DIGITS, "tickCount": 5},
    }
    colour: Spec = {
        "field": "line",
        "type": "nominal",
        "title": "answers to",
        "scale": {"domain": "@lines", "range": ["@text", *CATEGORIES[:5], *CATEGORIES[6:]]},
        "legend": {"orient": "top", "columns": 4, "labelLimit": 120, "symbolType": "stroke"},
    }
    lines = {"x": x, "y": y, "color": colour, "detail": {"field": "segment"}, "tooltip": plain_tooltip("words")}
    off = {
        "x": x,
        "y": y,
        "shape": {"field": "state", "type": "nominal", "scale": SHAPES, "legend": None},
        "tooltip": plain_tooltip("words"),
    }
    shown: list[Spec] = []
    if any(row["state"] == VALID for row in rows):
        groups = [layer({"type": "line", "strokeWidth": 1.2}, [valid, f"!{whole}"], lines)]
        shown += [
            layer({"type": "area", "color": "@text", "opacity": 0.14}, [valid, whole], band(x, y)),
            *(groups if any(not row["whole"] for row in rows) else []),
            layer({"type": "line", "strokeWidth": 2.4}, [valid, whole], lines),
            layer({"type": "point", "size": 16, "filled": True, "opacity": 1}, [valid], lines),
        ]
    if any(row["state"] != VALID for row in rows):
        mark = {"type": "point", "size": 40, "color": "@bad", "fill": "@paper", "opacity": 1}
        shown.append(layer(mark, [f"!({valid})"], off))
    zero = level(0, "@muted", [2, 3])
    return facets("Susceptibility of every component over training.", "component", 180, [zero, *shown])


__all__ = ["course"]
