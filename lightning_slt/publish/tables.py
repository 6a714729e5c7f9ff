"""Estimates as plain rows, and rows in the text forms that loggers without a table type can show."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from lightning_slt.record import Estimate

HISTORY_COLUMNS: tuple[str, ...] = (
    "step",
    "x",
    "epoch",
    "llc",
    "se",
    "rhat",
    "ess",
    "valid",
    "reasons",
    "n_bad_chains",
    "loss",
    "chain_loss",
    "nbeta",
    "localization",
    "step_size",
    "step_bias",
    "owed",
    "lean",
    "unsure_heat",
    "slope",
    "virial",
    "seconds",
    "overhead_frac",
)
CHAIN_COLUMNS: tuple[str, ...] = ("chain", "draw", "llc")
_BREAK = re.compile(r"[\r\n]+")
MAX_CHAIN_ROWS = 2000  # a wandb table of 2,000 rows costs about 0.1 s
MAX_WANDB_ROWS = 10_000
"""Rows of a table of wandb: of one with more the last ones are cut off without a word."""

T = TypeVar("T")


def plain(value: Any) -> Any:
    """None for what is not finite: neither JSON nor a typed wandb column holds NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_of(estimate: Estimate, index: int) -> int:
    """Where an estimate stands on the axis of steps: its step, else its x, else its number."""
    if estimate.step is not None:
        return estimate.step
    return estimate.x if estimate.x is not None else index


def are_log_spaced(steps: Iterable[float]) -> bool:
    """Whether an axis of these should be logarithmic: they span more than a factor of 100, and are spaced that way.

    Every 100 steps up to 20,000 spans a factor of 200 too, and is linear.

    Example:
        >>> are_log_spaced([0, 1, 10, 100, 1000]), are_log_spaced(range(100, 20_001, 100))
        (True, False)
    """
    positive = sorted({step for step in steps if step > 0})
    if len(positive) < 3 or positive[-1] / positive[0] <= 100:
        return False
    gaps = [b - a for a, b in pairwise(positive)]
    return max(gaps) > 10 * min(gaps)


def thinned(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly spaced, the first and the last among them.

    Example:
        >>> thinned(range(10), 4)
        [0, 3, 6, 9]
    """
    if len(items) <= most or most < 2:
        return list(items) if len(items) <= most else list(items[-1:])
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def history_row(estimate: Estimate) -> list[Any]:
    """One estimate in the order of :data:`HISTORY_COLUMNS`; unknown or non-finite values are None."""
    e = estimate
    row = [e.step, e.x, e.epoch, e.mean, e.se, e.rhat, e.ess, e.valid, "; ".join(e.reasons), e.num_bad_chains]
    row += [e.init_loss, e.chain_loss, e.nbeta, e.localization, e.step_size, e.step_bias]
    row += [e.owed, e.lean, e.unsure_heat, e.slope, e.virial, e.seconds, e.overhead]
    return [plain(value) for value in row]


def chain_rows(estimate: Estimate, limit: int = MAX_CHAIN_ROWS) -> list[list[Any]]:
    """The trace in long form, every ``k``-th draw of every chain, with the smallest ``k`` that keeps to ``limit`` rows.

    Returns:
        ``[chain, draw, llc]`` rows, at most ``limit``, in the order of :data:`CHAIN_COLUMNS`.
    """
    num_chains, num_draws = estimate.trace.shape
    every = max(1, -(-num_draws // max(1, limit // max(1, num_chains))))
    values = estimate.trace[:, ::every].tolist()
    rows = [[c, t * every, plain(value)] for c, chain in enumerate(values) for t, value in enumerate(chain)]
    return rows[:limit]


def to_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]], header: bool = True) -> str:
    """CSV text; None becomes an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if header:
        writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()


def to_markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, numbers to four significant digits, steps and other large ones to the last before the point."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
        # a bar or a line break would end the cell, and a backslash in front of a bar free it
        text = "" if value is None else str(value).replace("\\", "\\\\").replace("|", "\\|")
        return _BREAK.sub(" ", text)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell(v) for v in row) + " |" for row in rows])


def history_csv(estimates: Sequence[Estimate], header: bool = True) -> str:
    """The history as CSV text."""
    return to_csv(HISTORY_COLUMNS, [history_row(e) for e in estimates], header)


def history_markdown(estimates: Sequence[Estimate]) -> str:
    """The history as a Markdown table."""
    return to_markdown(HISTORY_COLUMNS, [history_row(e) for e in estimates])
