"""Kinetic Langevin dynamics and its metric: the stated Gaussian at two step sizes, with and without the metric."""

from __future__ import annotations

import math
from typing import Optional

import pytest
import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.metric import Curvature, LowRankMetric, curvature_at
from lightning_slt.sampling.samplers import KineticLangevin, empty_state
from tests.sampling.helpers import gen

EIGENVALUES = torch.tensor([40.0, 8.0, 0.5, 0.5, 0.1], dtype=torch.float64)
POSTERIOR = LocalPosterior(3.0, 2.0)


def hessian() -> Tensor:
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    return (basis * EIGENVALUES) @ basis.T


def metric() -> LowRankMetric:
    h = hessian()
    found = curvature_at(torch.ones(5).double(), lambda w: (w - 1.0) @ h, torch.Generator().manual_seed(0))
    return LowRankMetric.of(found, POSTERIOR)


def run(sampler: KineticLangevin, lr: float, steps: int = 4000, chains: int = 200) -> Tensor:
    anchor = torch.ones(5, dtype=torch.float64)
    weights = anchor.repeat(chains, 1)
    state, h = empty_state(sampler, weights), hessian()
    g = torch.Generator().manual_seed(0)
    out = []
    for t in range(steps):
        grad = (weights - anchor) @ h
        noise = torch.randn(weights.shape, generator=g, dtype=torch.float64)
        sampler.update_(weights, anchor, grad, noise, lr, POSTERIOR, state)
        if t >= 200 and t % 10 == 0:
            out.append(weights - anchor)
            out[-1] = out[-1].clone()
    return torch.cat(out)


@pytest.mark.parametrize("lr_share", [0.1, 1.0])
@pytest.mark.parametrize("with_metric", [False, True])
def test_the_covariance_is_exact_at_two_step_sizes(lr_share: float, with_metric: bool) -> None:
    """76,000 draws, 4,000 effective ones at least: a standard deviation of 2.2 % of a variance, so 9 % is 4 of them; a
    step that heats, as that of SGLD does, would be 33 % out at the larger one."""
    p: Optional[LowRankMetric] = metric() if with_metric else None
    steepest = 1.0 if with_metric else float(POSTERIOR.nbeta * EIGENVALUES[0] + POSTERIOR.localization)
    draws = run(KineticLangevin(metric=p), lr_share / steepest)
    expected = torch.linalg.inv(POSTERIOR.nbeta * hessian() + POSTERIOR.localization * torch.eye(5).double())
    found = draws.T @ draws / len(draws)
    basis = torch.linalg.eigh(hessian()).eigenvectors
    ratio = (basis.T @ found @ basis).diagonal() / (basis.T @ expected @ basis).diagonal()
    assert float((ratio - 1).abs().max()) < 0.09, ratio
    assert float((draws.mean(dim=0).abs() / found.diagonal().sqrt()).max()) < 0.07


@pytest.mark.parametrize("at_anchor", [True, False])
def test_the_energy_is_that_of_the_posterior_from_the_first_step_on(at_anchor: bool) -> None:
    """Potential energy, mean of the first 300 steps, 2,000 chains: d / 2 = 2.5 of a square, whose standard deviation
    over the chains is at most sqrt(d / 2), so 0.14 is 4 standard errors. Momenta of N(0, I) at w* would leave 0.8 of
    it: their energy is half, and friction takes 1 / (0.7 h) = 158 steps to make up for it. Chains that are placed at
    a draw of the posterior have theirs already, and N(0, 2 I) would heat them to 1.2 of it."""
    anchor, h, g = torch.ones(5, dtype=torch.float64), hessian(), torch.Generator().manual_seed(0)
    precision = POSTERIOR.nbeta * h + POSTERIOR.localization * torch.eye(5).double()
    weights, lr = anchor.repeat(2000, 1), 0.01 / float(torch.linalg.eigvalsh(precision)[-1])
    if not at_anchor:
        root = torch.linalg.cholesky(torch.linalg.inv(precision))
        weights += torch.randn(weights.shape, generator=g, dtype=torch.float64) @ root.T
    sampler = KineticLangevin()
    assert sampler.energy_memory(lr) == pytest.approx(158.0, abs=0.5)
    state, energy = empty_state(sampler, weights), []
    for _ in range(300):
        u = weights - anchor
        noise = torch.randn(weights.shape, generator=g, dtype=torch.float64)
        sampler.update_(weights, anchor, u @ h, noise, lr, POSTERIOR, state)
        u = weights - anchor
        energy.append(0.5 * float(torch.linalg.vecdot(u, u @ precision).mean()))
    assert sum(energy) / len(energy) == pytest.approx(2.5, abs=0.14)


def test_curvature_finds_the_eigenvalues_and_the_metric_makes_the_posterior_round() -> None:
    h = torch.zeros(40, 40, dtype=torch.float64)
    h.diagonal()[:10] = torch.linspace(50, 5, 10, dtype=torch.float64)
    h.diagonal()[10:] = 0.2
    found = curvature_at(torch.ones(40).double(), lambda w: (w - 1) @ h, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.values[:10], h.diagonal()[:10], rtol=1e-6, atol=0)
    assert abs(found.mean - float(h.trace()) / 40) < 0.25 * float(h.trace()) / 40  # 16 random directions
    p = LowRankMetric.of(found, POSTERIOR)
    square = p(p(POSTERIOR.nbeta * h + POSTERIOR.localization * torch.eye(40).double()).T)
    values = torch.linalg.eigvalsh(square)
    assert float(values.max()) < 1.0 + 1e-6
    assert float(values.max() / values.min()) < 8  # from 58 without it
    assert "rank" in repr(p)


def test_a_flat_loss_leaves_one_scale() -> None:
    found = curvature_at(torch.ones(6), lambda w: torch.zeros_like(w), torch.Generator().manual_seed(0))
    p = LowRankMetric.of(found, POSTERIOR)
    torch.testing.assert_close(p(torch.ones(2, 6)), torch.full((2, 6), POSTERIOR.localization**-0.5))
    assert isinstance(found, Curvature) and found.largest == 0.0


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"friction=0.*positive"):
        KineticLangevin(friction=0)
    with pytest.raises(ValueError, match=r"lr=-1.*positive"):
        KineticLangevin(lr=-1)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="momenta, which need a state"):
        KineticLangevin().update_(x, x[0], x, x, 0.1, POSTERIOR)


def test_two_steps_by_hand() -> None:
    """From where a chain is placed: a momentum that is the first noise, and half a kick; then whole ones."""
    sampler, anchor = KineticLangevin(friction=0.7), torch.tensor([1.0, -1.0], dtype=torch.float64)
    w, h, a = torch.tensor([[2.0, 0.5]], dtype=torch.float64), 0.2, math.exp(-0.7 * 0.2)
    state, p, at = empty_state(sampler, w), torch.zeros(1, 2, dtype=torch.float64), w.clone()
    for t in range(2):
        grad, noise = (torch.randn(1, 2, generator=gen(10 * t + k), dtype=torch.float64) for k in (1, 2))
        force = 3.0 * grad + 2.0 * (at - anchor)
        if t == 0:
            p = noise - 0.5 * h * force
            renewed = a * p + (1 - a) * noise
        else:
            p = p - h * force
            renewed = a * p + math.sqrt(1 - a * a) * noise
        at = at + 0.5 * h * (p + renewed)
        p = renewed
        sampler.update_(w, anchor, grad, noise.clone(), h * h, POSTERIOR, state)
        torch.testing.assert_close(w, at)
        torch.testing.assert_close(state.tensors["momentum"], p)
