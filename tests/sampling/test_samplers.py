"""SGLD is its equation, and its long-run covariance is the closed form of the discretised Gaussian."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_slt.functional import LocalPosterior
from lightning_slt.sampling.samplers import SGLD, Sampler
from tests.sampling.helpers import gen


def test_update_is_the_equation_by_hand() -> None:
    w, anchor = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([0.5, 1.0])
    grad, noise = torch.tensor([[0.1, 0.2], [-0.3, 0.4]]), torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    expected = w - 0.01 / 2 * (50.0 * grad + 4.0 * (w - anchor)) + math.sqrt(0.01) * noise
    SGLD().update_(w, anchor, grad, noise, lr=0.01, posterior=LocalPosterior(50.0, 4.0))
    torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-7)


def test_update_without_localization_is_plain_langevin() -> None:
    w = torch.tensor([1.0])
    SGLD().update_(
        w, torch.tensor([9.0]), torch.tensor([2.0]), torch.tensor([0.0]), lr=0.1, posterior=LocalPosterior(10.0, 0.0)
    )
    assert w.item() == pytest.approx(1.0 - 0.05 * 20.0)


def test_one_chain_and_several_move_alike() -> None:
    many = torch.randn(3, 4, generator=gen(0))
    anchor, grad, noise = torch.zeros(4), torch.randn(3, 4, generator=gen(1)), torch.randn(3, 4, generator=gen(2))
    alone = many[1].clone()
    SGLD().update_(alone, anchor, grad[1], noise[1].clone(), lr=0.03, posterior=LocalPosterior(7.0, 2.0))
    SGLD().update_(many, anchor, grad, noise, lr=0.03, posterior=LocalPosterior(7.0, 2.0))
    torch.testing.assert_close(many[1], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("step_in_stability_units", [0.1, 0.6])
def test_long_run_covariance_is_that_of_the_discretised_gaussian(step_in_stability_units: float) -> None:
    """A^-1 (I - eps A/4)^-1 around the anchor, in a rotated basis, at two step sizes.

    8000 chains read 60 times, at least half a correlation time apart along the slowest direction: the relative error of
    a variance is below sqrt(2 / 8000) = 1.6 % even if only the chains counted. 4 % is asked of nine numbers: with the
    error that the readings leave (below 0.5 %) a false alarm has odds below 1e-10.
    """
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=gen(0), dtype=torch.float64))
    hessian = q @ torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)) @ q.T
    nbeta, gamma = 100.0, 30.0
    precision = nbeta * hessian + gamma * torch.eye(3, dtype=torch.float64)
    lr = 4.0 * step_in_stability_units / float(torch.linalg.eigvalsh(precision)[-1])
    anchor = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w = anchor.repeat(8000, 1)
    noise, stream = torch.empty_like(w), gen(1)
    mean, second, readings = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64), 0
    apart = max(1, round(1.0 / (lr * float(torch.linalg.eigvalsh(precision)[0]))))
    for t in range(apart * 80):
        noise.normal_(generator=stream)
        SGLD().update_(w, anchor, (w - anchor) @ hessian, noise, lr=lr, posterior=LocalPosterior(nbeta, gamma))
        if t >= apart * 20 and t % apart == 0:
            u = w - anchor
            mean, second, readings = mean + u.mean(0), second + u.T @ u / len(u), readings + 1
    expected = torch.linalg.inv(precision @ (torch.eye(3, dtype=torch.float64) - lr / 4 * precision))
    scale = expected.diag().sqrt()
    assert readings == 60
    assert ((second / readings - expected) / torch.outer(scale, scale)).abs().max() < 0.04
    assert (mean / readings / scale).abs().max() < 0.05  # an error below 1 / sqrt(8000) = 0.011
    if step_in_stability_units > 0.5:  # the closed form is told from the exact posterior
        assert expected.trace() > 1.5 * torch.linalg.inv(precision).trace()


@pytest.mark.parametrize("lr", [0.0, -1e-4, math.nan, math.inf])
def test_step_size_out_of_range(lr: float) -> None:
    with pytest.raises(ValueError, match=r"lr=.*positive.*None"):
        SGLD(lr=lr)


def test_sgld_is_a_sampler() -> None:
    assert isinstance(SGLD(), Sampler) and SGLD().lr is None and SGLD(lr=1e-3).lr == 1e-3
