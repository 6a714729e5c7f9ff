"""What the two examples with known boundaries share: what was found, beside what is known, as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: a figure of our own needs no window and no backend
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from lightning_slt import Estimate
from lightning_slt.transitions import Transition, detect_transitions

REACH = 3
"""Firings by which a found time may lie outside the known stretch and still count for it."""
LLC, LOSS, KNOWN, FOUND, DOUBT = "#1f5fa8", "#555555", "#222222", "#d35400", "#c62828"


@dataclass(frozen=True)
class Known:
    """A boundary that the weights themselves show: no estimate went into it."""

    label: str
    onset: float
    step: float
    end: float
    predicted: Optional[float] = None
    """By theory, from the initial weights alone; None where there is no formula."""


def refined(estimates: Sequence[Estimate]) -> list[Transition]:
    """The transitions of the whole curve, found afterwards; saddles are a part of it (``Estimate.comparable``)."""
    points = [(float(e.step or 0), e.mean, e.chain_se, e.init_loss, e.comparable) for e in estimates]
    return detect_transitions(*zip(*points, strict=True)) if points else []


def match(known: Sequence[Known], found: Sequence[Transition], cadence: float) -> list[Optional[Transition]]:
    """For each known boundary the nearest found one, None where none lies within its stretch and ``REACH`` firings.

    Each found transition is given away once, to the pair that is closest first; flags that were retracted come last.
    """
    reach = REACH * cadence
    pairs = [
        (t.state == "retracted", abs(t.step - k.step), i, j)
        for i, k in enumerate(known)
        for j, t in enumerate(found)
        if k.onset - reach <= t.step <= k.end + reach
    ]
    matched: list[Optional[Transition]] = [None] * len(known)
    taken: set[int] = set()
    for _, _, i, j in sorted(pairs):
        if matched[i] is None and j not in taken:
            matched[i] = found[j]
            taken.add(j)
    return matched


def table(known: Sequence[Known], online: Sequence[Transition], offline: Sequence[Transition], cadence: float) -> str:
    """Known times beside found ones, then what was found and is not known; steps of training throughout."""
    theory = any(k.predicted is not None for k in known)
    width = max([len(k.label) for k in known] + [8])
    head = f"  {'boundary':<{width}}  {'known (10 % to 90 %)':<22}"
    head += f"{'theory':>8}" if theory else ""
    rows = [head + f"  {'online, flagged at':<28}{'afterwards':<28}"]
    live, after = match(known, online, cadence), match(known, offline, cadence)
    for k, t, u in zip(known, live, after, strict=True):
        row = f"  {k.label:<{width}}  {f'{k.step:.0f} ({k.onset:.0f} to {k.end:.0f})':<22}"
        if theory:
            row += f"{'' if k.predicted is None else f'{k.predicted:.0f}':>8}"
        seen = f"{t.step:.0f} {t.kind} {t.state}, {t.known_at:.0f}" if t else "not found"
        rows.append(row + f"  {seen:<28}{offset(k, u, cadence):<28}")
    for name, found, matched in (("online", online, live), ("afterwards", offline, after)):
        kept = {id(t) for t in matched}
        for t in found:
            if id(t) not in kept:
                state = f", {t.state}" if name == "online" else ""
                rows.append(f"  found {name} at {t.step:.0f} ({t.kind}{state}): none of the known ones")
    return "\n".join(row.rstrip() for row in rows)


def offset(known: Known, found: Optional[Transition], cadence: float) -> str:
    """A found time and how far it is from the known one."""
    if found is None:
        return "not found"
    return f"{found.step:.0f} {found.kind} ({(found.step - known.step) / cadence:+.1f} firings)"


def count(known: Sequence[Known], online: Sequence[Transition], offline: Sequence[Transition], cadence: float) -> str:
    """The table in a sentence; a flag that was retracted finds nothing, and is counted apart."""
    texts = []
    for name, found in (("online", online), ("afterwards", offline)):
        standing = [t for t in found if t.state != "retracted"]
        hits = sum(t is not None for t in match(known, standing, cadence))
        extra, retracted = len(standing) - hits, len(found) - len(standing)
        text = f"{name} {hits} of {len(known)} known boundaries found, {extra} other{'s' if extra != 1 else ''}"
        texts.append(text + (f", {retracted} retracted" if retracted else ""))
    return "; ".join(texts) + "."


def draw(
    title: str,
    known: Sequence[Known],
    online: Sequence[Transition],
    offline: Sequence[Transition],
    estimates: Sequence[Estimate],
    path: Union[str, Path],
    *,
    linear: Optional[float] = None,
    row: int = 0,
) -> tuple[Figure, list[Axes]]:
    """The learning coefficient above the loss, solid rules at the known times, dashed ones at those found.

    Args:
        title: above the picture.
        known: solid rules, the stretch from 10 % to 90 % shaded.
        online: a triangle at the step at which each was flagged; hollow where it was retracted.
        offline: dashed rules.
        estimates: the two curves.
        path: where the picture is saved, unless there is a ``row``: then the caller does, once that is filled.
        linear: the LLC axis is logarithmic beyond this value, on both sides; None for a linear one.
        row: axes in a row below, for the caller to fill; they are returned.
    """
    height = 6.6 + (1.6 if row else 0.0)
    figure = Figure(figsize=(11, height), dpi=100, layout="constrained")
    figure.suptitle(title, fontweight="bold")
    grid = figure.add_gridspec(3 if row else 2, 1, height_ratios=[2.3, 1.0, 1.1] if row else [2.3, 1.0])
    top = figure.add_subplot(grid[0])
    bottom = figure.add_subplot(grid[1], sharex=top)
    steps = [float(e.step or 0) for e in estimates]
    good = [e.valid for e in estimates]

    band = ([e.interval[0] for e in estimates], [e.interval[1] for e in estimates])
    top.fill_between(steps, *band, color=LLC, alpha=0.2, lw=0, label="± 1.96 se")
    top.plot(steps, [e.mean for e in estimates], color=LLC, lw=1.6, label="LLC")
    for state, label, face in ((True, "valid", LLC), (False, "not valid (at a saddle, or not mixed)", "white")):
        points = [(s, e.mean) for s, e, g in zip(steps, estimates, good, strict=True) if g == state]
        if points:
            colour = LLC if state else DOUBT
            top.plot(*zip(*points, strict=True), "o", color=colour, mfc=face, ms=4, mew=1.1, label=label)
    if linear is not None:
        ticks = [-100 * linear, -10 * linear, -linear, -linear / 2, 0.0, linear / 2, linear, 10 * linear, 100 * linear]
        top.set_yscale("symlog", linthresh=linear, linscale=1.5)
        low, high = top.get_ylim()
        top.set_yticks([t for t in ticks if low <= t <= high])
        top.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        top.minorticks_off()
        top.set_ylabel(f"learning coefficient (LLC)\nlinear within ±{linear:g}, logarithmic beyond")
    else:
        top.set_ylabel("learning coefficient (LLC)")
    top.axhline(0, color="#999999", lw=0.8)
    bottom.plot(steps, [e.init_loss for e in estimates], color=LOSS, lw=1.8)
    # a late boundary moves the loss by little of what the first one did
    bottom.set(xlabel="training step", ylabel="training loss", yscale="log")
    bottom.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bottom.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    bottom.yaxis.set_minor_formatter(NullFormatter())

    for axes in (top, bottom):
        for k in known:
            axes.axvspan(k.onset, k.end, color="#000000", alpha=0.05, lw=0)
            axes.axvline(k.step, color=KNOWN, lw=1.4)
        for t in offline:
            axes.axvline(t.step, color=FOUND, lw=1.6, ls=(0, (5, 3)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4", lw=0.6)
        axes.set_axisbelow(True)
    span = (max(steps) - min(steps)) or 1.0
    place(top, [(k.step, f"{k.label}\nknown {k.step:.0f}") for k in known], span, KNOWN, above=True)
    place(bottom, [(t.step, f"found {t.step:.0f} ({t.kind})") for t in offline], span, FOUND, above=False)
    for t in online:
        face = "white" if t.state == "retracted" else FOUND
        top.plot([t.known_at], [0.03], "^", color=FOUND, mfc=face, ms=9, transform=top.get_xaxis_transform())
    handles, labels = top.get_legend_handles_labels()
    handles += top.plot([], [], color=KNOWN, lw=1.4) + top.plot([], [], color=FOUND, lw=1.6, ls="--")
    labels += ["known, from the weights", "found afterwards"]
    for state, face in (("", FOUND), (", then retracted", "white")):
        if any((t.state == "retracted") == bool(state) for t in online):
            handles += top.plot([], [], "^", color=FOUND, mfc=face, ms=8)
            labels.append("flagged online" + state)
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=4)
    rest: list[Axes] = []
    if row:
        inner = grid[2].subgridspec(1, row)
        rest = [figure.add_subplot(inner[i]) for i in range(row)]
    else:
        figure.savefig(path)
    return figure, rest


def place(axes: Axes, labels: Sequence[tuple[float, str]], span: float, colour: str, above: bool) -> None:
    """Labels at their rules, raised where the one before is so near that they would touch."""
    last, level = -math.inf, 0
    for x, text in sorted(labels):
        level = (level + 1) % 3 if x - last < 0.1 * span else 0
        last = x
        if above:
            axes.annotate(
                text, (x, 1.0), (0, 3 + 27 * level), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", va="bottom", fontsize=9, color=colour,
            )  # fmt: skip
        else:
            behind = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1}
            axes.annotate(
                text, (x, 0.95), (4, -13 * level), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="left", va="top", fontsize=9, color=colour, bbox=behind,
            )  # fmt: skip
