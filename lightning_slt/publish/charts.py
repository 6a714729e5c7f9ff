"""The two pictures: the chains of one estimate, and the learning coefficient over training.

Figures are made with matplotlib's object interface and drawn by Agg, never through pyplot: a callback must not change
the backend, the current figure or the open windows of the script it runs in.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any, Optional
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image  # a dependency of matplotlib

from lightning_slt.publish.phrases import count_of, number, with_error
from lightning_slt.publish.specs.parts import point_scale, widened
from lightning_slt.publish.tables import are_log_spaced, step_of
from lightning_slt.record import Estimate
from lightning_slt.transitions import Transition

_SIZE = (10.0, 4.5)  # inches at 100 dpi: 1000 x 450 pixels
_GOOD = "#1f5fa8"
_BAD = "#c62828"
_TEXT = "#333333"
_MUTED = "#8a8a8a"
_RULE = "#6a3d9a"
_CHAINS = ("#1f77b4", "#e08214", "#2ca02c", "#9467bd", "#17a2b8", "#b5651d", "#d0559f", "#7a7a00")
_NAMED = 5
"""Points beyond the frame whose values are written beside them."""

_drawn: WeakKeyDictionary[Figure, npt.NDArray[np.uint8]] = WeakKeyDictionary()
_files: WeakKeyDictionary[Figure, bytes] = WeakKeyDictionary()


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """The figure as ``[height, width, 4]`` RGBA bytes; drawn once, however many sinks ask."""
    if figure not in _drawn:
        canvas = FigureCanvasAgg(figure)
        with warnings.catch_warnings():
            # the text of a sample may be in any script; its boxes are no matter for a warning at every firing
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            canvas.draw()
        _drawn[figure] = np.array(canvas.buffer_rgba(), dtype=np.uint8)
    return _drawn[figure]


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; packed once, however many sinks ask."""
    if figure not in _files:
        out = io.BytesIO()
        # level 1: files a fifth larger than the default's, in a third of its time
        Image.fromarray(pixels(figure)).convert("RGB").save(out, format="png", compress_level=1)
        _files[figure] = out.getvalue()
    return _files[figure]


def chains_figure(estimate: Estimate) -> Figure:
    """How one number came about: the running mean of each chain (left) and where each chain ended (right).

    The band is ``mean ± 1.96 se``. Chains that were left out are dotted grey; an estimate that is not valid has a red
    title with the reasons and a hatched grey band, so that it cannot be taken for a result.

    Args:
        estimate: What was measured; the trace may hold NaN.

    Returns:
        A figure of 1000 x 450 pixels with two axes that share y, in LLC units.
    """
    figure = Figure(figsize=_SIZE, dpi=100, facecolor="white")
    grid = figure.add_gridspec(
        1, 2, width_ratios=(2.6, 1.0), wspace=0.06, left=0.075, right=0.985, bottom=0.13, top=0.8
    )
    left = figure.add_subplot(grid[0])
    right = figure.add_subplot(grid[1], sharey=left)

    trace = estimate.trace.double().numpy(force=True)
    ends = estimate.per_chain.double().numpy(force=True)
    left_out = ~np.isfinite(ends)
    with np.errstate(all="ignore"):
        running = np.cumsum(trace, axis=1) / np.arange(1, trace.shape[1] + 1)
    running[~np.isfinite(running)] = np.nan
    draws = np.arange(1, trace.shape[1] + 1)

    for axes in (left, right):
        _style(axes, estimate.valid)
        _band(axes, estimate)
    for chain, values in enumerate(running):
        good = chain < len(ends) and not left_out[chain]
        colour = _CHAINS[chain % len(_CHAINS)] if good else _MUTED
        left.plot(draws, values, color=colour, lw=1.5 if good else 1.0, ls="-" if good else ":", alpha=0.9)
    for chain, end in enumerate(ends):
        if math.isfinite(end):
            right.plot([chain], [end], "o", color=_CHAINS[chain % len(_CHAINS)], ms=7, mec="white", mew=0.8)
        else:  # at the foot of the axes: it has no height of its own
            right.plot([chain], [0.04], "x", color=_BAD, ms=8, mew=2, transform=right.get_xaxis_transform())

    left.set(xlabel="draw", ylabel="LLC, running mean of each chain", xlim=(1, max(2, trace.shape[1])))
    right.set(xlabel="chain (× = left out)" if left_out.any() else "chain", xlim=(-0.7, max(1, len(ends)) - 0.3))
    # ticks are what takes longest to draw
    right.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    left.yaxis.set_major_locator(MaxNLocator(nbins=5))
    right.tick_params(labelleft=False)
    limits = _limits(running, ends, estimate)
    if limits is not None:
        left.set_ylim(*limits)
    _headline(figure, estimate)
    return figure


