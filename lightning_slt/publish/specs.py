"""The charts as Vega-Lite: the one module that holds them, for the report's page and for wandb's custom charts.

A spec says what is drawn and with which columns; rows come from :mod:`lightning_slt.publish.chart_rows`. Three things
are left open, and filled by :func:`for_page` or :func:`for_wandb`:

==================  ===================================================================================================
``${field:name}``   a column; wandb's own notation for a field that the panel's settings choose
``@good`` and such  a colour of the palette, so that one spec serves a light and a dark page
``@width``, ...     a number that only the place knows: the width there is, the limits of an axis
==================  ===================================================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_slt.publish.spec_parts import (
    CATEGORIES,
    COSTS,
    DIAGNOSTICS,
    FEW_DIGITS,
    INVALID,
    LEFT_OUT,
    LIGHT,
    SCHEMA,
    SHAPES,
    STATES,
    VALID,
    WHOLE,
    Scale,
    Spec,
    column,
    cursor,
    datum,
    frame,
    frames_of,
    layer,
    many_points,
    nearest,
    plain_tooltip,
    point_scale,
    steps,
    tooltip,
    with_x,
)


def curve(
    scale: Scale = "linear",
    log_loss: bool = False,
    transitions: bool = True,
    boundaries: bool = True,
    states: Sequence[str] = STATES,
    points: int = 0,
) -> Spec:
    """The LLC with its band and the rules of transitions, above the loss on the same steps.

    Rows of :func:`~lightning_slt.publish.chart_rows.curve_rows`.

    Args:
        scale: of the steps; ``"symlog"`` is logarithmic, and linear from 0 to the first.
        log_loss: the loss on a logarithmic axis.
        transitions, boundaries: whether there may be rows of these; a layer without rows makes the library warn.
        states: those that points may have.
        points: how many there are, where that is known: many are drawn smaller.
    """
    size = point_scale(points)
    estimate, transition, boundary = (f"{datum('row')} === '{row}'" for row in ("estimate", "transition", "boundary"))
    valid = f"{datum('state')} === '{VALID}'"
    x = steps(scale, column("step"), title=None)
    x["axis"]["labels"] = False
    spans = [
        layer(
            {"type": "rect", "color": "@rule", "opacity": 0.1},
            [transition],
            {"x": x, "x2": {"field": column("end")}},
        ),
        layer(
            {"type": "rule", "size": 1.8},
            [transition],
            {
                "x": {**x, "field": column("middle")},
                "color": {
                    "condition": {"test": f"isValid({datum('boundary')})", "value": "@muted"},
                    "value": "@rule",
                },
                "strokeDash": {
                    "condition": {"test": f"{datum('state')} === 'confirmed'", "value": [1, 0]},
                    "value": [6, 4],
                },
                "tooltip": tooltip("words"),
            },
        ),
    ]
    changes = [
        layer(
            {"type": "rule", "color": "@muted", "strokeDash": [1, 3]},
            [boundary],
            {"x": x, "tooltip": tooltip("words")},
        ),
    ]
    rules = [*(spans if transitions else []), *(changes if boundaries else [])]
    llc = {
        "field": column("llc"),
        "type": "quantitative",
        "title": "LLC",
        "scale": {"zero": False},
        "axis": {"format": FEW_DIGITS},
    }
    band = {
        "x": x,
        "y": {**llc, "field": column("low")},
        "y2": {"field": column("high")},
        "detail": {"field": column("segment")},
    }
    colour: Spec = {
        "field": column("state"),
        "type": "nominal",
        "scale": {"domain": list(STATES), "range": ["@good", "@bad", "@bad", "@bad", "@bad"]},
        "legend": {"title": None, "orient": "top", "symbolStrokeWidth": 2, "symbolOpacity": 1, "values": "@states"},
    }
    if size < 1:
        colour["legend"]["symbolSize"] = 55
    names = [
        layer(
            {"type": "text", "align": "center", "baseline": "bottom", "dy": -4, "fontWeight": "bold"},
            [transition],
            {
                "x": {**x, "field": column("middle")},
                "y": {"value": 0},
                "text": {"field": column("kind")},
                "color": {"value": "@rule"},
                "tooltip": tooltip("words"),
            },
        ),
    ]
    trusted = [
        layer({"type": "area", "color": "@good", "opacity": 0.2}, [estimate, valid], band),
        layer(
            {"type": "line", "color": "@good", "strokeWidth": 2},
            [estimate, valid],
            {"x": x, "y": llc, "detail": {"field": column("segment")}},
        ),
    ]
    errors = [
        layer(
            {"type": "rule", "opacity": 0.45},
            [estimate, f"{datum('state')} === '{VALID}' || {datum('state')} === '{INVALID}'"],
            {
                **{k: band[k] for k in ("x", "y", "y2")},
                "color": colour,
                "strokeDash": {"condition": {"test": valid, "value": [1, 0]}, "value": [3, 3]},
                # side by side they would hide the band, which says the same
                **(
                    {}
                    if size == 1
                    else {"opacity": {"condition": {"test": valid, "value": 0.45 * size}, "value": 0.45}}
                ),
            },
        ),
    ]
    top = {
        "height": 270,
        "width": "@width",
        "layer": [
            *rules,
            *(names if transitions else []),
            *(trusted if VALID in states else []),
            *(errors if {VALID, INVALID} & set(states) else []),
            {
                **layer(
                    {"type": "point", "size": 55, "strokeWidth": 1.6, "opacity": 1},
                    [estimate],
                    {
                        "x": x,
                        "y": llc,
                        "color": colour,
                        "shape": {
                            "field": column("state"),
                            "type": "nominal",
                            "scale": SHAPES,
                        },
                        "fill": {
                            **colour,
                            "scale": {
                                "domain": list(STATES),
                                "range": ["@good", "@paper", "@paper", "@paper", "@paper"],
                            },
                        },
                        **many_points(size, valid, 55, 1.6),
                        "tooltip": tooltip("words"),
                    },
                ),
                "params": [nearest("near_llc")],
            },
            cursor(x, estimate),
        ],
    }
    loss = {
        "field": column("loss"),
        "type": "quantitative",
        "title": "loss",
        "scale": {"type": "log"} if log_loss else {"zero": False},
        "axis": {"tickCount": 4, "grid": not log_loss, "format": "~g" if log_loss else FEW_DIGITS},
    }
    below = steps(scale, column("step"))
    bottom = {
        "height": 130,
        "width": "@width",
        "layer": [
            *(with_x(rule, below) for rule in rules),
            layer({"type": "line", "color": "@loss", "strokeWidth": 1.6}, [estimate], {"x": below, "y": loss}),
            {
                **layer(
                    {"type": "point", "filled": True, "color": "@loss", "size": 28 * size, "opacity": 1},
                    [estimate],
                    {"x": below, "y": loss, "tooltip": tooltip("words")},
                ),
                "params": [nearest("near_loss")],
            },
            cursor(below, estimate),
        ],
    }
    return {
        "$schema": SCHEMA,
        "description": "The local learning coefficient over training, with its error, above the loss.",
        "data": {"name": "rows"},
        "vconcat": [top, bottom],
        "spacing": 12,
        "resolve": {"scale": {"x": "shared"}},
    }


def components(scale: Scale = "linear", points: int = 0) -> Spec:
    """The curve of each monitored component in a frame of its own, steps shared.

    Rows of :func:`~lightning_slt.publish.chart_rows.component_rows`.

    Args:
        scale: of the steps.
        points: how many a component has, where that is known: many are drawn smaller.
    """
    valid = f"datum.state === '{VALID}'"
    x = steps(scale, "step")
    y = {
        "field": "llc",
        "type": "quantitative",
        "title": "LLC",
        "scale": {"zero": False},
        "axis": {"format": FEW_DIGITS},
    }
    return {
        "$schema": SCHEMA,
        "description": "The learning coefficient of every component over training.",
        "data": {"name": "rows"},
        "facet": {"field": "component", "type": "nominal", "title": None, "sort": "@order"},
        "columns": "@columns",
        "spec": {
            "width": "@cell",
            "height": 150,
            "layer": [
                layer(
                    {"type": "area", "color": "@good", "opacity": 0.2},
                    [valid],
                    {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "detail": {"field": "segment"}},
                ),
                layer({"type": "line", "color": "@good"}, [valid], {"x": x, "y": y, "detail": {"field": "segment"}}),
                layer(
                    {"type": "point", "size": 30, "opacity": 1},
                    [],
                    {
                        "x": x,
                        "y": y,
                        "color": {"condition": {"test": valid, "value": "@good"}, "value": "@bad"},
                        "fill": {"condition": {"test": valid, "value": "@good"}, "value": "@paper"},
                        "shape": {"field": "state", "type": "nominal", "scale": SHAPES, "legend": None},
                        **many_points(point_scale(2 * points), valid, 30, 2),
                        "tooltip": plain_tooltip("words"),
                    },
                ),
            ],
        },
        "resolve": {"scale": {"y": "independent"}},
    }


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


def free_energy() -> Spec:
    """The free energies of the two phases of a transition over the number of samples: two lines that cross.

    Rows of :func:`~lightning_slt.publish.chart_rows.free_energy_rows`.
    """
    x = {"field": "n", "type": "quantitative", "title": "samples n", "scale": {"type": "log", "nice": False}}
    x["axis"] = {"grid": False, "tickCount": 5, "format": "~s"}
    return {
        "$schema": SCHEMA,
        "description": "Free energy of the phases before and after the transition.",
        "data": {"name": "rows"},
        "facet": {"field": "posterior", "type": "nominal", "title": None, "sort": "@order"},
        "columns": "@columns",
        "spec": {
            "width": "@cell",
            "height": 210,
            "layer": [
                layer(
                    {"type": "rect", "color": "@bad", "opacity": 0.1, "clip": True},
                    ["datum.row === 'critical'"],
                    {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
                ),
                layer(
                    {"type": "rule", "color": "@bad", "size": 1.5},
                    ["datum.row === 'critical'"],
                    {"x": x, "tooltip": plain_tooltip("words")},
                ),
                layer(
                    {"type": "rule", "color": "@text", "strokeDash": [2, 3], "size": 1.5},
                    ["datum.row === 'here'"],
                    {"x": x, "tooltip": plain_tooltip("words")},
                ),
                layer(
                    {"type": "line", "strokeWidth": 2.4},
                    ["datum.row === 'line'"],
                    {
                        "x": x,
                        "y": {
                            "field": "energy",
                            "type": "quantitative",
                            "title": "free energy, common part left out",
                        },
                        "color": {
                            "field": "phase",
                            "type": "nominal",
                            "title": None,
                            "legend": {"orient": "top"},
                            "scale": {"domain": ["phase before", "phase after"], "range": ["@muted", "@good"]},
                        },
                    },
                ),
            ],
        },
        "resolve": {"scale": {"y": "independent", "x": "independent"}},
        "bounds": "flush",
        "spacing": {"row": 84, "column": 78},
    }


def diagnostics(scale: Scale = "linear", left_out: bool = True) -> Spec:
    """R-hat, effective draws, chains left out and the virial ratio, each with the line it is held against.

    Rows of :func:`~lightning_slt.publish.chart_rows.diagnostic_rows`.

    Args:
        left_out: whether there is anything to show of chains left out.
    """
    names = [name for name in DIAGNOSTICS if left_out or name != LEFT_OUT]
    frames = [frame(name, scale, DIAGNOSTICS[name], zero=name == LEFT_OUT) for name in names]
    return {**frames_of("Diagnostics of the chains over training.", frames), "data": {"name": "rows"}}


def cost(scale: Scale = "linear") -> Spec:
    """Seconds of each firing, and the share of the run's wall-clock so far.

    Rows of :func:`~lightning_slt.publish.chart_rows.cost_rows`.
    """
    frames = [frame(name, scale, None, zero=True) for name in COSTS]
    return {**frames_of("What measuring cost.", frames), "data": {"name": "rows"}}


def for_page(spec: Spec) -> Spec:
    """With plain column names; colours and numbers are filled in on the page."""
    filled: Spec = json.loads(re.sub(r"\$\{field:(\w+)\}", r"\1", json.dumps(spec)))
    return filled


def for_wandb(spec: Spec, width: int = 640, palette: Mapping[str, str] = LIGHT) -> Spec:
    """As a custom chart of wandb: its own name for the data, a fixed width, the colours of a light page."""
    tokens: dict[str, Any] = {"@width": width, "@states": list(STATES), "@columns": 2, "@cell": width // 2, **palette}
    dropped = {"@limits"}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items() if not (isinstance(v, str) and v in dropped)}
        if isinstance(value, list):
            return [fill(v) for v in value]
        if isinstance(value, str) and value.startswith("@"):
            return tokens[value]
        return value

    filled: Spec = fill(spec)
    filled["data"] = {"name": "wandb"}
    return filled


def fields_of(spec: Spec) -> tuple[str, ...]:
    """The columns that a spec leaves to wandb, sorted.

    Example:
        >>> fields_of(chains(band=False))
        ('chain', 'draw', 'llc')
    """
    return tuple(sorted(set(re.findall(r"\$\{field:(\w+)\}", json.dumps(spec)))))
