"""The picture of internal model selection: the free energies of the two phases of a transition, over n."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
from matplotlib.figure import Figure

from lightning_slt.publish.charts import _BAD, _GOOD, _MUTED, _SIZE, _TEXT, _style
from lightning_slt.transition_record import TransitionReport, Verdict, size_text
from lightning_slt.transitions import Phase


def free_energy_figure(report: TransitionReport) -> Optional[Figure]:
    """Two lines over n (logarithmic) that cross at the critical n, its 95 % interval shaded.

    Drawn is ``F(n) = n beta (L - L_low) + lambda log(n beta)`` of each phase, ``L_low`` the lower of the two losses:
    what both have in common is left out. Left the posterior that the chains sample, right the one at inverse
    temperature 1. The dotted rule is the number of samples of this run.

    Returns:
        A figure of 1000 x 450 pixels; None where a phase is not known.
    """
    verdicts = [
        (v, title) for v, title in ((report.tempered, "sampled posterior"), (report.untempered, "beta = 1")) if v
    ]
    before, after = report.before, report.after
    if not verdicts or before is None or after is None or report.num_samples is None:
        return None
    figure = Figure(figsize=_SIZE, dpi=100, facecolor="white")
    grid = figure.add_gridspec(1, len(verdicts), wspace=0.22, left=0.085, right=0.985, bottom=0.13, top=0.78)
    for place, (verdict, title) in enumerate(verdicts):
        axes = figure.add_subplot(grid[place])
        _style(axes, True)
        n = free_energy_range(verdict, report.num_samples)
        low = min(before.loss, after.loss)
        for phase, name, colour in ((before, "before", _MUTED), (after, "after", _GOOD)):
            axes.plot(n, free_energy_line(phase, n, verdict.beta, low), color=colour, lw=2, label=f"phase {name}")
        axes.set_xscale("log")
        axes.set_xlim(n[0], n[-1])
        axes.axvline(report.num_samples, color=_TEXT, ls=":", lw=1.3, label=f"n = {report.num_samples:,}")
        if verdict.critical_n is not None:
            high = verdict.critical_n_high if verdict.critical_n_high is not None else n[-1]
            axes.axvspan(max(verdict.critical_n_low or n[0], n[0]), min(high, n[-1]), color=_BAD, alpha=0.1, lw=0)
            axes.axvline(verdict.critical_n, color=_BAD, lw=1.3, label=f"critical n = {size_text(verdict.critical_n)}")
            crossing = np.array([verdict.critical_n])
            top = float(free_energy_line(before, crossing, verdict.beta, low)[0])
            if top > 0:
                axes.set_ylim(0, 3 * top)
        axes.set(xlabel="samples n", ylabel="free energy, common part left out" if place == 0 else "")
        axes.legend(loc="upper left", fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none")
        odds = f"log-odds of the new phase {verdict.log_odds:+.3g} ± {verdict.log_odds_se:.2g}"
        axes.set_title(f"{title}: {_said(verdict)}\n{odds}", loc="left", fontsize=9.5, color=_TEXT)
    t = report.transition
    figure.suptitle(
        f"Free energy of the two phases: transition {t.id} around step {t.step:,.0f} (kind {t.kind}, {t.state})",
        x=0.085, y=0.965, ha="left", fontsize=12, fontweight="bold", color=_TEXT,
    )  # fmt: skip
    return figure


def _said(verdict: Verdict) -> str:
    return "undecided" if verdict.preferred == "undecided" else f"prefers the phase {verdict.preferred}"


def free_energy_range(verdict: Verdict, num_samples: int) -> np.ndarray:
    """From a tenth of the smallest number of samples that matters to ten times the largest."""
    places = [float(num_samples)]
    # a critical n many orders of magnitude away would leave nothing of the present to be seen
    if verdict.critical_n is not None and abs(math.log10(verdict.critical_n / num_samples)) < 6:
        places.append(verdict.critical_n)
    first = max(min(places) / 10, 1.01 * math.e / verdict.beta)
    return np.geomspace(first, max(10 * max(places), 10 * first), 200)


def free_energy_line(phase: Phase, n: np.ndarray, beta: float, low: float) -> np.ndarray:
    size = n * beta
    return size * (phase.loss - low) + phase.llc * np.log(size)


__all__ = ["free_energy_figure", "free_energy_line", "free_energy_range"]
