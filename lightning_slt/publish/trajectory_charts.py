"""The picture of samples over training: those whose posterior mean loss changes most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.publish.charts import _CHAINS, _TEXT, _style
from lightning_slt.publish.render import short

TRAJECTORIES = 10


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
        text = f"#{index}" + (f" “{short(group, 8)}”" if group else "")
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


__all__ = ["followed", "spread", "trajectories_figure"]
