"""Of a transition: the free energies of the phases on its two sides."""

from __future__ import annotations

from lightning_slt.publish.specs.parts import Spec, facets, layer, plain_tooltip


def free_energy() -> Spec:
    """The free energies of the two phases of a transition over the number of samples: two lines that cross.

    Rows of :func:`~lightning_slt.publish.chart_rows.free_energy_rows`.
    """
    x = {"field": "n", "type": "quantitative", "title": "samples n", "scale": {"type": "log", "nice": False}}
    x["axis"] = {"grid": False, "tickCount": 5, "format": "~s"}
    layers = [
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
    ]
    return {
        **facets("Free energy of the phases before and after the transition.", "posterior", 210, layers, ("y", "x")),
        "bounds": "flush",
        "spacing": {"row": 84, "column": 78},
    }


__all__ = ["free_energy"]
