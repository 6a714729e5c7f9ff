"""What the optimisers of training know of squared gradients, for a sampler with a metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_slt.callbacks.arguments import second_moments


def trained(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    """A module after one step, its optimiser, and the squared gradients ``[d]`` of that step."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = make(net.parameters())
    net(torch.randn(5, 3)).square().sum().backward()
    squares = torch.cat([p.grad.flatten() ** 2 for p in net.parameters() if p.grad is not None])
    optimizer.step()
    return net, optimizer, squares


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (lambda p: torch.optim.Adam(p, betas=(0.9, 0.75)), 0.25),
        (lambda p: torch.optim.AdamW(p, betas=(0.9, 0.75), amsgrad=True), 0.25),
        (lambda p: torch.optim.RMSprop(p, alpha=0.75), 0.25),
        (lambda p: torch.optim.RMSprop(p, alpha=0.75, centered=True, momentum=0.9), 0.25),
        (lambda p: torch.optim.Adadelta(p, rho=0.75), 0.25),
    ],
    ids=["Adam", "AdamW", "RMSprop", "centered RMSprop", "Adadelta"],
)
def test_running_means_of_squared_gradients_are_handed_over(make: Any, share: float) -> None:
    net, optimizer, squares = trained(make)
    found = second_moments([optimizer], net, ["weight", "bias"])
    assert found is not None
    torch.testing.assert_close(found, share * squares)
    only = second_moments([optimizer], net, ["bias"])
    assert only is not None
    torch.testing.assert_close(only, share * squares[6:])


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adagrad(p), torch.optim.Adamax],
    ids=["SGD", "Adagrad", "Adamax"],
)
def test_optimisers_that_keep_no_such_mean_have_none(make: Any) -> None:
    net, optimizer, _ = trained(make)
    assert second_moments([optimizer], net, ["weight", "bias"]) is None


def test_weights_that_an_optimiser_does_not_move_have_none() -> None:
    net, optimizer, _ = trained(lambda p: torch.optim.RMSprop(list(p)[:1]))
    assert second_moments([optimizer], net, ["weight"]) is not None
    assert second_moments([optimizer], net, ["weight", "bias"]) is None
