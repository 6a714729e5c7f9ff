"""The picture of influence: between groups, and of single samples on themselves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import BboxImage
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from matplotlib.transforms import Bbox, TransformedBbox

from lightning_slt.influence_record import MIN_Z, InfluenceEstimate
from lightning_slt.publish.charts import _BAD, _GOOD, _MUTED, _TEXT, _style
from lightning_slt.publish.render import clean, short

MAX_NUMBERED = 12
"""Groups up to which the cells of the heat map carry their numbers."""
MOST_NAMES = 20
"""Groups that are named along an axis of the heat map: so many lines of text lie beside each other there."""
_FAINT = "#6f6f6f"


def influence_figure(estimate: InfluenceEstimate) -> Figure:
    """Influence between groups (left) and self-influence (right).

    Rows are groups of queries, columns groups of training samples; cells within 3 standard errors of zero are hatched.
    Without groups the left side shows posterior mean loss against plain loss.
    An estimate that is not valid has a red title with the reasons.

    Returns:
        A figure of 1000 x 450 pixels.
    """
    figure = Figure(figsize=(10.0, 4.5), dpi=100, facecolor="white")
    if estimate.valid:
        said = f"{estimate.num_chains} chains of {estimate.num_draws} readings"
        if math.isfinite(estimate.passing):
            said += f"; {estimate.passing:.1%} of single pairs are above {MIN_Z:g} standard errors"
            said += f" ({estimate.chance:.1%} by chance)"
    else:
        said = "NOT VALID: " + ("; ".join(estimate.reasons) or "no reason given")
    lines = textwrap.wrap(clean(said), 140, max_lines=2, placeholder=" …")
    # names that are turned need room below, and two lines of reasons above the title of the heat map
    bottom = 0.25 if _are_long(estimate.groups) else 0.14
    grid = figure.add_gridspec(
        1,
        2,
        width_ratios=(1.15, 1.0),
        wspace=0.3,
        left=0.07,
        right=0.98,
        bottom=bottom,
        top=0.8 if len(lines) < 2 else 0.77,
    )
    left, right = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    if not len(estimate.train_index):
        left.set_axis_off()
        right.set_axis_off()
    else:
        if estimate.group_matrix is not None and estimate.group_se is not None:
            _heat_map(figure, left, estimate, bottom)
        else:
            _losses(left, estimate)
        _self_influence(right, estimate)
    where = f"step {estimate.step:,}    " if estimate.step is not None else ""
    title = f"{where}Influence of {len(estimate.train_index)} training samples on {len(estimate.query_index)} queries"
    colour = _TEXT if estimate.valid else _BAD
    figure.suptitle(title, x=0.07, y=0.965, ha="left", fontsize=12.5, fontweight="bold", color=colour)
    colour = _MUTED if estimate.valid else _BAD
    figure.text(0.07, 0.9, "\n".join(lines), ha="left", va="top", fontsize=9.5, color=colour, parse_math=False)
    return figure


def _heat_map(figure: Figure, axes: Axes, estimate: InfluenceEstimate, bottom: float) -> None:
    """The group matrix, with names, numbers and scale as few artists: an axis of ticks for each costs tenfold."""
    assert estimate.group_matrix is not None and estimate.group_se is not None
    matrix = estimate.group_matrix.numpy(force=True)
    error = estimate.group_se.numpy(force=True)
    names, n = estimate.groups, len(estimate.groups)
    axes.set_axis_off()
    most = (float(np.nanmax(np.abs(matrix))) if np.isfinite(matrix).any() else 1.0) or 1.0
    axes.imshow(matrix, cmap="RdBu", norm=TwoSlopeNorm(0.0, -most, most), aspect="equal")
    scale = 10.0 ** math.floor(math.log10(most))
    known = np.isfinite(matrix)
    unclear = known & ~(np.abs(matrix) > MIN_Z * error)
    dark, pale = known & (np.abs(matrix) > 0.6 * most), np.abs(matrix) <= 0.3 * most
    # white numbers are to stand out from the lines of a dark cell
    for cells, colour in ((unclear & ~dark, "#d4d4d4"), (unclear & dark, "#d4d4d455")):
        if cells.any():
            axes.add_artist(_hatched(cells, colour))
    if n <= MAX_NUMBERED:
        faint = unclear & pale  # grey cannot be read on a strong colour
        for cells, colour in ((faint, _FAINT), (dark, "white"), (known & ~faint & ~dark, _TEXT)):
            # not add_patch, which measures each curve of each letter to fit the limits of the axes
            axes.add_artist(PathPatch(numbers_path(matrix / scale, cells), facecolor=colour, lw=0, gid="numbers"))
    shown = [short(name, 12) for name in names]
    every = math.ceil(n / MOST_NAMES)
    for k in range(0, n, every):
        style: dict[str, Any] = {"fontsize": 8, "color": _TEXT, "parse_math": False}
        turned = {"rotation": 45, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        below = turned if _are_long(names) else {"ha": "center", "va": "top"}
        axes.text(k, n - 0.5 + 0.035 * n, shown[k], gid="column", **style, **below)
        axes.text(-0.5 - 0.025 * n, k, shown[k], gid="row", ha="right", va="center", **style)
    place: dict[str, Any] = {"color": _TEXT, "fontsize": 10, "ha": "center", "va": "center"}
    figure.text(0.285, 0.035 if _are_long(names) else 0.058, "group of training samples", **place)
    figure.text(0.022 if _are_long(names) else 0.085, (0.8 + bottom) / 2, "group of queries", rotation=90, **place)
    _colour_scale(figure, axes, most)
    unit = f", cells in units of {scale:g}" if n <= MAX_NUMBERED and scale != 1 else ""
    axes.set_title(f"> 0 helps; hatched: within {MIN_Z:g} errors of 0{unit}", y=1.0, fontsize=9, color=_MUTED)


def _colour_scale(figure: Figure, axes: Axes, most: float) -> None:
    """A strip of the colours from ``-most`` to ``most`` to the right of the frame."""
    frame = axes.get_position()
    place = Bbox.from_bounds(0.462, frame.y0, 0.012, frame.height)
    strip = BboxImage(TransformedBbox(place, figure.transFigure), cmap="RdBu", norm=Normalize(0, 255))
    strip.set_data(np.arange(255, -1, -1)[:, None])
    figure.add_artist(strip)
    for value, height in ((most, frame.y1), (0.0, (frame.y0 + frame.y1) / 2), (-most, frame.y0)):
        figure.text(0.477, height, f"{value:.2g}", fontsize=8, color=_TEXT, va="center", gid="scale")


def _hatched(cells: npt.NDArray[np.bool_], colour: str) -> PathPatch:
    """All cells that are marked, as one patch."""
    rows, columns = np.nonzero(cells)
    square = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5)])
    corners = (np.stack([columns, rows], axis=1)[:, None] + square).reshape(-1, 2)
    codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], len(rows))
    return PathPatch(Path(corners, codes), facecolor="none", edgecolor=colour, hatch="///", lw=0)


def cell_text(value: float) -> str:
    """What stands in a cell: one digit after the point, and no minus in front of nothing.

    Example:
        >>> cell_text(-0.34), cell_text(-0.04)
        ('-0.3', '0.0')
    """
    return f"{value:.1f}".replace("-0.0", "0.0")


@lru_cache(maxsize=16)
def _glyph(letter: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8], float]:
    """Outline of a letter of size 1, and how far the next one stands from it."""
    made = TextPath((0, 0), letter, size=1)
    width = float(TextPath((0, 0), letter + "0", size=1).vertices[:, 0].max()) - float(
        TextPath((0, 0), "0", size=1).vertices[:, 0].max()
    )
    return np.asarray(made.vertices, dtype=np.float64), np.asarray(made.codes, dtype=np.uint8), width


def numbers_path(matrix: npt.NDArray[np.float64], cells: npt.NDArray[np.bool_]) -> Path:
    """The numbers of the marked cells as one outline, in the coordinates of the heat map.

    Args:
        matrix: ``[rows, columns]`` values.
        cells: ``[rows, columns]``, whose numbers are wanted.

    Returns:
        A path that stays within the cells; empty where none is marked.
    """
    # letters as high as those of the rest of the picture, where the cells have the room
    size = min(0.36, 0.042 * max(len(matrix), 2))
    vertices, codes = [np.empty((0, 2))], [np.empty(0, dtype=np.uint8)]
    for row, column in np.argwhere(cells):
        letters = [_glyph(letter) for letter in cell_text(matrix[row, column])]
        at = column - size * sum(width for *_, width in letters) / 2
        for outline, code, width in letters:
            # rows grow downwards; figures are 0.73 of their size high
            vertices.append(np.array([at, row + 0.365 * size]) + outline * [size, -size])
            codes.append(code)
            at += size * width
    return Path(np.concatenate(vertices), np.concatenate(codes))


def _are_long(names: Sequence[str]) -> bool:
    return max(map(len, names), default=0) > 3


def _losses(axes: Axes, estimate: InfluenceEstimate) -> None:
    _style(axes, estimate.valid)
    x, y = estimate.init_loss.numpy(force=True), estimate.mean_loss.numpy(force=True)
    axes.plot(x, y, "o", color=_GOOD, ms=3, alpha=0.5, mew=0)
    suspects = estimate.suspects(20)
    axes.plot(x[suspects], y[suspects], "o", color=_BAD, mfc="none", ms=6, label=f"{len(suspects)} suspects")
    if (x > 0).all() and x.max() / max(x.min(), 1e-300) > 100:
        axes.set_xscale("log")
    axes.set(xlabel="loss at the weights", ylabel="posterior mean loss")
    axes.legend(fontsize=8.5, frameon=False)


def _self_influence(axes: Axes, estimate: InfluenceEstimate) -> None:
    _style(axes, estimate.valid)
    values = estimate.self_influence.numpy(force=True)
    positive = values[np.isfinite(values) & (values > 0)]
    axes.set(xlabel="self-influence (variance of a sample's loss)", ylabel="training samples")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    if not positive.size:
        return
    low, high = float(positive.min()), float(positive.max())
    if high > low:
        # twelve decades at the most: a sample that hardly moves must not squeeze the others into one bar
        bins = np.geomspace(max(low, high * 1e-12), high * 1.0001, 40)
        axes.set_xscale("log")
        # plain ticks: minor ones and powers set as mathematics take as long to draw as all the rest
        axes.minorticks_off()
        if high < 100 * low:  # there may be a single power of ten in it, or none
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        counts, edges = np.histogram(np.clip(positive, bins[0], None), bins=bins)
    else:
        counts, edges = np.histogram(positive, bins=3)
    axes.stairs(counts, edges, fill=True, color=_GOOD, alpha=0.8)
    if len(positive) < len(values):
        axes.set_title(f"{len(values) - len(positive)} samples have none", fontsize=9, color=_MUTED)


__all__ = ["cell_text", "influence_figure", "numbers_path"]
