"""Pictures of influence: between groups, of single samples, of the suspects, and over training."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from lightning_slt.influence_record import MIN_Z, InfluenceEstimate
from lightning_slt.publish.charts import _BAD, _CHAINS, _GOOD, _MUTED, _TEXT, _style
from lightning_slt.publish.render import Rendered, clean

MAX_NUMBERED = 12
"""Groups up to which the cells of the heat map carry their numbers."""
TRAJECTORIES = 10


def influence_figure(estimate: InfluenceEstimate) -> Figure:
    """Influence between groups (left) and self-influence (right).

    Rows are groups of queries, columns groups of training samples; cells within 3 standard errors of zero are hatched.
    Without groups the left side shows posterior mean loss against plain loss.
    An estimate that is not valid has a red title with the reasons.

    Returns:
        A figure of 1000 x 450 pixels.
    """
    figure = Figure(figsize=(10.0, 4.5), dpi=100, facecolor="white")
    # names that are turned need room below
    bottom = 0.25 if _are_long(estimate.groups) else 0.14
    grid = figure.add_gridspec(
        1, 2, width_ratios=(1.15, 1.0), wspace=0.3, left=0.07, right=0.98, bottom=bottom, top=0.8
    )
    left, right = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    if not len(estimate.train_index):
        left.set_axis_off()
        right.set_axis_off()
    else:
        if estimate.group_matrix is not None and estimate.group_se is not None:
            _heat_map(figure, left, estimate)
        else:
            _losses(left, estimate)
        _self_influence(right, estimate)
    where = f"step {estimate.step:,}    " if estimate.step is not None else ""
    title = f"{where}Influence of {len(estimate.train_index)} training samples on {len(estimate.query_index)} queries"
    colour = _TEXT if estimate.valid else _BAD
    figure.suptitle(title, x=0.07, y=0.965, ha="left", fontsize=12.5, fontweight="bold", color=colour)
    if estimate.valid:
        said = f"{estimate.num_chains} chains of {estimate.num_draws} readings"
        if math.isfinite(estimate.passing):
            said += f"; {estimate.passing:.1%} of single pairs are above {MIN_Z:g} standard errors"
            said += f" ({estimate.chance:.1%} by chance)"
    else:
        said = "NOT VALID: " + ("; ".join(estimate.reasons) or "no reason given")
    lines = textwrap.wrap(clean(said), 140, max_lines=2, placeholder=" …")
    colour = _MUTED if estimate.valid else _BAD
    figure.text(0.07, 0.9, "\n".join(lines), ha="left", va="top", fontsize=9.5, color=colour, parse_math=False)
    return figure


def _heat_map(figure: Figure, axes: Axes, estimate: InfluenceEstimate) -> None:
    assert estimate.group_matrix is not None and estimate.group_se is not None
    matrix = estimate.group_matrix.numpy(force=True)
    error = estimate.group_se.numpy(force=True)
    names, n = estimate.groups, len(estimate.groups)
    most = float(np.nanmax(np.abs(matrix))) if np.isfinite(matrix).any() else 1.0
    norm = TwoSlopeNorm(0.0, -(most or 1.0), most or 1.0)
    image = axes.imshow(matrix, cmap="RdBu", norm=norm, aspect="equal")
    scale = 10.0 ** math.floor(math.log10(most)) if most > 0 else 1.0
    for row in range(n):
        for column in range(n):
            value = matrix[row, column]
            if not math.isfinite(value):
                continue
            unclear = not abs(value) > MIN_Z * error[row, column]
            if unclear:
                corner = (column - 0.5, row - 0.5)
                axes.add_patch(_hatched(corner))
            if n <= MAX_NUMBERED:
                colour = _MUTED if unclear else "white" if abs(value) > 0.6 * most else _TEXT
                text = f"{value / scale:.1f}".replace("-0.0", "0.0")
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    short = [_short(name, 12) for name in names]
    every = max(1, n // 20)
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if _are_long(names) else {}
    axes.set_xticks(range(0, n, every), short[::every], fontsize=8, parse_math=False, **turned)
    axes.set_yticks(range(0, n, every), short[::every], fontsize=8, parse_math=False)
    axes.set_xlabel("group of training samples", color=_TEXT)
    axes.set_ylabel("group of queries", color=_TEXT)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=8)
    unit = f", cells in units of {scale:g}" if n <= MAX_NUMBERED and scale != 1 else ""
    axes.set_title(f"> 0 helps; hatched: within {MIN_Z:g} errors of 0{unit}", fontsize=9, color=_MUTED)


def _hatched(corner: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, facecolor="none", edgecolor="#d4d4d4", hatch="///", lw=0)


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
    axes.plot(x[suspects], y[suspects], "o", color=_BAD, mfc="none", ms=6, label="20 suspects")
    if (x > 0).all() and x.max() / max(x.min(), 1e-300) > 100:
        axes.set_xscale("log")
    axes.set(xlabel="loss at the weights", ylabel="posterior mean loss")
    axes.legend(fontsize=8.5, frameon=False)


def _self_influence(axes: Axes, estimate: InfluenceEstimate) -> None:
    _style(axes, estimate.valid)
    values = estimate.self_influence.numpy(force=True)
    positive = values[np.isfinite(values) & (values > 0)]
    axes.set(xlabel="self-influence (variance of a sample's loss)", ylabel="training samples")
    if not positive.size:
        return
    low, high = float(positive.min()), float(positive.max())
    if high > low:
        # twelve decades at the most: a sample that hardly moves must not squeeze the others into one bar
        bins = np.geomspace(max(low, high * 1e-12), high * 1.0001, 40)
        axes.hist(np.clip(positive, bins[0], None), bins=bins.tolist(), color=_GOOD, alpha=0.8)
        axes.set_xscale("log")
        axes.minorticks_off()  # they take as long to draw as the bars
    else:
        axes.hist(positive, bins=3, color=_GOOD, alpha=0.8)
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
    across = 10
    down = -(-len(columns) // across)
    height = 0.5 + 1.4 * down
    figure = Figure(figsize=(10.0, height), dpi=100, facecolor="white")
    grid = figure.add_gridspec(
        down, across, left=0.01, right=0.99, top=1 - 0.42 / height, bottom=0.42 / height, hspace=0.46, wspace=0.12
    )
    ranks = estimate.loss_rank()
    for place, j in enumerate(columns):
        axes = figure.add_subplot(grid[place // across, place % across])
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#cccccc")
        index = int(estimate.train_index[j])
        _show(axes, samples.get(index), index)
        group = estimate.train_group[j] if estimate.train_group is not None else ""
        label = f"#{index}" + (f" “{_short(group, 9)}”" if group else "")
        under = f"{label}\n{float(estimate.mean_loss[j]):.2g} (plain rank {int(ranks[j])})"
        axes.set_xlabel(under, fontsize=6.8, color=_TEXT, labelpad=3, parse_math=False)
    where = f"step {estimate.step:,}: " if estimate.step is not None else ""
    figure.suptitle(
        f"{where}largest posterior mean losses: likely mislabels and outliers",
        x=0.01,
        y=1 - 0.1 / height,
        va="top",
        ha="left",
        fontsize=11.5,
        fontweight="bold",
        color=_TEXT if estimate.valid else _BAD,
    )
    legend = {"va": "top", "ha": "right", "fontsize": 8, "color": _MUTED}
    figure.text(0.99, 1 - 0.13 / height, "“group”, posterior mean loss", **legend)  # type: ignore[arg-type]
    return figure


def _show(axes: Axes, sample: Optional[Rendered], index: int) -> None:
    if sample is not None and sample.image is not None:
        # the bytes as they are: stretched anew, a picture of one value would be black
        axes.imshow(sample.image, cmap="gray" if sample.image.ndim == 2 else None, aspect="equal", vmin=0, vmax=255)
        return
    text = sample.text if sample is not None else f"sample {index}"
    lines = textwrap.wrap(clean(text), 15, max_lines=6, placeholder="…")
    text = "\n".join(lines)
    axes.text(0.05, 0.95, text, transform=axes.transAxes, va="top", fontsize=6.3, color=_TEXT, parse_math=False)


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
    grid = figure.add_gridspec(1, 2, wspace=0.36, left=0.07, right=0.9, bottom=0.13, top=0.86)
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