def history_figure(estimates: Sequence[Estimate], transitions: Sequence[Transition] = ()) -> Figure:
    """The learning coefficient over training (top) above the loss (bottom), on one x axis.

    Valid estimates are filled points joined by a line with a ``± 1.96 se`` band; invalid ones are hollow and red, and
    neither line nor band passes through them. The x axis is logarithmic where the steps span more than a factor of 100
    and are spaced that way.

    Each transition is a vertical rule at its middle, its kind above it, on a band from onset to end; one that is still
    provisional is dashed, one that lies at a boundary of the trainer's grey, and a retracted one is left out.

    Args:
        estimates: In any order; may be empty.
        transitions: Those to mark.

    Returns:
        A figure of 1000 x 450 pixels with two axes that share x (optimiser steps).
    """
    points = sorted(((step_of(e, i), e) for i, e in enumerate(estimates)), key=lambda point: point[0])
    steps = np.array([step for step, _ in points], dtype=np.float64)
    llc = np.array([e.mean for _, e in points], dtype=np.float64)
    error = 1.96 * np.nan_to_num(np.array([e.se for _, e in points], dtype=np.float64), nan=0.0, posinf=0.0)
    loss = np.array([e.init_loss for _, e in points], dtype=np.float64)
    valid = np.array([e.valid for _, e in points], dtype=bool) & np.isfinite(llc)
    doubtful = ~valid & np.isfinite(llc)
    lost = ~np.isfinite(llc)

    figure = Figure(figsize=_SIZE, dpi=100, facecolor="white")
    grid = figure.add_gridspec(
        2, 1, height_ratios=(1.7, 1.0), hspace=0.1, left=0.085, right=0.985, bottom=0.12, top=0.9
    )
    top = figure.add_subplot(grid[0])
    bottom = figure.add_subplot(grid[1], sharex=top)
    for axes in (top, bottom):
        _style(axes, True)

    top.fill_between(steps[valid], (llc - error)[valid], (llc + error)[valid], color=_GOOD, alpha=0.18, lw=0)
    size, marks = point_scale(len(points)), _marks(point_scale(int(valid.sum())), 5, 0.6)
    named = "LLC ± 1.96 se" if valid.any() else None
    top.plot(steps[valid], llc[valid], color=_GOOD, lw=1.8, label=named, **marks)
    if valid.sum() == 1:  # a band of no width cannot be seen
        top.errorbar(steps[valid], llc[valid], error[valid], fmt="none", ecolor=_GOOD, elinewidth=1.4, alpha=0.5)
    if doubtful.any():
        top.errorbar(steps[doubtful], llc[doubtful], error[doubtful], fmt="none", ecolor=_BAD, elinewidth=1, alpha=0.5)
        hollow: dict[str, Any] = {"ms": max(6 * size, 4), "mew": 1.6 if size == 1 else 1.2}
        top.plot(steps[doubtful], llc[doubtful], "o", color=_BAD, mfc="white", label="not valid", **hollow)
    if lost.any():
        foot = np.full(int(lost.sum()), 0.05)
        top.plot(
            steps[lost], foot, "x", color=_BAD, ms=7, mew=1.8, label="no estimate", transform=top.get_xaxis_transform()
        )
    if valid.any() and doubtful.any():
        # the error bars of a diverged chain would flatten everything that can be read
        _fit_y(top, llc[valid], error[valid], llc[doubtful])

    bottom.plot(steps, loss, color="#444444", lw=1.4, label="loss at the weights", **_marks(size, 4, 0.5))

    # before a logarithmic scale, which has ticks of its own
    top.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if are_log_spaced(steps.tolist()):
        if steps.min() > 0:
            top.set_xscale("log")
        else:  # the weights at initialisation are at step 0, which a logarithmic axis would drop
            top.set_xscale("symlog", linthresh=float(steps[steps > 0].min()))
    if valid.any() and doubtful.any():
        _mark_outside(top, steps[doubtful], llc[doubtful])
    finite_loss = loss[np.isfinite(loss)]
    if finite_loss.size and finite_loss.min() > 0 and finite_loss.max() / finite_loss.min() > 50:
        bottom.set_yscale("log")
    _mark_transitions(top, bottom, transitions)
    top.set_ylabel("LLC")
    top.tick_params(labelbottom=False)
    bottom.set(xlabel="optimiser step", ylabel="loss")
    for axes in (top, bottom):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=8.5, frameon=False)
    title = f"Local learning coefficient: {count_of(len(points), 'estimate')}"
    standing = sum(t.state != "retracted" for t in transitions)
    if standing:
        title += f", {standing} transition{'s' if standing > 1 else ''}"
    if len(points) > int(valid.sum()):
        title += f", {len(points) - int(valid.sum())} not valid"
    figure.suptitle(title, x=0.085, y=0.965, ha="left", fontsize=12, fontweight="bold", color=_TEXT)
    return figure


