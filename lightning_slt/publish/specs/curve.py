"""The learning coefficient over training: the curve of a run above its loss, and those of its components."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_slt.publish.specs.parts import (
    FEW_DIGITS,
    INVALID,
    SCHEMA,
    SHAPES,
    STATES,
    VALID,
    Scale,
    Spec,
    band,
    column,
    datum,
    facets,
    layer,
    many_points,
    plain_tooltip,
    point_scale,
    steps,
    tooltip,
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
    llc = _llc(column("llc"))
    error = band(x, llc, column)
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
        layer({"type": "area", "color": "@good", "opacity": 0.2}, [estimate, valid], error),
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
                **{k: error[k] for k in ("x", "y", "y2")},
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
                "params": [_nearest("near_llc")],
            },
            _cursor(x, estimate),
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
            *(_with_x(rule, below) for rule in rules),
            layer({"type": "line", "color": "@loss", "strokeWidth": 1.6}, [estimate], {"x": below, "y": loss}),
            {
                **layer(
                    {"type": "point", "filled": True, "color": "@loss", "size": 28 * size, "opacity": 1},
                    [estimate],
                    {"x": below, "y": loss, "tooltip": tooltip("words")},
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


def components(scale: Scale = "linear", points: int = 0) -> Spec:
    """The curve of each monitored component in a frame of its own, steps shared.

    Rows of :func:`~lightning_slt.publish.chart_rows.component_rows`.

    Args:
        scale: of the steps.
        points: how many a component has, where that is known: many are drawn smaller.
    """
    valid = f"datum.state === '{VALID}'"
    x = steps(scale, "step")
    y = _llc("llc")
    layers = [
        layer({"type": "area", "color": "@good", "opacity": 0.2}, [valid], band(x, y)),
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
    ]
    return facets("The learning coefficient of every component over training.", "component", 150, layers)


def _llc(field: str) -> Spec:
    """The axis of the learning coefficient."""
    return {
        "field": field,
        "type": "quantitative",
        "title": "LLC",
        "scale": {"zero": False},
        "axis": {"format": FEW_DIGITS},
    }


def _with_x(layer: Spec, x: Spec) -> Spec:
    """The same layer in another frame: its x keeps its own column."""
    own = layer["encoding"]["x"]
    return {**layer, "encoding": {**layer["encoding"], "x": {**x, "field": own["field"]}}}


def _cursor(x: Spec, which: str) -> Spec:
    """A rule at the step that the pointer is nearest to, in whichever of the two frames."""
    near = {"or": [{"param": "near_llc", "empty": False}, {"param": "near_loss", "empty": False}]}
    return layer(
        {"type": "rule", "color": "@muted"},
        [which],
        {"x": x, "opacity": {"condition": {"test": near, "value": 0.7}, "value": 0}},
    )


def _nearest(name: str) -> Spec:
    return {
        "name": name,
        "select": {"type": "point", "nearest": True, "on": "pointerover", "clear": "pointerout", "encodings": ["x"]},
    }


__all__ = ["components", "curve"]
