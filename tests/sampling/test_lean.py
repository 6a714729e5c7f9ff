"""SGLD leans to flat weights: what that adds to the coefficient is seen, taken off, and in the error bar."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import SGLD, Estimate, LeimkuhlerMatthews, estimate_llc
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.lean import LEAST_READINGS, lean_of
from lightning_slt.sampling.readings import heat_of
from lightning_slt.sampling.segment import STATS_EVERY, Segment
from tests.cases.problems import regular

STEEP = 1000.0


def gradients(y: Tensor, z: Tensor, push: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss ``STEEP/2 exp(2y) z² - push y``, whose direction z is the steeper the larger y; and its gradients."""
    steep = STEEP * torch.exp(2 * y)
    return 0.5 * steep * z * z - push * y, steep * z * z - push, steep * z


def truth(push: float, pull: float) -> float:
    """``E[loss]`` under ``exp(-loss - pull/2 (y² + z²))``: z is Gaussian given y, and y by quadrature."""
    y = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    steep = STEEP * torch.exp(2 * y)
    weight = torch.softmax(push * y - 0.5 * pull * y**2 - 0.5 * torch.log(steep + pull), dim=0)
    return float((weight * (0.5 * steep / (steep + pull) - push * y)).sum())


def chains(push: float, pull: float, eps: float) -> Segment:
    """2,000 chains of SGLD on all the data, 6,000 steps each after 2,000."""
    gen = torch.Generator().manual_seed(0)
    y, z = (torch.zeros(2000, dtype=torch.float64) for _ in range(2))
    losses, readings = [], []
    for step in range(8000):
        loss, by_y, by_z = gradients(y, z, push)
        if step >= 2000:
            losses.append(loss)
            if step % STATS_EVERY == 0:
                readings.append((by_y**2 + by_z**2, by_y * y + by_z * z, y**2 + z**2))
        noise = math.sqrt(eps) * torch.randn(2, 2000, generator=gen, dtype=torch.float64)
        y = y - eps / 2 * (by_y + pull * y) + noise[0]
        z = z - eps / 2 * (by_z + pull * z) + noise[1]
    tables = [torch.stack(table, dim=1) for table in zip(*readings, strict=True)]
    return Segment(list(range(2000)), torch.stack(losses, dim=1), *tables, anchors={(0, 0, 0): 0.0})


@pytest.mark.parametrize(
    ("push", "pull", "eps", "error"),
    [
        (5.0, 10.0, 2e-4, 0.017),
        pytest.param(12.0, 40.0, 4e-4, 0.008, marks=pytest.mark.slow),
        pytest.param(20.0, 40.0, 2e-4, 0.020, marks=pytest.mark.slow),
    ],
)
def test_heat_and_lean_are_what_the_step_adds(push: float, pull: float, eps: float, error: float) -> None:
    """Where the loss falls as the potential steepens. ``error``: of the mean over the chains; right, it is three of
    them off once in 370 seeds. The leans are 0.09, 0.07 and 0.08."""
    segment, posterior = chains(push, pull, eps), LocalPosterior(1.0, pull)
    without_heat = float(segment.difference.mean()) - heat_of(segment, eps, posterior).total
    assert without_heat - truth(push, pull) > 3 * error
    lean = lean_of(segment, eps, posterior, segment.finite)
    assert without_heat - lean == pytest.approx(truth(push, pull), abs=3 * error)


def test_where_the_loss_rises_as_the_potential_steepens_it_is_below_zero() -> None:
    segment, posterior = chains(-20.0, 40.0, 2e-3), LocalPosterior(1.0, 40.0)
    without_heat = float(segment.difference.mean()) - heat_of(segment, 2e-3, posterior).total
    lean = lean_of(segment, 2e-3, posterior, segment.finite)
    assert lean < -0.05
    assert without_heat - lean == pytest.approx(truth(-20.0, 40.0), abs=0.06)


def test_where_the_loss_does_not_care_for_steepness_there_is_none() -> None:
    """The potential steepens along y, and the loss, but for its heat, is the same everywhere."""
    segment = chains(0.0, 10.0, 8e-4)
    assert lean_of(segment, 8e-4, LocalPosterior(1.0, 10.0), segment.finite) == 0.0


