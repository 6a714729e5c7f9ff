"""The picture of the suspects: the samples that are likely mislabelled, each in a frame."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path as Files
from typing import Optional

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.publish.charts import _BAD, _MUTED, _TEXT
from lightning_slt.publish.render import Rendered, clean, short

ACROSS, SIDE, APART = 10, 89, 99
"""Suspects in a row, the side of the frame of each in pixels, and how far it is from one to the next."""
_LEGEND = "mean loss now; rank by plain loss"


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
    first = f"#{int(estimate.train_index[column])}" + (f" “{short(group, 9)}”" if group else "")
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


__all__ = ["SIDE", "suspect_label", "suspect_text", "suspects_figure"]
