"""What changed at a transition: the phases on its two sides, and the samples and components that moved.

All from what monitors have measured; nothing here knows a trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Optional

import numpy as np
import numpy.typing as npt
import torch

from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.record import Estimate
from lightning_slt.transition_record import MovedComponent, MovedSample, TransitionReport, Verdict
from lightning_slt.transitions import Phase, Transition

REACH = 8
"""Points of a plateau, those next to the transition, that a phase is read from."""

Array = npt.NDArray[np.float64]
Sides = tuple[list[Estimate], list[Estimate]]


def usable(estimate: Estimate) -> bool:
    """Whether a point may speak for a phase."""
    return estimate.valid and math.isfinite(estimate.mean) and math.isfinite(estimate.init_loss)


def sides(
    transition: Transition,
    estimates: Sequence[Estimate],
    others: Sequence[Transition] = (),
    counts: Callable[[Estimate], bool] = usable,
) -> Sides:
    """The points on the plateaus next to a transition that count, at most :data:`REACH` on each side.

    A plateau ends where another transition begins; retracted ones end nothing.
    """
    first, last = _neighbours(transition, others)
    points = [(float(e.step or 0), e) for e in estimates if counts(e)]
    left = [e for step, e in points if first <= step <= transition.onset]
    right = [e for step, e in points if transition.end <= step <= last]
    return left[-REACH:], right[:REACH]


def _neighbours(transition: Transition, others: Sequence[Transition]) -> tuple[float, float]:
    """Where the transition before this one ends, and where the next begins; infinite where there is none."""
    standing = [t for t in others if t.id != transition.id and t.state != "retracted"]
    first = max((t.end for t in standing if t.end <= transition.onset), default=-math.inf)
    return first, min((t.onset for t in standing if t.onset >= transition.end), default=math.inf)


def _comparable(estimate: Estimate) -> bool:
    return estimate.comparable


def phase_of(points: Sequence[Estimate]) -> Optional[Phase]:
    """Mean loss and mean LLC of a plateau, None below two points.

    The error of the loss is that of a mean of points. Firings share their seeds, so that the error of one chain run is
    common to all of them: the LLC's error keeps the whole chain error beside the scatter of the mean.
    """
    if len(points) < 2:
        return None
    llc = np.array([e.mean for e in points], dtype=np.float64)
    loss = np.array([e.init_loss for e in points], dtype=np.float64)
    errors = np.array([e.se for e in points], dtype=np.float64)
    chain = float(np.median(errors[np.isfinite(errors)])) if np.isfinite(errors).any() else 0.0
    return Phase(
        loss=float(loss.mean()),
        loss_se=float(loss.std(ddof=1) / math.sqrt(len(loss))),
        llc=float(llc.mean()),
        llc_se=math.hypot(float(llc.std(ddof=1) / math.sqrt(len(llc))), chain),
    )


def verdict_of(report: TransitionReport, beta: float) -> Optional[Verdict]:
    """Which phase the posterior at ``beta`` prefers at the report's n; None where that cannot be said.

    A phase of negative LLC is none: its weights are at no minimum, and the number measures no complexity.
    """
    compared = report.compared(beta)
    if (
        compared is None
        or min(compared.first.llc, compared.second.llc) < 0
        or report.num_samples is None
        or report.num_samples * beta <= math.e
    ):
        return None
    preference = compared.preferred(report.num_samples)
    low, high = compared.critical_n_interval or (None, None)
    return Verdict(
        beta=beta,
        preferred={"first": "after", "second": "before"}.get(preference.phase, "undecided"),
        log_odds=preference.log_odds,
        log_odds_se=preference.log_odds_se,
        critical_n=compared.critical_n,
        critical_n_low=low,
        critical_n_high=high if high is not None and math.isfinite(high) else None,
    )


def with_phases(
    report: TransitionReport, estimates: Sequence[Estimate], others: Sequence[Transition] = ()
) -> TransitionReport:
    """The report with the phases on its two sides and what the posteriors prefer."""
    left, right = sides(report.transition, estimates, others)
    before, after = phase_of(left), phase_of(right)
    points = right or left
    newest = points[-1] if points else None
    n = newest.num_samples if newest is not None else None
    report = report.replace(before=before, after=after, num_samples=n, tempered=None, untempered=None)
    if newest is None or n is None:
        return report
    return report.replace(tempered=verdict_of(report, newest.nbeta / n), untempered=verdict_of(report, 1.0))


def moved_samples(
    transition: Transition,
    influences: Sequence[InfluenceEstimate],
    k: int = 10,
    others: Sequence[Transition] = (),
) -> tuple[MovedSample, ...]:
    """The samples whose posterior mean loss or self-influence moved most across a transition.

    Compared are the last estimate at or before the onset and the first at or after the end (else the last after the
    onset), between the neighbours among ``others``: nothing is said where a side has none. The two changes are put on
    one scale by the median size of each, and a sample counts by its larger one.
    """
    first, last = _neighbours(transition, others)
    good = [(float(e.step), e) for e in influences if e.valid and e.step is not None and len(e.train_index)]
    before = [e for step, e in good if first <= step <= transition.onset]
    behind = [e for step, e in good if transition.onset < step <= last]
    after = [e for e in behind if float(e.step or 0) >= transition.end]
    if not before or not behind:
        return ()
    old, new = before[-1], (after[0] if after else behind[-1])
    place = {int(index): j for j, index in enumerate(new.train_index.tolist())}
    pairs = [(i, place[int(index)]) for i, index in enumerate(old.train_index.tolist()) if int(index) in place]
    if not pairs:
        return ()
    i, j = (torch.tensor(column, device="cpu") for column in zip(*pairs, strict=True))
    loss = (new.mean_loss[j] - old.mean_loss[i]).double()
    loss_se = torch.hypot(new.mean_loss_se[j].double(), old.mean_loss_se[i].double())
    own = (new.self_influence[j] - old.self_influence[i]).double()
    own_se = torch.hypot(new.self_influence_se[j].double(), old.self_influence_se[i].double())
    score = torch.maximum(_in_medians(loss), _in_medians(own))
    return tuple(
        MovedSample(
            index=int(old.train_index[i[place]]),
            group=old.train_group[int(i[place])] if old.train_group is not None else "",
            mean_loss_change=float(loss[place]),
            mean_loss_change_se=float(loss_se[place]),
            self_influence_change=float(own[place]),
            self_influence_change_se=float(own_se[place]),
        )
        for place in score.argsort(descending=True, stable=True)[:k].tolist()
    )


def _in_medians(change: torch.Tensor) -> torch.Tensor:
    size = change.abs().nan_to_num(nan=0.0)
    return size / size.median().clamp_min(torch.finfo(size.dtype).tiny)


def moved_components(
    transition: Transition, curves: Mapping[str, Sequence[Estimate]], others: Sequence[Transition] = ()
) -> tuple[MovedComponent, ...]:
    """The change of each component's LLC across a transition, in units of its own scatter, the largest first.

    Args:
        transition: the boundary.
        curves: estimates by the component's name; one with fewer than one usable point on a side is left out.
        others: transitions beside it: what moved at one of them did not move at this.
    """
    found = []
    for name, estimates in curves.items():
        left, right = sides(transition, estimates, others, counts=_comparable)
        if not left or not right:
            continue
        change = float(np.mean([e.mean for e in right]) - np.mean([e.mean for e in left]))
        noise = _scatter(estimates)
        found.append(MovedComponent(name, change, abs(change) / noise if noise > 0 else math.inf))
    return tuple(sorted(found, key=lambda component: -component.scatters))


def _scatter(estimates: Sequence[Estimate]) -> float:
    """Robust scatter from point to point, floored by half the typical chain error."""
    points = [e for e in estimates if e.comparable]
    values = np.array([e.mean for e in points], dtype=np.float64)
    errors = np.array([e.chain_se for e in points], dtype=np.float64)
    errors = errors[np.isfinite(errors)]
    floor = 0.5 * float(np.median(errors)) if errors.size else 0.0
    if values.size < 4:
        return floor
    return max(floor, float(1.4826 * np.median(np.abs(np.diff(values, 2))) / math.sqrt(6.0)))


__all__ = ["moved_components", "moved_samples", "phase_of", "sides", "verdict_of", "with_phases"]
