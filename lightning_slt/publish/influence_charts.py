"""Pictures of influence: between groups, of single samples, of the suspects, and over training."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path as Files
from typing import Any, Optional

import matplotlib
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
from PIL import Image, ImageDraw, ImageFont

from lightning_slt.influence_record import MIN_Z, InfluenceEstimate
from lightning_slt.publish.charts import _BAD, _CHAINS, _GOOD, _MUTED, _TEXT, _style
from lightning_slt.publish.render import Rendered, clean

MAX_NUMBERED = 12
"""Groups up to which the cells of the heat map carry their numbers."""
MOST_NAMES = 20
"""Groups that are named along an axis of the heat map: so many lines of text lie beside each other there."""
TRAJECTORIES = 10
ACROSS, SIDE, APART = 10, 89, 99
"""Suspects in a row, the side of the frame of each in pixels, and how far it is from one to the next."""
_LEGEND = "mean loss now; rank by plain loss"
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
    short = [_short(name, 12) for name in names]
    every = math.ceil(n / MOST_NAMES)
    for k in range(0, n, every):
        style: dict[str, Any] = {"fontsize": 8, "color": _TEXT, "parse_math": False}
        turned = {"rotation": 45, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        below = turned if _are_long(names) else {"ha": "center", "va": "top"}
        axes.text(k, n - 0.5 + 0.035 * n, short[k], gid="column", **style, **below)
        axes.text(-0.5 - 0.025 * n, k, short[k], gid="row", ha="right", va="center", **style)
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


def _short(text: str, width: int) -> str:
    """One line of at most ``width`` characters."""
    text = clean(text)
    return text if len(text) <= width else text[: width - 1] + "…"


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


def suspects_figure(estimate: InfluenceEstimate, samples: Mapping[int, Rendered], k: int = 20) -> Optional[Figure]:
    """The ``k`` samples of the largest posterior mean loss, each with what is known of it.

    Args:
        estimate: what was measured.
        samples: how they look, by index in the training data; one that is missing shows its number only.
        k: how many at most.

    Returns:
        A figure of ten to a row; None without samples.
    """
    columns = estimate.suspects(k)
    if not columns:
        return None
    down = -(-len(columns) // ACROSS)
    height = 50 + 140 * down
    figure = Figure(figsize=(10.0, height / 100), dpi=100, facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.imshow(_sheet(estimate, samples, columns, height), aspect="auto", extent=(0, 1000, height, 0))
    what = "wrong labels" if estimate.train_group is not None else "wrong labels and outliers"
    # the numbers below are those of this firing, and need not fall from one to the next
    by = "ranked over all firings up to" if estimate.suspicion is not None else "ranked at"
    when = f"step {estimate.step:,}" if estimate.step is not None else "this firing"
    figure.suptitle(
        f"Likely {what}, {by} {when}",
        x=0.01,
        y=1 - 10 / height,
        va="top",
        ha="left",
        fontsize=11.5,
        fontweight="bold",
        color=_TEXT if estimate.valid else _BAD,
    )
    return figure


def suspect_label(estimate: InfluenceEstimate, column: int, rank: int) -> str:
    """What stands below a suspect.

    Args:
        estimate: what was measured.
        column: of the sample.
        rank: by plain loss.

    Returns:
        Two lines: number and group; posterior mean loss and rank.
    """
    group = estimate.train_group[column] if estimate.train_group is not None else ""
    first = f"#{int(estimate.train_index[column])}" + (f" “{_short(group, 9)}”" if group else "")
    return f"{first}\n{float(estimate.mean_loss[column]):.2g} (plain rank {rank})"


def suspect_text(sample: Optional[Rendered], index: int) -> str:
    """What stands in the frame of a sample that has no picture, in lines that fit."""
    text = sample.text if sample is not None else f"sample {index}"
    return "\n".join(textwrap.wrap(clean(text), 15, max_lines=6, placeholder="…"))


@lru_cache(maxsize=16)
def _font(size: float) -> ImageFont.FreeTypeFont:
    """The font of the other pictures, which comes with matplotlib. The basic layout: it needs no further library."""
    path = Files(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _fitting(text: str, room: float, size: float) -> ImageFont.FreeTypeFont:
    """The font of that size, or a smaller one, in which a line has the room."""
    width = _font(size).getlength(text)
    return _font(size if width <= room else math.floor(2 * size * room / width) / 2)


def _sheet(
    estimate: InfluenceEstimate, samples: Mapping[int, Rendered], columns: Sequence[int], height: int
) -> npt.NDArray[np.uint8]:
    """All suspects as one picture, ``[height, 1000, 4]``: axes and texts of matplotlib for each cost tenfold."""
    sheet = Image.new("RGBA", (1000, height), "white")
    draw = ImageDraw.Draw(sheet)
    legend = f"given label; {_LEGEND}" if estimate.train_group is not None else _LEGEND
    draw.text((990, 13), legend, _MUTED, _font(11), anchor="ra")
    ranks = estimate.loss_rank()
    for place, j in enumerate(columns):
        left, top = 10 + APART * (place % ACROSS), 42 + 140 * (place // ACROSS)
        index = int(estimate.train_index[j])
        sample = samples.get(index)
        draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline="#cccccc")
        if sample is not None and sample.image is not None:
            picture = _fitted(sample)
            margin = [(SIDE - length) // 2 for length in picture.size]
            sheet.paste(picture, (left + margin[0], top + margin[1]))
        else:
            draw.multiline_text((left + 4, top + 4), suspect_text(sample, index), _TEXT, _font(9), spacing=3)
        label = suspect_label(estimate, j, int(ranks[j]))
        for line, text in enumerate(label.split("\n")):
            font = _fitting(text, APART - 3, 9.5)
            draw.text((left + SIDE / 2, top + SIDE + 5 + 12 * line), text, _TEXT, font, anchor="ma")
    return np.asarray(sheet)


def _fitted(sample: Rendered) -> Image.Image:
    """The sample's picture in the size of its frame."""
    picture = sample.picture().convert("RGB")
    times = (SIDE - 2) / max(picture.size)
    size = (max(1, round(picture.width * times)), max(1, round(picture.height * times)))
    # pixels stay pixels where they are enlarged
    return picture.resize(size, Image.Resampling.NEAREST if times > 1 else Image.Resampling.BOX)