def readings(heat: Tensor, loss: Tensor) -> tuple[Segment, LocalPosterior]:
    """Chains that read these, ``[chains, readings]``, at a step of 8 and nbeta = 1, without a pull."""
    nothing = torch.zeros_like(heat)
    every_step = loss.repeat_interleave(STATS_EVERY, dim=1)
    return Segment(list(range(len(heat))), every_step, heat, nothing, nothing, anchors={}), LocalPosterior(1.0, 0.0)


def test_it_is_the_covariance_of_what_is_slow_shrunk_by_its_error() -> None:
    """Levels of the chains that differ, and noise that readings of one step share."""
    gen = torch.Generator().manual_seed(1)
    level = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64).unsqueeze(1)
    shared = torch.randn(8, 400, generator=gen, dtype=torch.float64)
    segment, posterior = readings(2.0 + 0.5 * level + shared, 10.0 - 3.0 * level + 5.0 * shared)
    each = (0.5 * level * (0.5 * level + 3.0 * level)).flatten()
    expected, error = float(each.mean()), float(each.std()) / math.sqrt(8)
    assert expected > 2 * error
    found = lean_of(segment, 8.0, posterior, segment.finite)
    assert found == pytest.approx(expected - error**2 / expected, rel=0.15)


def test_noise_is_no_lean() -> None:
    """Independent readings, 200 times: found above its error in a sixth of them (between a tenth and a quarter with a
    probability of 0.98), and then of the size of that error."""
    gen = torch.Generator().manual_seed(2)
    found = []
    for _ in range(200):
        heat, loss = torch.randn(2, 8, 50, generator=gen, dtype=torch.float64)
        segment, posterior = readings(1.0 + 0.3 * heat, 10.0 + 2.0 * loss)
        found.append(lean_of(segment, 8.0, posterior, segment.finite))
    assert 20 <= sum(value > 0 for value in found) <= 50
    assert sum(found) / 200 < 0.02 and max(found) < 0.15


def test_heat_that_directions_remember_is_none_below_zero() -> None:
    """Of a Gaussian of many directions, whose heat and loss go together at all lags, at the step where it is most."""
    g, eps, curvature = torch.Generator().manual_seed(3), 8.0, 0.07 / 8.0
    x = curvature**-0.5 * torch.randn(8, 50, generator=g, dtype=torch.float64)
    rows = []
    for step in range(4000 * STATS_EVERY):
        rows += [x.square().sum(dim=1)] if step % STATS_EVERY == 0 else []
        x = (1 - eps * curvature / 2) * x + eps**0.5 * torch.randn(8, 50, generator=g, dtype=torch.float64)
    square = torch.stack(rows, dim=1)
    segment, posterior = readings(curvature**2 * square, curvature / 2 * square)
    assert lean_of(segment, eps, posterior, segment.finite) == 0.0


@pytest.mark.parametrize(("num_chains", "count"), [(1, 100), (8, LEAST_READINGS - 1)])
def test_one_chain_or_few_readings_show_none(num_chains: int, count: int) -> None:
    level = torch.linspace(-1, 1, num_chains * count, dtype=torch.float64).reshape(num_chains, count)
    segment, posterior = readings(2.0 + level, 10.0 - level)
    assert lean_of(segment, 8.0, posterior, segment.finite) == 0.0


