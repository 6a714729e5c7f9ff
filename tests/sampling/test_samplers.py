"""SGLD is its equation, and its long-run covariance is the closed form of the discretised Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_slt import estimate_llc
from lightning_slt.functional import LocalPosterior
from lightning_slt.sampling.metric import LowRankMetric
from lightning_slt.sampling.samplers import (
    MALA,
    SGLD,
    SGNHT,
    KineticLangevin,
    LeimkuhlerMatthews,
    RMSpropSGLD,
    Sampler,
    empty_state,
)
from tests.cases.problems import regular
from tests.sampling.helpers import gen, make_chains, mean_squared, mlp, on_ranks, regression


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


@pytest.mark.parametrize("sampler", [SGLD(), LeimkuhlerMatthews(), RMSpropSGLD(), SGNHT(), KineticLangevin()])
def test_one_chain_and_several_move_alike(sampler: Sampler) -> None:
    many = torch.randn(3, 4, generator=gen(0))
    anchor, alone = torch.zeros(4), many[1].clone()
    states = [empty_state(sampler, weights) for weights in (alone, many)]
    for step in range(3):
        grad, noise = (torch.randn(3, 4, generator=gen(10 * step + k)) for k in (1, 2))
        for weights, state, rows in ((alone, states[0], 1), (many, states[1], slice(None))):
            own = grad[rows].clone(), noise[rows].clone()
            sampler.update_(weights, anchor, *own, lr=0.03, posterior=LocalPosterior(7.0, 2.0), state=state)
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


# --------------------------------------------------------------------------------- every sampler, known targets

SAMPLERS: list[Sampler] = [LeimkuhlerMatthews(), SGLD(), RMSpropSGLD(), SGNHT(diffusion_factor=0.1), MALA()]


def simulate(
    sampler: Any,
    loss: Callable[[Tensor], Tensor],
    posterior: LocalPosterior,
    anchor: Tensor,
    lr: float,
    *,
    chains: int,
    steps: int,
    burnin: int,
    every: int,
    second_moment: Tensor | None = None,
) -> Tensor:
    """``[readings, chains, d]``: the states of many chains on one potential, all from the anchor."""
    w = anchor.repeat(chains, 1)
    state = empty_state(sampler, w)
    if second_moment is not None:
        state.preconditioner = sampler.preconditioner(second_moment)
    noise, last, stream, seen = torch.empty_like(w), torch.empty_like(w), gen(7), []
    for t in range(steps):
        at = w.clone().requires_grad_()
        losses = loss(at)
        (grad,) = torch.autograd.grad(losses.sum(), at)
        state.loss = losses.detach()
        state.uniform = torch.rand(chains, generator=stream, dtype=w.dtype)
        noise.normal_(generator=stream)
        sampler.update_(w, anchor, grad, noise, lr, posterior, state)
        if sampler.shares_noise:
            if t:
                sampler.share_(w, last, lr)
            last.copy_(noise)
        if t >= burnin and t % every == 0:
            seen.append(state.tensors.get("accepted_weights", w).clone())
    return torch.stack(seen)


def a_gaussian() -> tuple[Tensor, Tensor, LocalPosterior, Tensor]:
    """Hessian, precision, posterior and anchor of a correlated Gaussian in three dimensions."""
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=gen(0), dtype=torch.float64))
    hessian = q @ torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)) @ q.T
    posterior = LocalPosterior(50.0, 20.0)
    anchor = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    return hessian, 50.0 * hessian + 20.0 * torch.eye(3, dtype=torch.float64), posterior, anchor


@pytest.mark.parametrize("share", [pytest.param(0.03, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_mean_and_covariance_of_a_gaussian_at_two_step_sizes(sampler: Sampler, share: float) -> None:
    """Each against its own stationary law: exact for MALA and where noise is shared between steps, the discretised
    Gaussian in the metric for the others.

    ``share`` is the step in inverses of the largest precision (of P A where there is a P). At 0.3 the
    discretised law is 8 % wider along the steepest direction, and the tolerance tells it from the exact one.
    2000 chains x 20 readings far apart: the error of a variance is 0.7 to 1.6 %, so that 5 % is more than three of it
    for each of six numbers; the seed is fixed.
    """
    hessian, precision, posterior, anchor = a_gaussian()
    moment = torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64) if isinstance(sampler, RMSpropSGLD) else None
    p = sampler.preconditioner(moment) if isinstance(sampler, RMSpropSGLD) and moment is not None else torch.ones(3)
    root = torch.diag(p.double().sqrt())
    rates = torch.linalg.eigvalsh(root @ precision @ root)
    lr = share / float(rates[-1])
    slow = math.ceil(4.0 / (lr * float(rates[0]))) if not isinstance(sampler, SGNHT) else math.ceil(40 / share**0.5)
    slow = min(slow, 400)
    draws = simulate(
        sampler,
        lambda w: 0.5 * ((w - anchor) @ hessian * (w - anchor)).sum(-1),
        posterior,
        anchor,
        lr,
        chains=2000,
        steps=slow * 25,
        burnin=slow * 5,
        every=slow,
        second_moment=moment,
    )
    u = (draws - anchor).reshape(-1, 3)
    exact = torch.linalg.inv(precision)
    expected = exact
    if not isinstance(sampler, (MALA, LeimkuhlerMatthews)):
        inner = torch.eye(3, dtype=torch.float64) - lr / 4 * root @ precision @ root
        expected = root @ torch.linalg.inv(root @ precision @ root @ inner) @ root
    if isinstance(sampler, SGNHT):  # the thermostat holds the mean over the directions
        widening = 1 / (1 - lr / 4 * rates)
        a = sampler.diffusion_factor
        expected = expected / float(widening.mean()) * (2 - a) / 2 / math.sqrt(1 - a)
    scale = exact.diag().sqrt()
    assert ((u.T @ u / len(u) - expected) / torch.outer(scale, scale)).abs().max() < 0.05
    assert (u.mean(0) / scale).abs().max() < 0.03


@pytest.mark.parametrize("share", [pytest.param(0.02, marks=pytest.mark.slow), 0.08])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_double_well_at_two_step_sizes(sampler: Sampler, share: float) -> None:
    """An uneven double well against quadrature: which well, how wide, and the mean of the loss."""
    posterior, anchor = LocalPosterior(3.0, 0.2), torch.zeros(1, dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return ((w.square() - 1).square() / 2 + 0.1 * w).sum(-1)

    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    weight = torch.softmax(-3.0 * loss(grid[:, None]) - 0.1 * grid.square(), 0)
    lr = share / (3.0 * 4.0)  # the curvature at the bottom of a well is 4
    if isinstance(sampler, SGNHT):
        lr *= 4  # of a time step squared
    draws = simulate(
        sampler, loss, posterior, anchor, lr, chains=4000, steps=4000 if share < 0.05 else 2000, burnin=1000, every=250
    )
    left, square = float(weight[grid < 0].sum()), float((weight * grid.square()).sum())
    mean_loss = float((weight * loss(grid[:, None])).sum())
    assert float((draws < 0).double().mean()) == pytest.approx(left, abs=0.03)
    assert float(draws.square().mean()) == pytest.approx(square, rel=0.03)
    assert float(loss(draws).mean()) == pytest.approx(mean_loss, rel=0.06)


FUNNEL_NECK, FUNNEL_WIDTH = 1.0, 0.5
"""Standard deviation of the neck's coordinate v, and how fast the other one widens with it."""


