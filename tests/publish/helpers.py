"""Estimates made by hand, for tests that need no sampler."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.publish.render import Rendered
from lightning_slt.record import Estimate
from lightning_slt.susceptibility_record import SusceptibilityEstimate
from lightning_slt.transition_record import MovedComponent, MovedSample, TransitionReport, Verdict
from lightning_slt.transitions import Phase, Transition


def make_estimate(
    mean: float = 12.0, se: float = 0.5, num_chains: int = 4, num_draws: int = 100, bad_chains: int = 0, **changes: Any
) -> Estimate:
    """An estimate with white-noise chains around ``mean``; the last ``bad_chains`` chains turn NaN half-way.

    Every field can be set by name; ``valid`` is False where there are reasons or bad chains.
    """
    generator = torch.Generator().manual_seed(int(changes.get("step") or 0))
    centre = mean if math.isfinite(mean) else 0.0
    offset = se * torch.randn(num_chains, 1, generator=generator) if math.isfinite(se) else torch.zeros(num_chains, 1)
    trace = (
        centre
        + offset
        + 6.0 * abs(se if math.isfinite(se) else 1.0) * torch.randn(num_chains, num_draws, generator=generator)
    )
    if bad_chains:
        trace[-bad_chains:, num_draws // 2 :] = math.nan
    per_chain = trace.double().mean(1) if num_draws else torch.full((num_chains,), math.nan, dtype=torch.float64)
    fields: dict[str, Any] = {
        "mean": mean,
        "se": se,
        "per_chain": per_chain,
        "trace": trace,
        "rhat": 1.01,
        "ess": 250.0,
        "valid": not (bad_chains or changes.get("reasons")),
        "reasons": (f"{bad_chains} of {num_chains} chains left the finite numbers",) if bad_chains else (),
        "nbeta": 100.0,
        "localization": 10.0,
        "init_loss": 0.25,
        "chain_loss": 0.25 + mean / 100.0,
        "num_samples": 1000,
        "num_weights": 50,
        "step_size": 1e-4,
        "step_bias": 0.125,
        "virial": 0.96875,
        "slope": 0.0625,
        "slope_se": 0.015625,
        "finite_share": 1.0 - bad_chains / num_chains,
        "num_bad_chains": bad_chains,
        "num_chains": num_chains,
        "num_draws": num_draws,
        "seconds": 1.5,
        "overhead": 0.0625,
        "credit_seconds": 1.75,
        "predicted_seconds": 1.5,
        "firing_size": 1.0,
        "skipped": 3,
        "step": 100,
    }
    return Estimate(**{**fields, **changes})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def make_influence(
    n: int = 30, num_queries: int = 6, classes: int = 3, step: Optional[int] = 100, **changes: Any
) -> InfluenceEstimate:
    """Samples 0, 10, 20, ... of ``classes`` classes; posterior mean losses fall with the number, plain ones rise.

    One pair stands out of its error: sample 20 on the second query, with ``z = 8``; all others have ``|z| <= 2``.
    """
    generator = torch.Generator().manual_seed(step or 0)
    z = 4 * torch.rand(num_queries, n, generator=generator).double() - 2
    if num_queries > 1 and n > 2:
        z[1, 2] = 8.0
    order = torch.arange(n).double()
    names = [str(i % classes) for i in range(n)]
    group_matrix = torch.eye(classes).double() * 2 - 0.5
    fields: dict[str, Any] = {
        "matrix": 0.25 * z,
        "correlation": z / 16,
        "se": torch.full((num_queries, n), 0.25, dtype=torch.float64),
        "self_influence": 0.5 + order,
        "self_influence_se": torch.full((n,), 0.1, dtype=torch.float64),
        "init_loss": 0.1 + order / n,
        "mean_loss": 2.0 + (n - order) / n,
        "mean_loss_se": torch.full((n,), 0.01, dtype=torch.float64),
        "query_init_loss": torch.full((num_queries,), 0.2, dtype=torch.float64),
        "query_mean_loss": torch.full((num_queries,), 0.4, dtype=torch.float64),
        "train_index": 10 * torch.arange(n),
        "query_index": torch.arange(num_queries),
        "nbeta": 100.0,
        "localization": 2.0,
        "num_chains": 4,
        "num_draws": 25,
        "num_blocks": 16,
        "between_share": 0.125,
        "train_group": tuple(names),
        "query_group": tuple(names[:num_queries]),
        "groups": tuple(str(i) for i in range(classes)),
        "group_matrix": group_matrix,
        "group_se": torch.full((classes, classes), 0.2, dtype=torch.float64),
        "num_samples": 1000,
        "step": step,
        "x": None if step is None else step - 1,
        "seconds": 1.5,
    }
    return InfluenceEstimate(**{**fields, **changes})


def make_susceptibility(
    chi: dict[str, list[float]], groups: tuple[str, ...] = (), se: float = 0.01, **changes: Any
) -> SusceptibilityEstimate:
    """Of each component its susceptibility to the whole shift, and to the groups behind it."""
    values = torch.tensor(list(chi.values())).double()
    none = values[:, :0]
    error = torch.full_like(values, se)
    fields: dict[str, Any] = {
        "components": tuple(chi),
        "chi": values[:, 0],
        "se": error[:, 0],
        "per_chain": values[:, :1].expand(-1, 4),
        "matrix": none,
        "matrix_se": none,
        "sample_index": torch.empty(0, dtype=torch.long),
        "groups": groups,
        "group_chi": values[:, 1:],
        "group_se": error[:, 1:],
        "llc": torch.ones(len(chi)).double(),
        "nbeta": 100.0,
        "localization": (1.0,) * len(chi),
        "num_weights": (3,) * len(chi),
        "num_samples": 1000,
        "num_chains": 4,
        "num_draws": 250,
        "valid": not changes.get("reasons"),
        "step": 100,
        "seconds": 2.0,
    }
    return SusceptibilityEstimate(**{**fields, **changes})


def nothing_measured(step: int = 100) -> InfluenceEstimate:
    """What comes of chains that all diverged."""
    none, pairs, long = torch.empty(0).double(), torch.empty(0, 0).double(), torch.empty(0, dtype=torch.long)
    return InfluenceEstimate(
        *(pairs, pairs, pairs, none, none, none, none, none, none, none, long, long),
        nbeta=100.0,
        localization=2.0,
        num_chains=0,
        num_draws=0,
        valid=False,
        reasons=("no chain has stayed finite and local",),
        step=step,
        x=step - 1,
    )


def picture_of(index: int) -> Rendered:
    """A grey square, lighter for larger numbers."""
    return Rendered("image", np.full((64, 64), index % 256, dtype=np.uint8), "")


def pictures_of(estimate: InfluenceEstimate, k: int = 20) -> dict[int, Rendered]:
    """All suspects, as a monitor hands them over."""
    return {i: picture_of(i) for i in (int(estimate.train_index[j]) for j in estimate.suspects(k))}


def make_transition(**changes: Any) -> Transition:
    """Structure is built around step 300, known at 360."""
    fields: dict[str, Any] = {
        "id": 0,
        "onset": 280.0,
        "step": 300.0,
        "end": 330.0,
        "kind": "A",
        "state": "provisional",
        "score": 15.0,
        "llc_change": 15.0,
        "llc_change_se": 0.5,
        "loss_change": -0.5,
        "loss_change_se": 0.01,
        "known_at": 360.0,
    }
    return Transition(**{**fields, **changes})


def make_report(transition: Optional[Transition] = None, **changes: Any) -> TransitionReport:
    """The LLC goes from 10 to 25, the loss from 1.5 to 1: equal at n = 147, and at 978 for beta = 0.15."""
    fields: dict[str, Any] = {
        "transition": make_transition() if transition is None else transition,
        "x": 359,
        "num_samples": 800,
        "before": Phase(1.5, 0.01, 10.0, 0.5),
        "after": Phase(1.0, 0.01, 25.0, 0.5),
        "tempered": Verdict(0.15, "before", -7.0, 2.0, 978.0, 700.0, None),
        "untempered": Verdict(1.0, "after", 396.0, 6.0, 147.0, 130.0, 165.0),
        "samples": (MovedSample(70, "1", 3.0, 0.1, 0.0, 0.1), MovedSample(30, "0", -0.1, 0.1, 0.0, 0.1)),
        "components": (MovedComponent("attn", 9.0, 18.0), MovedComponent("mlp", 0.1, 0.2)),
        "checkpoints": {"before": "pinned/a.pt"},
    }
    return TransitionReport(**{**fields, **changes})