@pytest.mark.parametrize("length", [1, 5, 25, 50])
def test_pieces_that_are_no_multiple_of_the_steps_between_readings_show_none(length: int) -> None:
    """Their readings and losses are not of the same moments: a drift of the one would look like a lean."""
    level = torch.linspace(-1, 1, 1200, dtype=torch.float64).expand(8, -1)
    gen = torch.Generator().manual_seed(0)
    heat = 2.0 + 0.1 * torch.randn(8, 1200, generator=gen, dtype=torch.float64)
    pieces = []
    for start in range(0, 300, length):
        at = slice(4 * start, 4 * (start + length))
        moments = heat[:, at][:, ::STATS_EVERY][:, : -(-length // STATS_EVERY)]
        nothing = torch.zeros_like(moments)
        pieces.append(Segment(list(range(8)), level[:, start : start + length], moments, nothing, nothing, anchors={}))
    joined = Segment.join(pieces)
    assert joined.steps == 300 and joined.grad_square.shape[1] >= LEAST_READINGS
    assert lean_of(joined, 8.0, LocalPosterior(1.0, 0.0), joined.finite) == 0.0


class Steep(nn.Module):
    """The potential above, divided by n, beside regular directions that make the coefficient positive."""

    def __init__(self, n: int, push: float, count: int, curvature: float) -> None:
        super().__init__()
        self.n, self.push, self.curvature = n, push, curvature
        self.yz, self.rest = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(count))

    def forward(self) -> Tensor:
        loss, _, _ = gradients(self.yz[0], self.yz[1], self.push)
        return (loss + 0.5 * self.curvature * self.rest.square().sum()) / self.n


def estimate_of(
    sampler: SGLD | LeimkuhlerMatthews, push: float = 20.0, count: int = 40, curvature: float = 400.0
) -> Estimate:
    n = 100
    return estimate_llc(
        Steep(n, push, count, curvature), TensorDataset(torch.zeros(n)), lambda module, batch: module(), nbeta=float(n),
        localization=40.0, sampler=sampler,
        num_chains=32, num_draws=2000, num_burnin_steps=1000, full_batch=True, seed=0,
    )  # fmt: skip


def test_an_estimate_has_it_taken_off_and_in_its_error() -> None:
    """Beside the regular directions' ``20 * 400 / 440`` the potential's coefficient, -9.02."""
    estimate = estimate_of(SGLD(lr=4e-4))
    expected = truth(20.0, 40.0) + 20.0 * 400.0 / 440.0
    assert 0.05 < estimate.lean < estimate.step_bias
    assert estimate.se == pytest.approx(math.hypot(estimate.chain_se, estimate.owed, estimate.lean))
    assert estimate.mean == pytest.approx(expected, abs=2 * estimate.se)
    assert estimate.mean == pytest.approx(float(estimate.trace.double().mean()), rel=1e-5)


def test_one_below_zero_is_in_the_error_alone() -> None:
    """Where the loss is higher at steeper weights the whole of the heat is too much."""
    estimate = estimate_of(SGLD(lr=2e-3), -20.0, 80, 40.0)
    expected = truth(-20.0, 40.0) + 0.5 * 80 * 40.0 / (40.0 + 40.0)
    assert estimate.valid and estimate.lean < -0.05
    assert estimate.se == pytest.approx(math.hypot(estimate.chain_se, estimate.owed, estimate.lean))
    assert estimate.mean == pytest.approx(expected, abs=2 * estimate.se)


def test_shared_noise_has_no_lean_to_take_off_but_the_error_of_one() -> None:
    estimate = estimate_of(LeimkuhlerMatthews(lr=8e-4))
    assert estimate.step_bias == 0.0 and estimate.lean > 0.05
    assert estimate.se == pytest.approx(math.hypot(estimate.chain_se, estimate.owed, estimate.lean))


def test_a_regular_model_has_none() -> None:
    case = regular(10)
    estimate = estimate_llc(case.module, case.dataset, case.loss_fn, localization=1.0, seed=0)
    assert estimate.valid and estimate.lean == 0.0


def test_the_lean_is_shrunk_by_its_error_and_nothing_within_it() -> None:
    """``a - b² / a`` of covariances 2 to 5 readings apart, by plain sums over three chains."""
    g = torch.Generator().manual_seed(1)
    slowly = torch.sin(torch.arange(24.0, dtype=torch.float64) / 3)
    for scatter, seen in ((0.4, True), (3.0, False)):
        force = 5.0 + slowly + scatter * torch.randn(3, 24, generator=g, dtype=torch.float64)
        loss = 3.0 - 0.05 * slowly + 0.1 * torch.randn(3, 24, generator=g, dtype=torch.float64)
        flat = torch.zeros(3, 24, dtype=torch.float64)
        shown = Segment([0, 1, 2], loss.repeat_interleave(STATS_EVERY, dim=1), force, flat, flat, {})
        heat = 0.125 * 2.0 * force
        h, f = heat - heat.mean(), loss - loss.mean()
        each = torch.zeros(3, dtype=torch.float64)
        for lag in (2, 3, 4, 5):
            for a, b in ((h[:, lag:], (h - f)[:, :-lag]), (h[:, :-lag], (h - f)[:, lag:])):
                each += (a * b).mean(dim=1) / 8
        mean, error = float(each.mean()), float(each.std()) / 3**0.5
        assert (mean > error) is seen and error > 0.1 * abs(mean)
        found = lean_of(shown, 2.0, LocalPosterior(1.0, 0.0), shown.finite)
        assert found == pytest.approx(mean - error**2 / mean if seen else 0.0, rel=1e-9)
