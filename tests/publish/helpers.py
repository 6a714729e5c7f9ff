"""Estimates made by hand, for tests that need no sampler."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import torch

from lightning_slt.record import Estimate


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
        "finite_share": 1.0 - bad_chains / num_chains,
        "num_bad_chains": bad_chains,
        "num_chains": num_chains,
        "num_draws": num_draws,
        "seconds": 1.5,
        "overhead": 0.0625,
        "credit_seconds": 1.75,
        "predicted_seconds": 1.5,
        "firing_size": 0.25,
        "skipped": 3,
        "step": 100,
    }
    return Estimate(**{**fields, **changes})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