def _marks(size: float, width: float, edge: float) -> dict[str, Any]:
    """The points of a line: smaller where they are many, and none where their white edges would make the line pale."""
    return {"marker": "o" if width * size > 3 else "", "ms": width * size, "mec": "white", "mew": edge * size}


def _mark_transitions(top: Axes, bottom: Axes, transitions: Sequence[Transition]) -> None:
    for t in transitions:
        if t.state == "retracted":
            continue
        colour = _MUTED if t.boundary is not None else _RULE
        for axes in (top, bottom):
            axes.axvspan(t.onset, t.end, color=colour, alpha=0.12, lw=0, zorder=0.4)
            axes.axvline(t.step, color=colour, lw=1.3, ls="--" if t.state == "provisional" else "-", zorder=0.8)
        top.text(
            t.step, 1.0, t.kind, color=colour, fontsize=9, ha="center", va="bottom", transform=top.get_xaxis_transform()
        )


def _style(axes: Axes, valid: bool) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.grid(True, color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT, labelsize=9)
    axes.xaxis.label.set(color=_TEXT, size=10)
    axes.yaxis.label.set(color=_TEXT, size=10)
    if not valid:
        axes.set_facecolor("#f4f2f2")


def _band(axes: Axes, estimate: Estimate) -> None:
    low, high = estimate.interval
    if not math.isfinite(estimate.mean):
        return
    colour = _GOOD if estimate.valid else _MUTED
    if math.isfinite(low) and math.isfinite(high):
        look: dict[str, Any] = {"alpha": 0.15, "lw": 0} if estimate.valid else {"alpha": 0.35, "lw": 0, "hatch": "//"}
        axes.axhspan(low, high, facecolor=colour, edgecolor="#666666", zorder=0.5, **look)
    axes.axhline(estimate.mean, color=colour if estimate.valid else _BAD, lw=1.6, ls="--", zorder=1)