def funnel(w: Tensor) -> Tensor:
    """``-log`` of Neal's funnel (2003, Annals of Statistics 31) in two dimensions, over nbeta = 1:

    v ~ N(0, 1), x | v ~ N(0, exp(2 s v)). With s = 1/2, Neal's ``x | v ~ N(0, e^v)``; v of deviation 1 in place of 3,
    so that a chain of fixed step crosses it: the curvature along x still ranges over e^4 within two deviations.
    """
    v, x = w[:, 0], w[:, 1]
    return 0.5 * v.square() / FUNNEL_NECK**2 + 0.5 * x.square() * torch.exp(-2 * FUNNEL_WIDTH * v) + FUNNEL_WIDTH * v


@pytest.mark.parametrize("share", [pytest.param(0.01, marks=pytest.mark.slow), 0.03])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_funnel_at_two_step_sizes(sampler: Sampler, share: float) -> None:
    """Localised at the mouth's centre, against quadrature: means, covariance, and the share of time in the neck.

    ``share`` is the step itself (the curvature at v = 0 is 1, and 148 at v = -5).
    Later readings say the same as earlier ones: stationary.
    """
    posterior, anchor = LocalPosterior(1.0, 0.2), torch.zeros(2, dtype=torch.float64)
    grid_v = torch.linspace(-6, 6, 601, dtype=torch.float64)
    grid_x = torch.linspace(-25, 25, 4001, dtype=torch.float64)
    v, x = (g.reshape(-1) for g in torch.meshgrid(grid_v, grid_x, indexing="ij"))
    points = torch.stack([v, x], dim=1)
    weight = torch.softmax(-funnel(points) - 0.1 * points.square().sum(1), 0)
    mean_v = float((weight * v).sum())
    var_v, var_x = float((weight * v.square()).sum()) - mean_v**2, float((weight * x.square()).sum())
    moment = torch.tensor([1.0, 2.0], dtype=torch.float64) if isinstance(sampler, RMSpropSGLD) else None
    draws = simulate(
        sampler, funnel, posterior, anchor, share, chains=4000, steps=4000, burnin=1500, every=250, second_moment=moment
    )
    for half in (draws[:5], draws[5:]):
        assert float(half[..., 0].mean()) == pytest.approx(mean_v, abs=0.06)
        assert float(half[..., 0].var()) == pytest.approx(var_v, rel=0.08)
        assert float(half[..., 1].mean()) == pytest.approx(0.0, abs=0.06)
        assert float(half[..., 1].square().mean()) == pytest.approx(var_x, rel=0.08)
        cross = (half[..., 0] - half[..., 0].mean()) * half[..., 1]
        assert float(cross.mean()) == pytest.approx(0.0, abs=0.06)
    neck = float(weight[v < -1.5].sum())
    assert float((draws[..., 0] < -1.5).double().mean()) == pytest.approx(neck, abs=0.02)


