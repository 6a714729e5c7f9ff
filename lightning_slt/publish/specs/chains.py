"""The chains: those of one firing, their diagnostics over training, and what measuring cost."""

from __future__ import annotations

from typing import Optional

from lightning_slt.publish.specs.parts import (
    CATEGORIES,
    COSTS,
    DIAGNOSTICS,
    FEW_DIGITS,
    LEFT_OUT,
    SCHEMA,
    WHOLE,
    Scale,
    Spec,
    column,
    datum,
    frames_of,
    layer,
    level,
    plain_tooltip,
    small_frame,
    steps,
)


def chains(running: bool = True, band: bool = True) -> Spec:
    """The chains of one firing: how the mean of each settles, or its draws.

    Rows of :func:`~lightning_slt.publish.tables.chain_rows`; with ``band`` those of
    :func:`~lightning_slt.publish.chart_rows.band_rows` as the dataset ``band``.

    Args:
        running: the running mean of each chain; else the draws themselves.
        band: draw the estimate's band behind them.
    """
    shown = "running" if running else column("llc")
    y = {
        "field": shown,
        "type": "quantitative",
        "title": "LLC, running mean of each chain" if running else "LLC, each draw",
        "scale": {"zero": False, "domain": "@limits", "nice": False},
    }
    behind: list[Spec] = []
    if band:
        look = {"condition": {"test": "datum.valid", "value": "@good"}, "value": "@bad"}
        behind = [
            {
                "data": {"name": "band"},
                "mark": {"type": "rect", "opacity": 0.16, "clip": True},
                "encoding": {
                    "y": {**y, "field": "low"},
                    "y2": {"field": "high"},
                    "color": look,
                },
            },
            {
                "data": {"name": "band"},
                "mark": {"type": "rule", "strokeDash": [6, 4], "clip": True},
                "encoding": {"y": {**y, "field": "mean"}, "color": look},
            },
        ]
    return {
        "$schema": SCHEMA,
        "description": "The chains of one firing.",
        "width": "@width",
        "height": 300,
        "data": {"name": "rows"},
        "transform": [
            # the mean of a chain that diverged ends with it: gone on, it would look settled
            *([{"filter": f"isValid({datum('llc')})"}] if running else []),
            {
                "window": [{"op": "mean", "field": column("llc"), "as": "running"}],
                "groupby": [column("chain")],
                "sort": [{"field": column("draw")}],
                "frame": [None, 0],
            },
        ],
        "layer": [
            *behind,
            {
                "mark": {"type": "line", "clip": True, "strokeWidth": 1.6 if running else 0.9, "opacity": 0.9},
                "encoding": {
                    "x": {
                        "field": column("draw"),
                        "type": "quantitative",
                        "title": "draw",
                        "axis": {"grid": False, "tickCount": 8, "format": WHOLE},
                    },
                    "y": y,
                    "color": {
                        "field": column("chain"),
                        "type": "nominal",
                        "title": "chain",
                        "scale": {"range": list(CATEGORIES)},
                    },
                    "tooltip": [
                        {"field": column("chain"), "type": "nominal", "title": "chain"},
                        {"field": column("draw"), "type": "quantitative", "title": "draw"},
                        {"field": shown, "type": "quantitative", "title": "LLC", "format": ".4g"},
                    ],
                },
            },
        ],
    }


def diagnostics(scale: Scale = "linear", left_out: bool = True) -> Spec:
    """R-hat, effective draws, chains left out and the virial ratio, each with the line it is held against.

    Rows of :func:`~lightning_slt.publish.chart_rows.diagnostic_rows`.

    Args:
        left_out: whether there is anything to show of chains left out.
    """
    names = [name for name in DIAGNOSTICS if left_out or name != LEFT_OUT]
    frames = [_frame(name, scale, DIAGNOSTICS[name], zero=name == LEFT_OUT) for name in names]
    return {**frames_of("Diagnostics of the chains over training.", frames), "data": {"name": "rows"}}


def cost(scale: Scale = "linear") -> Spec:
    """Seconds of each firing, and the share of the run's wall-clock so far.

    Rows of :func:`~lightning_slt.publish.chart_rows.cost_rows`.
    """
    frames = [_frame(name, scale, None, zero=True) for name in COSTS]
    return {**frames_of("What measuring cost.", frames), "data": {"name": "rows"}}


def _frame(measure: str, scale: Scale, limit: Optional[float], zero: bool = False) -> Spec:
    """One small chart of the rows of a measure."""
    y: Spec = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": zero}}
    line = layer(
        {"type": "line", "color": "@loss", "point": {"color": "@loss", "size": 22}},
        [],
        {
            "x": steps(scale, "step"),
            "y": {**y, "axis": {"tickCount": 4, "format": FEW_DIGITS}},
            "tooltip": plain_tooltip("words"),
        },
    )
    layers = [line] if limit is None else [level(limit, "@bad", [5, 4]), line]
    return {**small_frame(measure, 120), "layer": layers}


__all__ = ["chains", "cost", "diagnostics"]