def _limits(
    running: npt.NDArray[np.float64], ends: npt.NDArray[np.float64], estimate: Estimate
) -> Optional[tuple[float, float]]:
    """The y range: band, ends, and the chains after their first tenth, whose running mean is one or two noisy draws."""
    used = running[np.isfinite(ends)] if len(ends) == len(running) else running
    late = used[:, running.shape[1] // 10 :]
    values = np.concatenate([late.ravel(), ends, np.array(estimate.interval), [estimate.mean]])
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _headline(figure: Figure, estimate: Estimate) -> None:
    def formatted(value: float, form: str) -> str:
        return format(value, form) if math.isfinite(value) else "n/a"

    parts = [f"step {estimate.step:,}"] if estimate.step is not None else []
    parts.append(f"LLC {with_error(estimate.mean, estimate.se)}")
    parts.append(f"R-hat {formatted(estimate.rhat, '.3f')}")
    parts.append(f"ESS {formatted(estimate.ess, '.0f')}")
    colour = _TEXT if estimate.valid else _BAD
    title = "    ".join(parts)
    figure.suptitle(title, x=0.075, y=0.965, ha="left", fontsize=13, fontweight="bold", color=colour)
    if estimate.valid:
        verdict = f"valid: {estimate.num_chains} chains of {estimate.num_draws} draws, band is ± 1.96 se"
    else:
        verdict = "NOT VALID: " + ("; ".join(estimate.reasons) or "no reason given")
    # textwrap, since matplotlib's own wrapping is not known until the figure is drawn
    lines = textwrap.wrap(verdict, 125, max_lines=2, placeholder=" …")
    figure.text(
        0.075, 0.9, "\n".join(lines), ha="left", va="top", fontsize=9.5, color=_MUTED if estimate.valid else _BAD
    )


def _mark_outside(axes: Axes, steps: npt.NDArray[np.float64], llc: npt.NDArray[np.float64]) -> None:
    """Triangles on the frame where a point that is not valid lies beyond it; a few of them with their values."""
    low, high = axes.get_ylim()
    named = int(((llc < low) | (llc > high)).sum()) <= _NAMED
    for beyond, place, marker in ((llc < low, 0.03, "v"), (llc > high, 0.97, "^")):
        if beyond.any():
            axes.plot(
                steps[beyond],
                np.full(int(beyond.sum()), place),
                marker,
                color=_BAD,
                mfc="white",
                ms=6,
                mew=1.4,
                transform=axes.get_xaxis_transform(),
                label=f"not valid, {'below' if marker == 'v' else 'above'} the frame",
            )
            if named:
                _name_values(axes, steps[beyond], llc[beyond], place, 1 if marker == "v" else -1)


def _name_values(
    axes: Axes, steps: npt.NDArray[np.float64], llc: npt.NDArray[np.float64], place: float, inwards: int
) -> None:
    """The values of points on the frame, over their triangles; where these are close, one further in than the other.

    Args:
        axes: whose limits and scale are set.
        steps: ``[n]`` of the points.
        llc: ``[n]`` their values.
        place: their height in the axes.
        inwards: 1 where the frame is below, -1 above.
    """
    across = [axes.transData.transform((step, 0.0))[0] for step in steps]
    left, right = axes.bbox.x0, axes.bbox.x1
    level, taken = 0, -math.inf
    for x, step, value in zip(across, steps, llc, strict=True):
        level = level + 1 if x < taken else 0
        text = number(float(value), 2)
        taken = x + 8 * len(text)  # pixels
        from_left = (x - left) / (right - left)
        axes.annotate(
            text,
            (step, place),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, (10 + 10 * level) * inwards),
            textcoords="offset points",
            ha="left" if from_left < 0.02 else "right" if from_left > 0.98 else "center",
            va="center",
            fontsize=8,
            color=_BAD,
        )


def _fit_y(
    axes: Axes, good: npt.NDArray[np.float64], error: npt.NDArray[np.float64], bad: npt.NDArray[np.float64]
) -> None:
    low, high = widened(float((good - error).min()), float((good + error).max()), bad.tolist())
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
