"""Estimates as plain rows, in the text forms that loggers without a table type can show."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

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
    "virial",
    "seconds",
    "overhead_frac",
)
CHAIN_COLUMNS: tuple[str, ...] = ("chain", "draw", "llc")
MAX_CHAIN_ROWS = 2000  # a wandb table of 2,000 rows costs about 0.1 s; beyond 10,000 it is cut without a word


def _plain(value: Any) -> Any:
    """None for what is not finite: neither JSON nor a typed wandb column holds NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def history_row(estimate: Estimate) -> list[Any]:
    """One estimate in the order of :data:`HISTORY_COLUMNS`; unknown or non-finite values are None."""
    e = estimate
    row = [e.step, e.x, e.epoch, e.mean, e.se, e.rhat, e.ess, e.valid, "; ".join(e.reasons), e.num_bad_chains]
    row += [e.init_loss, e.chain_loss, e.nbeta, e.localization, e.step_size, e.step_bias, e.virial]
    row += [e.seconds, e.overhead]
    return [_plain(value) for value in row]


def chain_rows(estimate: Estimate, limit: int = MAX_CHAIN_ROWS) -> list[list[Any]]:
    """The trace in long form, every ``k``-th draw of every chain, with the smallest ``k`` that keeps to ``limit`` rows.

    Returns:
        ``[chain, draw, llc]`` rows, at most ``limit``, in the order of :data:`CHAIN_COLUMNS`.
    """
    num_chains, num_draws = estimate.trace.shape
    every = max(1, -(-num_draws // max(1, limit // max(1, num_chains))))
    values = estimate.trace[:, ::every].tolist()
    rows = [[c, t * every, _plain(value)] for c, chain in enumerate(values) for t, value in enumerate(chain)]
    return rows[:limit]


def history_csv(estimates: Sequence[Estimate], header: bool = True) -> str:
    """The history as CSV text; None becomes an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if header:
        writer.writerow(HISTORY_COLUMNS)
    writer.writerows(history_row(e) for e in estimates)
    return out.getvalue()


def history_markdown(estimates: Sequence[Estimate]) -> str:
    """The history as a Markdown table, numbers to four significant digits."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        # a bar or a line break in a reason would end the cell
        return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")

    lines = ["| " + " | ".join(HISTORY_COLUMNS) + " |", "|" + " --- |" * len(HISTORY_COLUMNS)]
    lines += ["| " + " | ".join(cell(v) for v in history_row(e)) + " |" for e in estimates]
    return "\n".join(lines)
