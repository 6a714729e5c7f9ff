"""Chains that follow another gradient than that of their loss are not valid; those on plateaus and kinks are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.utils.data import TensorDataset

from lightning_slt import Estimate, estimate_llc
from tests.sampling.helpers import gen, mean_squared, seeded

SAID = "its gradient says"


def measured(module: nn.Module, seed: int = 0) -> Estimate:
    x = torch.randn(500, 4, generator=gen(1))
    y = module(x).detach()
    data = TensorDataset(x, y + 0.3 * torch.randn(y.shape, generator=gen(2)))
    return estimate_llc(module, data, mean_squared, localization=1.0, num_draws=50, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_signs_that_are_read_with_int_are_jumps_that_no_gradient_shows(seed: int) -> None:
    """torch's own choice for a weight that is not square: 60 for less than 8 / 2."""
    est = measured(orthogonal(seeded(lambda: nn.Linear(4, 2, bias=False))), seed)
    assert est.mean > 20 and not est.valid and any(SAID in reason for reason in est.reasons)


def test_the_other_map_has_none() -> None:
    est = measured(orthogonal(seeded(lambda: nn.Linear(4, 4, bias=False)), orthogonal_map="cayley"))
    assert est.valid and abs(est.mean - 3.0) < 0.3  # six angles


class Weights(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d))


def plateau(module: Any, batch: Any) -> Tensor:
    return (1 - torch.exp(-module.w.square().sum() / (2 * 0.3**2))) * batch[0].mean()


def kink(module: Any, batch: Any) -> Tensor:
    return module.w.abs().sum() * batch[0].mean()


@pytest.mark.parametrize(("loss_fn", "d", "nbeta", "truth"), [(plateau, 10, 3.0, 3.0), (kink, 4, 30.0, 3.99)])
def test_a_loss_that_rises_more_slowly_than_a_square_is_looked_at_and_let_pass(
    loss_fn: Any, d: int, nbeta: float, truth: float
) -> None:
    """Where the gradient does less work than on a square; at nbeta 3 the pull holds chains on the plateau."""
    data = TensorDataset(torch.ones(16, 1))
    est = estimate_llc(Weights(d), data, loss_fn, localization=1.0, nbeta=nbeta, num_draws=100)
    assert est.valid and est.mean == pytest.approx(truth, rel=0.1)
