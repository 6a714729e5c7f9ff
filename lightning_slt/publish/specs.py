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
from collections.abc import Mapping
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

Spec = dict[str, Any]
Scale = Literal["linear", "log", "symlog"]


def _f(name: str) -> str:
    return "${field:" + name + "}"


def _d(name: str) -> str:
    return f"datum['{_f(name)}']"


def curve(scale: Scale = "linear", log_loss: bool = False, transitions: bool = True, boundaries: bool = True) -> Spec:
    """The LLC with its band and the rules of transitions, above the loss on the same steps.

    Rows of :func:`~lightning_slt.publish.chart_rows.curve_rows`.

    Args:
        scale: of the steps; ``"symlog"`` is logarithmic, and linear from 0 to the first.
        log_loss: the loss on a logarithmic axis.
        transitions, boundaries: whether there may be rows of these; a layer without rows makes the library warn.
    """
    estimate, transition, boundary = (f"{_d('row')} === '{row}'" for row in ("estimate", "transition", "boundary"))
    valid = f"{_d('state')} === '{VALID}'"
    x = _steps(scale, _f("step"), title=None)
    x["axis"]["labels"] = False
    spans = [
        _layer(
            {"type": "rect", "color": "@rule", "opacity": 0.1},
            [transition],
            {"x": x, "x2": {"field": _f("end")}},
        ),
        _layer(
            {"type": "rule", "size": 1.8},
            [transition],
            {
                "x": {**x, "field": _f("middle")},
                "color": {
                    "condition": {"test": f"isValid({_d('boundary')})", "value": "@muted"},
                    "value": "@rule",
                },
                "strokeDash": {
                    "condition": {"test": f"{_d('state')} === 'confirmed'", "value": [1, 0]},
                    "value": [6, 4],
                },
                "tooltip": _tooltip("words"),
            },
        ),
    ]
    changes = [
        _layer(
            {"type": "rule", "color": "@muted", "strokeDash": [1, 3]},
            [boundary],
            {"x": x, "tooltip": _tooltip("words")},
        ),
    ]
    rules = [*(spans if transitions else []), *(changes if boundaries else [])]
    llc = {"field": _f("llc"), "type": "quantitative", "title": "LLC", "scale": {"zero": False}}
    band = {"x": x, "y": {**llc, "field": _f("low")}, "y2": {"field": _f("high")}, "detail": {"field": _f("segment")}}
    colour = {
        "field": _f("state"),
        "type": "nominal",
        "scale": {"domain": list(STATES), "range": ["@good", "@bad", "@bad", "@bad", "@bad"]},
        "legend": {"title": None, "orient": "top", "symbolStrokeWidth": 2, "symbolOpacity": 1, "values": "@states"},
    }
    shapes = ["circle", "diamond", "triangle-down", "triangle-up", "cross"]
    names = [
        _layer(
            {"type": "text", "align": "center", "baseline": "bottom", "dy": -4, "fontWeight": "bold"},
            [transition],
            {
                "x": {**x, "field": _f("middle")},
                "y": {"value": 0},
                "text": {"field": _f("kind")},
                "color": {"value": "@rule"},
                "tooltip": _tooltip("words"),
            },
        ),
    ]
    top = {
        "height": 270,
        "width": "@width",
        "layer": [
            *rules,
            *(names if transitions else []),
            _layer({"type": "area", "color": "@good", "opacity": 0.2}, [estimate, valid], band),
            _layer(
                {"type": "line", "color": "@good", "strokeWidth": 2},
                [estimate, valid],
                {"x": x, "y": llc, "detail": {"field": _f("segment")}},
            ),
            _layer(
                {"type": "rule", "opacity": 0.45},
                [estimate, f"{_d('state')} === '{VALID}' || {_d('state')} === '{INVALID}'"],
                {
                    **{k: band[k] for k in ("x", "y", "y2")},
                    "color": colour,
                    "strokeDash": {"condition": {"test": valid, "value": [1, 0]}, "value": [3, 3]},
                },
            ),
            {
                **_layer(
                    {"type": "point", "size": 55, "strokeWidth": 1.6, "opacity": 1},
                    [estimate],
                    {
                        "x": x,
                        "y": llc,
                        "color": colour,
                        "shape": {
                            "field": _f("state"),
                            "type": "nominal",
                            "scale": {"domain": list(STATES), "range": shapes},
                        },
                        "fill": {
                            **colour,
                            "scale": {
                                "domain": list(STATES),
                                "range": ["@good", "@paper", "@paper", "@paper", "@paper"],
                            },
                        },
                        "tooltip": _tooltip("words"),
                    },
                ),
                "params": [_nearest("near_llc")],
            },
            _cursor(x, estimate),
        ],
    }
    loss = {
        "field": _f("loss"),
        "type": "quantitative",
        "title": "loss",
        "scale": {"type": "log"} if log_loss else {"zero": False},
        "axis": {"tickCount": 4, "grid": not log_loss, "format": "~g" if log_loss else ",~r"},
    }
    below = _steps(scale, _f("step"))
    bottom = {
        "height": 130,
        "width": "@width",
        "layer": [
            *(_with_x(rule, below) for rule in rules),
            _layer({"type": "line", "color": "@loss", "strokeWidth": 1.6}, [estimate], {"x": below, "y": loss}),
            {
                **_layer(
                    {"type": "point", "filled": True, "color": "@loss", "size": 28, "opacity": 1},
                    [estimate],
                    {"x": below, "y": loss, "tooltip": _tooltip("words")},
                ),
                "params": [_nearest("near_loss")],
            },
            _cursor(below, estimate),
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


def components(scale: Scale = "linear") -> Spec:
    """The curve of each monitored component in a frame of its own, steps shared.

    Rows of :func:`~lightning_slt.publish.chart_rows.component_rows`.
    """
    valid = f"datum.state === '{VALID}'"
    x = _steps(scale, "step")
    y = {"field": "llc", "type": "quantitative", "title": "LLC", "scale": {"zero": False}}
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
                _layer(
                    {"type": "area", "color": "@good", "opacity": 0.2},
                    [valid],
                    {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "detail": {"field": "segment"}},
                ),
                _layer({"type": "line", "color": "@good"}, [valid], {"x": x, "y": y, "detail": {"field": "segment"}}),
                _layer(
                    {"type": "point", "size": 30, "opacity": 1},
                    [],
                    {
                        "x": x,
                        "y": y,
                        "color": {"condition": {"test": valid, "value": "@good"}, "value": "@bad"},
                        "fill": {"condition": {"test": valid, "value": "@good"}, "value": "@paper"},
                        "shape": {"condition": {"test": valid, "value": "circle"}, "value": "diamond"},
                        "tooltip": _plain_tooltip("words"),
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
    shown = "running" if running else _f("llc")
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
            {
                "window": [{"op": "mean", "field": _f("llc"), "as": "running"}],
                "groupby": [_f("chain")],
                "sort": [{"field": _f("draw")}],
                "frame": [None, 0],
            }
        ],
        "layer": [
            *behind,
            {
                "mark": {"type": "line", "clip": True, "strokeWidth": 1.6 if running else 0.9, "opacity": 0.9},
                "encoding": {
                    "x": {
                        "field": _f("draw"),
                        "type": "quantitative",
                        "title": "draw",
                        "axis": {"grid": False, "tickCount": 8},
                    },
                    "y": y,
                    "color": {
                        "field": _f("chain"),
                        "type": "nominal",
                        "title": "chain",
                        "scale": {"range": list(CATEGORIES)},
                    },
                    "tooltip": [
                        {"field": _f("chain"), "type": "nominal", "title": "chain"},
                        {"field": _f("draw"), "type": "quantitative", "title": "draw"},
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
                _layer(
                    {"type": "rect", "color": "@bad", "opacity": 0.1, "clip": True},
                    ["datum.row === 'critical'"],
                    {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
                ),
                _layer(
                    {"type": "rule", "color": "@bad", "size": 1.5},
                    ["datum.row === 'critical'"],
                    {"x": x, "tooltip": _plain_tooltip("words")},
                ),
                _layer(
                    {"type": "rule", "color": "@text", "strokeDash": [2, 3], "size": 1.5},
                    ["datum.row === 'here'"],
                    {"x": x, "tooltip": _plain_tooltip("words")},
                ),
                _layer(
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
    }


def diagnostics(scale: Scale = "linear", left_out: bool = True) -> Spec:
    """R-hat, effective draws, chains left out and the virial ratio, each with the line it is held against.

    Rows of :func:`~lightning_slt.publish.chart_rows.diagnostic_rows`.

    Args:
        left_out: whether there is anything to show of chains left out.
    """
    names = [name for name in DIAGNOSTICS if left_out or name != LEFT_OUT]
    frames = [_frame(name, scale, DIAGNOSTICS[name], zero=name == LEFT_OUT) for name in names]
    return {**_frames("Diagnostics of the chains over training.", frames), "data": {"name": "rows"}}


def cost(scale: Scale = "linear") -> Spec:
    """Seconds of each firing, and the share of the run's wall-clock so far.

    Rows of :func:`~lightning_slt.publish.chart_rows.cost_rows`.
    """
    frames = [_frame(name, scale, None, zero=True) for name in COSTS]
    return {**_frames("What measuring cost.", frames), "data": {"name": "rows"}}


def _frames(description: str, frames: list[Spec]) -> Spec:
    return {"$schema": SCHEMA, "description": description, "columns": "@columns", "concat": frames}


def _frame(measure: str, scale: Scale, limit: Optional[float], zero: bool = False) -> Spec:
    """One small chart of the rows of a measure."""
    y: Spec = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": zero}}
    line = _layer(
        {"type": "line", "color": "@loss", "point": {"color": "@loss", "size": 22}},
        [],
        {
            "x": _steps(scale, "step"),
            "y": {**y, "axis": {"tickCount": 4, "format": "~g"}},
            "tooltip": _plain_tooltip("words"),
        },
    )
    held = {
        "data": {"values": [{}]},
        "mark": {"type": "rule", "color": "@bad", "strokeDash": [5, 4]},
        "encoding": {"y": {"datum": limit}},
    }
    return {
        "title": {"text": measure, "anchor": "start", "frame": "group", "offset": 8},
        "transform": [{"filter": f"datum.measure === '{measure}'"}],
        "width": "@cell",
        "height": 120,
        "layer": [line] if limit is None else [held, line],
    }


def groups(numbers: bool = True) -> Spec:
    """What groups of training samples do to groups of queries.

    Rows of :func:`~lightning_slt.publish.chart_rows.group_rows`.

    Args:
        numbers: write the value into each cell.
    """
    cell = {
        "x": {
            "field": "train",
            "type": "nominal",
            "sort": None,
            "title": "group of training samples",
            "axis": {"orient": "bottom", "grid": False, "labelLimit": 90, "labelAngle": "@angle"},
        },
        "y": {
            "field": "query",
            "type": "nominal",
            "sort": None,
            "title": "group of queries",
            "axis": {"grid": False, "labelLimit": 90},
        },
    }
    text = {
        "mark": {"type": "text", "fontSize": 10},
        "encoding": {
            **cell,
            "text": {"field": "text"},
            "color": {"condition": {"test": "datum.dark", "value": "#ffffff"}, "value": "#26303a"},
            "opacity": {"condition": {"test": "datum.clear", "value": 1}, "value": 0.45},
        },
    }
    return {
        "$schema": SCHEMA,
        "description": "Influence of groups of training samples on groups of queries.",
        "data": {"name": "rows"},
        "title": {"text": "@unit", "anchor": "start", "frame": "group", "fontWeight": 400, "color": "@muted"},
        "width": "@square",
        "height": "@square",
        "layer": [
            {
                "mark": {"type": "rect", "strokeWidth": 1, "stroke": "@paper"},
                "encoding": {
                    **cell,
                    "color": {
                        "field": "value",
                        "type": "quantitative",
                        "title": "> 0 helps",
                        "scale": {
                            "range": ["#b35806", "#f1a340", "#f7f7f7", "#67a9cf", "#0a5a94"],
                            "domain": "@limits",
                        },
                        "legend": {"format": ".2~g"},
                    },
                    "opacity": {"condition": {"test": "datum.clear", "value": 1}, "value": 0.55},
                    "tooltip": _plain_tooltip("words"),
                },
            },
            *([text] if numbers else []),
        ],
    }


def samples(log: bool = False) -> Spec:
    """Every sample by its loss at the weights and its mean loss over the posterior; suspects stand out.

    Rows of :func:`~lightning_slt.publish.chart_rows.sample_columns`, made into rows.

    Args:
        log: both losses on logarithmic axes.
    """
    return {
        "$schema": SCHEMA,
        "description": "Training samples by their two losses.",
        "data": {"name": "rows"},
        "width": "@width",
        "height": 300,
        "mark": {"type": "point", "strokeWidth": 1.4},
        "encoding": {
            "x": {
                "field": "plain",
                "type": "quantitative",
                "title": "loss at the weights",
                "scale": {"type": "log", "nice": False, "padding": 8} if log else {"zero": False},
                "axis": {"tickCount": 6, "format": "~g" if log else ",~r", "grid": not log},
            },
            "y": {
                "field": "mean",
                "type": "quantitative",
                "title": "mean loss over the posterior",
                "scale": {"type": "log", "nice": False, "padding": 8} if log else {"zero": False},
                "axis": {"tickCount": 6, "format": "~g" if log else ",~r", "grid": not log},
            },
            "color": {"condition": {"test": "datum.suspect", "value": "@bad"}, "value": "@good"},
            "size": {"condition": {"test": "datum.suspect", "value": 70}, "value": 14},
            "opacity": {"condition": {"test": "datum.suspect", "value": 1}, "value": 0.5},
            "tooltip": _plain_tooltip("words"),
        },
    }


def trajectories(scale: Scale = "linear", log: bool = False) -> Spec:
    """Mean loss and self-influence over training of the samples that changed most.

    Rows of :func:`~lightning_slt.publish.chart_rows.trajectory_rows`.

    Args:
        log: both measures on logarithmic axes.
    """
    frames = []
    for measure in TRAJECTORIES:
        y: Spec = {
            "field": "value",
            "type": "quantitative",
            "title": None,
            "axis": {"tickCount": 5, "format": "~g" if log else ",~r"},
        }
        y["scale"] = {"type": "log"} if log else {"zero": False}
        colour = {"field": "sample", "type": "nominal", "title": "sample", "sort": None}
        encoding = {
            "x": _steps(scale, "step"),
            "y": y,
            "color": {**colour, "scale": {"range": [*CATEGORIES, "#117733", "#882255"]}},
            "tooltip": [
                {"field": "sample", "type": "nominal"},
                {"field": "step", "type": "quantitative"},
                {"field": "value", "type": "quantitative", "format": ".3g"},
            ],
        }
        frames.append(
            {
                "title": {"text": measure, "anchor": "start", "frame": "group", "offset": 8},
                "transform": [{"filter": f"datum.measure === '{measure}'"}],
                "width": "@cell",
                "height": 220,
                "mark": {"type": "line", "point": True},
                "encoding": encoding,
            }
        )
    return {**_frames("Samples over training.", frames), "data": {"name": "rows"}}


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


def _layer(mark: Spec, filters: list[str], encoding: Spec) -> Spec:
    transform = {"transform": [{"filter": test} for test in filters]} if filters else {}
    return {**transform, "mark": mark, "encoding": encoding}


def _with_x(layer: Spec, x: Spec) -> Spec:
    """The same layer in another frame: its x keeps its own column."""
    own = layer["encoding"]["x"]
    return {**layer, "encoding": {**layer["encoding"], "x": {**x, "field": own["field"]}}}


def _cursor(x: Spec, which: str) -> Spec:
    """A rule at the step that the pointer is nearest to, in whichever of the two frames."""
    near = {"or": [{"param": "near_llc", "empty": False}, {"param": "near_loss", "empty": False}]}
    return _layer(
        {"type": "rule", "color": "@muted"},
        [which],
        {"x": x, "opacity": {"condition": {"test": near, "value": 0.7}, "value": 0}},
    )


def _nearest(name: str) -> Spec:
    return {
        "name": name,
        "select": {"type": "point", "nearest": True, "on": "pointerover", "clear": "pointerout", "encodings": ["x"]},
    }


def _tooltip(name: str) -> Spec:
    return {"field": _f(name), "type": "nominal"}


def _plain_tooltip(name: str) -> Spec:
    return {"field": name, "type": "nominal"}


def _steps(scale: Scale, field: str, title: Optional[str] = "optimiser step") -> Spec:
    axis: Spec = {"title": title, "grid": False, "tickCount": 6, "labelOverlap": True}
    kinds: dict[Scale, Spec] = {
        "linear": {"zero": False, "nice": False},
        "log": {"type": "log", "nice": False},
        "symlog": {"type": "symlog", "constant": "@first", "nice": False},
    }
    if scale == "symlog":
        axis["values"] = "@ticks"  # the library's own are those of a linear axis, all at one end
    return {"field": field, "type": "quantitative", "scale": {**kinds[scale], "padding": 8}, "axis": axis}
