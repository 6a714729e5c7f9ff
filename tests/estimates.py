"""The smallest chains for one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import (
    SGLD,
    Estimate,
    estimate_llc,
)
from tests.sampling.helpers import mean_squared, regression

TINY: dict[str, Any] = {
    "sampler": SGLD(lr=1e-3),
    "num_chains": 2,
    "num_draws": 5,
    "num_burnin_steps": 3,
    "nbeta": 20.0,
    "localization": 1.0,
    "batch_size": 16,
    "method": "sequential",
}


def tiny(module: nn.Module, data: Any = None, loss_fn: Any = mean_squared, **changes: Any) -> Estimate:
    return estimate_llc(module, data if data is not None else regression(), loss_fn, **{**TINY, **changes})


def same(a: Estimate, b: Estimate) -> bool:
    return torch.equal(a.trace, b.trace) and a.mean == b.mean and a.step_size == b.step_size


class Normed(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def ones(n: int = 64) -> TensorDataset:
    return TensorDataset(torch.ones(n, 1), torch.ones(n, 1))
