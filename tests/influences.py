"""The smallest chains for the influence of samples, and what it is asked of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_slt import InfluenceEstimate, estimate_influence
from tests.sampling.helpers import gen, seeded

functional = nn.functional

# the engine is fixed: the one that is faster here differs in rounding from the other
TINY: dict[str, Any] = {
    "num_chains": 4,
    "num_draws": 10,
    "num_burnin_steps": 4,
    "seed": 1,
    "method": "sequential",
    "shrinkage": 1.0,
}
"""The plain covariance: linear in either side, so that rows, groups and subsets can be compared."""


def squares(module: nn.Module, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean(dim=1)


def token_losses(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]).transpose(1, 2), batch[1], reduction="none")


def tiny(module: nn.Module, data: Any, query: Any = None, loss_fn: Any = squares, **changes: Any) -> InfluenceEstimate:
    return estimate_influence(module, data, query, loss_fn, **{**TINY, **changes})


def same(a: InfluenceEstimate, b: InfluenceEstimate) -> bool:
    return all(torch.equal(v, b.tensors()[k]) for k, v in a.tensors().items())


def clusters(n: int, classes: int = 4, dim: int = 8, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Points around class centres, and their classes."""
    centre = scale * torch.randn(classes, dim, generator=gen(99))
    y = torch.arange(n) % classes
    return centre[y] + torch.randn(n, dim, generator=gen(seed)), y


def trained(x: Tensor, y: Tensor, width: int = 16, steps: int = 200) -> nn.Module:
    net = seeded(lambda: nn.Sequential(nn.Linear(x.shape[1], width), nn.Tanh(), nn.Linear(width, int(y.max()) + 1)))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net


def class_loss(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1], reduction="none")