def trajectories_figure(history: Sequence[InfluenceEstimate]) -> Optional[Figure]:
    """Posterior mean loss (left) and self-influence (right) over training, of the samples that changed most.

    Args:
        history: in order of training; only samples that all of them have are followed.

    Returns:
        A figure of 1000 x 450 pixels; None with fewer than two estimates or no common sample.
    """
    found = followed(history)
    if found is None:
        return None
    steps, index, loss, influence = found
    figure = Figure(figsize=(10.0, 4.5), dpi=100, facecolor="white")
    grid = figure.add_gridspec(1, 2, wspace=0.52, left=0.07, right=0.9, bottom=0.13, top=0.86)
    groups = history[-1].train_group
    group_of = dict(zip(history[-1].train_index.tolist(), groups, strict=True)) if groups is not None else {}
    for place, (values, name) in enumerate(((loss, "posterior mean loss"), (influence, "self-influence"))):
        axes = figure.add_subplot(grid[place])
        _style(axes, True)
        lines = [(values[:, k], index[k]) for k in range(len(index))]
        for k, (line, _) in enumerate(lines):
            # more lines than colours: the later ones are dashed
            axes.plot(steps, line, "-o" if k < len(_CHAINS) else "--s", color=_CHAINS[k % len(_CHAINS)], lw=1.3, ms=3.5)
        positive = values[np.isfinite(values) & (values > 0)]
        if positive.size == values.size and positive.max() / positive.min() > 30:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set(xlabel="optimiser step", ylabel=name)
        _label_ends(axes, steps[-1], lines, group_of)
    figure.suptitle(
        f"The {len(index)} samples whose posterior mean loss changed most",
        x=0.07,
        y=0.965,
        ha="left",
        fontsize=12,
        fontweight="bold",
        color=_TEXT,
    )
    return figure


def followed(
    history: Sequence[InfluenceEstimate], k: int = TRAJECTORIES
) -> Optional[tuple[list[int], list[int], npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """The ``k`` samples whose posterior mean loss changed most.

    Returns:
        Steps, indices of the samples (largest change first), and ``[steps, samples]`` posterior mean loss and
        self-influence; None with fewer than two estimates or without a sample that all of them have.
    """
    known = [e for e in history if len(e.train_index)]
    if len(known) < 2:
        return None
    common = sorted(set.intersection(*(set(e.train_index.tolist()) for e in known)))
    if not common:
        return None
    loss, influence = np.empty((len(known), len(common))), np.empty((len(known), len(common)))
    for row, e in enumerate(known):
        place = {int(i): j for j, i in enumerate(e.train_index.tolist())}
        columns = [place[i] for i in common]
        loss[row] = e.mean_loss[columns].numpy(force=True)
        influence[row] = e.self_influence[columns].numpy(force=True)
    change = loss.max(axis=0) - loss.min(axis=0)
    chosen = np.argsort(-change, kind="stable")[:k]
    steps = [e.step if e.step is not None else i for i, e in enumerate(known)]
    return steps, [common[j] for j in chosen], loss[:, chosen], influence[:, chosen]


def _label_ends(axes: Axes, x: float, lines: Sequence[tuple[Any, int]], group_of: Mapping[int, str]) -> None:
    """The sample's number at the end of its line, pushed apart where they would lie on each other."""
    axes.margins(x=0.03)
    axes.get_xlim(), axes.get_ylim()  # the limits are only known once they have been asked for
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted((float(to_axes.transform((x, line[-1]))[1]), k) for k, (line, _) in enumerate(lines))
    for height, (_, k) in zip(spread([wanted for wanted, _ in ends]), ends, strict=True):
        index = lines[k][1]
        group = group_of.get(index, "")
        text = f"#{index}" + (f" “{_short(group, 8)}”" if group else "")
        style: dict[str, Any] = {"color": _CHAINS[k % len(_CHAINS)], "fontsize": 7, "va": "center", "clip_on": False}
        axes.text(1.01, height, text, transform=axes.transAxes, parse_math=False, **style)


def spread(heights: Sequence[float], gap: float = 0.036, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Heights in ascending order moved apart by as little as possible, and kept within the frame.

    Example:
        >>> [round(h, 2) for h in spread([0.1, 0.5, 0.5, 0.5], gap=0.1)]
        [0.1, 0.4, 0.5, 0.6]
    """
    # neighbours that would lie on each other become a block around their mean: least squares under the gaps
    blocks: list[tuple[float, int]] = []
    for k, height in enumerate(heights):
        mean, count = height - k * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, many = blocks.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        blocks.append((mean, count))
    last = len(heights) - 1
    bounded = [min(max(mean, low), max(high - last * gap, low)) for mean, count in blocks for _ in range(count)]
    return [mean + k * gap for k, mean in enumerate(bounded)]
