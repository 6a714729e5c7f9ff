"""The charts of influence as Vega-Lite: groups, all samples, samples over training."""

from __future__ import annotations

from lightning_slt.publish.specs.parts import (
    CATEGORIES,
    SCHEMA,
    TRAJECTORIES,
    Scale,
    Spec,
    frames_of,
    plain_tooltip,
    small_frame,
    steps,
)


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
                    "tooltip": plain_tooltip("words"),
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

    def loss(field: str, title: str) -> Spec:
        return {
            "field": field,
            "type": "quantitative",
            "title": title,
            "scale": {"type": "log", "nice": False, "padding": 8} if log else {"zero": False},
            "axis": {"tickCount": 6, "format": "~g" if log else ",~r", "grid": not log},
        }

    return {
        "$schema": SCHEMA,
        "description": "Training samples by their two losses.",
        "data": {"name": "rows"},
        "width": "@width",
        "height": 300,
        "mark": {"type": "point", "strokeWidth": 1.4},
        "encoding": {
            "x": loss("plain", "loss at the weights"),
            "y": loss("mean", "mean loss over the posterior"),
            "color": {"condition": {"test": "datum.suspect", "value": "@bad"}, "value": "@good"},
            "size": {"condition": {"test": "datum.suspect", "value": 70}, "value": 14},
            "opacity": {"condition": {"test": "datum.suspect", "value": 1}, "value": 0.5},
            "tooltip": plain_tooltip("words"),
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
            "x": steps(scale, "step"),
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
                **small_frame(measure, 220),
                "mark": {"type": "line", "point": True},
                "encoding": encoding,
            }
        )
    return {**frames_of("Samples over training.", frames), "data": {"name": "rows"}}