def test_the_preconditioner_is_the_equation_and_has_a_floor() -> None:
    p = RMSpropSGLD(kappa=0.5).preconditioner(torch.tensor([0.0, 4.0, 4.0, 8.0]))
    s = 2.0
    expected = torch.tensor([1.5 * s / (v**0.5 + 0.5 * s) for v in (0.0, 4.0, 4.0, 8.0)])
    torch.testing.assert_close(p, expected)
    assert RMSpropSGLD().preconditioner(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"kappa=0.0.*positive"):
        RMSpropSGLD(kappa=0.0)


def test_the_preconditioner_is_frozen_in_the_draws_and_the_same_on_every_rank() -> None:
    def run(**settings: Any) -> tuple[Tensor, Tensor]:
        chains = make_chains(mlp(), regression(), mean_squared, num_chains=5, sampler=RMSpropSGLD(), **settings)
        chains.learn_preconditioner(keep_learning=True)
        chains.advance(12, 1e-3)
        chains.learn_preconditioner(keep_learning=False)
        learnt = chains.preconditioner
        assert learnt is not None
        learnt = learnt.clone()
        assert 0.05 < float(learnt.min()) < float(learnt.max()) < 11.1
        segment = chains.advance(12, 1e-3)
        assert torch.equal(chains.preconditioner, learnt)
        return learnt, segment.difference

    alone, trace = run()
    for learnt, segment in on_ranks(2, lambda c: run(collective=c)):
        torch.testing.assert_close(learnt, alone, rtol=1e-5, atol=0)
        torch.testing.assert_close(segment, trace, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_every_sampler_finds_the_learning_coefficient_of_a_regular_model(sampler: Sampler) -> None:
    """Nothing else given; exact value 4.95 at gamma = 1. Batched and one after another alike."""
    case = regular(n=400, eigenvalues=[4.0, 4.0, 3.0, 2.0, 2.0, 1.5, 1.0, 1.0, 1.0, 1.0], gamma=1.0)
    assert case.truth is not None
    found = [
        estimate_llc(
            case.module,
            case.dataset,
            case.loss_fn,
            sampler=sampler,
            localization=1.0,
            num_chains=4,
            num_draws=100,
            method=method,
        )
        for method in ("batched", "sequential")
    ]
    for estimate in found:
        assert abs(estimate.mean - case.truth) < max(0.05 * case.truth, 3 * estimate.se)
        assert estimate.virial == pytest.approx(1.0, abs=0.12)
        assert math.isfinite(estimate.se) and estimate.se < 0.1 * case.truth
    if isinstance(sampler, (MALA, SGNHT)):
        assert found[0].step_bias == 0.0
    acceptance = found[0].acceptance
    assert acceptance is not None and 0.3 < acceptance < 1.0 if isinstance(sampler, MALA) else acceptance is None


def test_samplers_out_of_range_and_without_a_state() -> None:
    w = torch.zeros(2)
    for sampler in (SGNHT(), MALA()):
        with pytest.raises(ValueError, match="state"):
            sampler.update_(w, w, w, w.clone(), 0.1, LocalPosterior(1.0, 1.0))
    with pytest.raises(ValueError, match=r"diffusion_factor=1.0"):
        SGNHT(diffusion_factor=1.0)
    for kind in (RMSpropSGLD, SGNHT, MALA):
        with pytest.raises(ValueError, match=r"lr=-1"):
            kind(lr=-1.0)
        assert isinstance(kind(), Sampler)


def test_what_a_step_heats_by_and_how_long_an_energy_is_remembered() -> None:
    """In steps of SGLD: ``2 eps / a`` of a thermostat, ``2 h / zeta`` of kinetic chains; not where a metric is."""
    thermostat = SGNHT(diffusion_factor=0.02)
    assert thermostat.heating(0.003) == (pytest.approx(0.3), True, True)
    assert thermostat.heating(0.003).virial_step == 0.0 and thermostat.energy_memory(0.003) == pytest.approx(50.0)
    kinetic = KineticLangevin(friction=0.5)
    assert kinetic.heating(0.04) == (pytest.approx(0.8), True, False)
    assert kinetic.heating(0.04).virial_step == pytest.approx(0.8) and kinetic.energy_memory(0.04) == pytest.approx(10)
    metric = LowRankMetric(1.0, torch.empty(3, 0), torch.empty(0))
    assert KineticLangevin(metric=metric).heating(0.04) == (0.0, True, False)
    for sampler, wanted in (
        (SGLD(), (0.01, False, False)),
        (RMSpropSGLD(), (0.01, False, False)),
        (LeimkuhlerMatthews(), (0.01, True, False)),
        (MALA(), (0.0, True, False)),
    ):
        assert sampler.heating(0.01) == wanted and sampler.energy_memory(0.01) == 0.0


def test_two_steps_of_the_thermostat_by_hand() -> None:
    """The noise of the first step is the momentum, and nothing else; then the friction is the thermostat's."""
    a, lr, anchor = 0.04, 0.09, torch.tensor([1.0, -1.0], dtype=torch.float64)
    w = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    sampler, state, at, xi = SGNHT(diffusion_factor=a), empty_state(SGNHT(), w), w.clone(), a
    p = torch.zeros_like(w)
    for t in range(2):
        grad, noise = (torch.randn(1, 2, generator=gen(10 * t + k), dtype=torch.float64) for k in (1, 2))
        force = 3.0 * grad + 2.0 * (at - anchor)
        kick = -math.sqrt((1 - xi) * lr) * force
        p = (1 - xi) * noise + kick if t == 0 else (1 - xi) * p + kick + math.sqrt(2 * a) * noise
        at = at + math.sqrt(lr) * p
        xi += lr * (float(p.square().sum()) / 2 - 1)
        sampler.update_(w, anchor, grad.clone(), noise.clone(), lr, LocalPosterior(3.0, 2.0), state)
        torch.testing.assert_close(w, at)
        assert float(state.tensors["thermostat"]) == pytest.approx(xi)


def test_a_proposal_without_a_number_for_its_loss_is_refused() -> None:
    sampler, anchor = MALA(), torch.zeros(2, dtype=torch.float64)
    w = anchor[None].clone()
    state, grad = empty_state(sampler, w), torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    for number, loss in enumerate((1.0, math.nan, math.inf)):
        state.loss = torch.tensor([loss], dtype=torch.float64)
        state.uniform = torch.tensor([1e-6], dtype=torch.float64)
        noise = torch.ones(1, 2, dtype=torch.float64)
        sampler.update_(w, anchor, grad, noise, lr=0.01, posterior=LocalPosterior(3.0, 1.0), state=state)
        assert state.loss.tolist() == [1.0] and state.tensors["accepted_weights"].tolist() == [[0.0, 0.0]]
        assert (int(state.tensors["proposed"]), int(state.tensors["accepted"])) == (number, 0)
        torch.testing.assert_close(w, -0.5 * 0.01 * 3.0 * grad + 0.1 * noise)
