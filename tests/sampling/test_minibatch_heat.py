"""What minibatches heat chains with momenta by, foretold, and the time step that keeps it small."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.metric import Curvature
from lightning_slt.sampling.minibatch_heat import (
    LEAST_STEP,
    MAX_NOISE_HEAT,
    Cooled,
    held_by_thermostat,
    minibatch_noise,
)
from lightning_slt.sampling.samplers import KineticLangevin, empty_state
from lightning_slt.sampling.samplers.base import Heating
from lightning_slt.sampling.step_size import NOISE_HEAT
from tests.sampling.helpers import gen
from tests.sampling.segments import segment


@pytest.mark.parametrize(("h", "allowed"), [(0.7, 0.05), (0.2, 0.05)])
def test_the_variance_that_a_random_force_adds_is_the_gain_times_its_own(h: float, allowed: float) -> None:
    """20,000 oscillators of precision 1 under a force of variance 2: the standard error of a variance is 1 %."""
    sampler, posterior = KineticLangevin(h * h), LocalPosterior(1.0, 0.0)
    weights, anchor = torch.randn(20_000, 1, generator=gen(0)), torch.zeros(1)
    state = empty_state(sampler, weights)
    for step in range(int(12 / h)):
        force = weights + math.sqrt(2.0) * torch.randn(weights.shape, generator=gen(1000 + step))
        noise = torch.randn(weights.shape, generator=gen(2000 + step))
        sampler.update_(weights, anchor, force, noise, h * h, posterior, state)
    assert float(weights.var()) == pytest.approx(1.0 + 2.0 * sampler.noise_gain(h * h), abs=allowed)


def noise_found(hessian: Tensor, xi: Tensor, curvature: Curvature, posterior: LocalPosterior) -> float:
    """Of as many minibatches as ``xi`` has rows, each with its own beside the gradient of a diagonal Hessian."""
    at = torch.zeros_like(hessian)
    return minibatch_noise(
        at, lambda w, numbers: w * hessian + xi[numbers[0]], range(len(xi)), curvature, posterior, gen(4)
    )


def test_noise_is_that_of_the_gradients_in_the_metric_weighted_by_what_the_loss_holds() -> None:
    """Three directions: two of curvature 4 and 1, and one that is flat; noise of a variance of its own in each."""
    values, gamma, nbeta = torch.tensor([4.0, 1.0], dtype=torch.float64), 2.0, 10.0
    curvature = Curvature(values, torch.eye(3, 2, dtype=torch.float64), 5.0 / 3)
    xi = torch.randn(8, 3, generator=gen(3), dtype=torch.float64) * torch.tensor([1.0, 0.5, 7.0])
    own = xi.var(dim=0)[:2]
    held = nbeta * values / (nbeta * values + gamma)
    wanted = float((held * nbeta**2 * own / (nbeta * values + gamma)).sum() / held.sum())
    hessian = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    found = noise_found(hessian, xi, curvature, LocalPosterior(nbeta, gamma))
    assert found == pytest.approx(wanted, rel=1e-6)


def test_one_batch_has_no_noise() -> None:
    curvature = Curvature(torch.ones(1), torch.eye(1), 1.0)
    assert minibatch_noise(torch.zeros(1), lambda w, _: w, [0], curvature, LocalPosterior(1.0, 1.0), gen(0)) == 0.0


def test_a_step_is_shortened_to_what_is_allowed_and_no_further_than_the_least() -> None:
    sampler = KineticLangevin(0.49)
    cool, warm, hot = (Cooled.of(sampler, noise) for noise in (0.05, 1.0, 1000.0))
    assert cool.sampler.lr == sampler.lr and not cool.shortened and not cool.notes(64) and not cool.reasons()
    assert warm.shortened and warm.heat == pytest.approx(NOISE_HEAT, rel=0.01) and not warm.reasons()
    assert "minibatches of 64 hold the time step at 0.056" in warm.notes(64)[0]
    assert math.sqrt(hot.sampler.lr or 0) == pytest.approx(0.7 * LEAST_STEP, rel=0.01)
    assert hot.heat > MAX_NOISE_HEAT and "heat of the minibatches: full_batch=True" in hot.reasons()[0]
    assert warm.shorter(0.5).lr == pytest.approx((warm.sampler.lr or 0) / 4)


def test_directions_that_are_not_known_one_by_one_have_a_share_of_the_noise_as_they_have_of_the_curvature() -> None:
    """Two of five are known, of curvature 4 and 1; the others are half as steep as that, in the metric's own scale."""
    values, gamma, nbeta = torch.tensor([4.0, 1.0], dtype=torch.float64), 2.0, 10.0
    curvature = Curvature(values, torch.eye(5, 2, dtype=torch.float64), (5.0 + 3 * 0.5) / 5)
    xi = torch.randn(6, 5, generator=gen(3), dtype=torch.float64) * torch.tensor([1.0, 0.5, 0.7, 2.0, 0.1])
    square = nbeta**2 * xi.var(dim=0) / (nbeta * torch.tensor([4.0, 1.0, 1.0, 1.0, 1.0]) + gamma)
    held = nbeta * values / (nbeta * values + gamma)
    of_others = nbeta * 0.5 / (nbeta + gamma)  # of each
    heat = float((held * square[:2]).sum()) + of_others * float(square[2:].sum())
    hessian = torch.tensor([4.0, 1.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    found = noise_found(hessian, xi, curvature, LocalPosterior(nbeta, gamma))
    assert found == pytest.approx(heat / (float(held.sum()) + 3 * of_others), rel=1e-6)


@pytest.mark.parametrize(
    ("step", "reasons", "notes"),
    [(0.06, 0, 0), (0.07, 0, 1), (0.75, 0, 1), (0.85, 1, 0)],
)
def test_what_a_thermostat_has_to_hold_is_noted_and_beyond_the_coefficient_itself_a_reason(
    step: float, reasons: int, notes: int
) -> None:
    """A heat of ``step / 8 * 10² * 2`` beside an LLC of 20: 0.075 to 1.06 of it."""
    shown, posterior = segment(5.0, 4.0, 1.0, difference=2.0, noise_square=2.0), LocalPosterior(10.0, 0.0)
    said = held_by_thermostat(shown, Heating(step, True, thermostat=True), posterior, shown.finite)
    assert (len(said[0]), len(said[1])) == (reasons, notes)
    for sentence in (*said[0], *said[1]):
        assert f"holds a heat of the minibatches of {25 * step / 20:.2g} times the LLC" in sentence
    assert held_by_thermostat(shown, Heating(step, True), posterior, shown.finite) == ((), ())
    assert held_by_thermostat(shown, Heating(step, True, thermostat=True), posterior, ~shown.finite) == ((), ())


@pytest.mark.parametrize(("heat", "valid"), [(0.079, True), (0.081, False), (0.5, False)])
def test_heat_of_minibatches_is_a_reason_from_its_limit_on(heat: float, valid: bool) -> None:
    found = Cooled(KineticLangevin(0.49), heat, shortened=True).reasons()
    assert found == (
        () if valid else (f"{heat:.0%} of the LLC is heat of the minibatches: full_batch=True, or a larger batch_size",)
    )
