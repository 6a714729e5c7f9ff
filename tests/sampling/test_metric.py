"""The metric of low rank: the steepest directions of a known quadratic, and a posterior that it makes round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.metric import Curvature, LowRankMetric, curvature_at
from tests.sampling.helpers import gen

POSTERIOR = LocalPosterior(50.0, 2.0)


def quadratic(eigenvalues: list[float], seed: int = 0) -> Tensor:
    d = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=gen(seed), dtype=torch.float64))
    return (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def found(h: Tensor, rank: int = 64) -> Curvature:
    anchor = torch.linspace(1, 2, len(h), dtype=torch.float64)
    return curvature_at(anchor, lambda w: (w - anchor) @ h, gen(1), rank)


def dense(p: LowRankMetric, d: int) -> Tensor:
    return p(torch.eye(d, dtype=torch.float64))


def test_all_directions_of_a_small_model_and_a_posterior_that_is_exactly_round() -> None:
    values = [30.0, 5.0, 1.0, 0.2, 0.01, 0.003]
    h = quadratic(values)
    curvature = found(h)
    # differences over a hundredth of |w*| lose some digits: 1e-6 of the largest
    torch.testing.assert_close(curvature.values, torch.tensor(values).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(h @ curvature.vectors, curvature.vectors * curvature.values, rtol=0, atol=1e-6)
    p = dense(LowRankMetric.of(curvature, POSTERIOR), 6)
    precision = POSTERIOR.nbeta * h + POSTERIOR.localization * torch.eye(6).double()
    torch.testing.assert_close(p @ precision @ p.T, torch.eye(6).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(p, p.T)
    assert curvature.largest == pytest.approx(30.0)


def test_the_steepest_of_many_directions() -> None:
    """Ten steep ones over a floor of 190, rank 16: after two multiplications that both stay in the space searched, the
    smallest eigenvalue that is wanted (2, forty times the floor) is right to five digits, over 20 seeds."""
    values = [float(2**k) for k in range(10, 0, -1)] + [0.05] * 190
    h = quadratic(values)
    steep = torch.tensor(values[:10]).double()
    anchor = torch.linspace(1, 2, 200, dtype=torch.float64)
    estimates = torch.stack(
        [curvature_at(anchor, lambda w: (w - anchor) @ h, gen(seed), 16).values[:10] for seed in range(20)]
    )
    torch.testing.assert_close(estimates, steep.expand(20, -1), rtol=2e-5, atol=1e-5 * 1024)
    assert float((estimates[:, -1] - 2.0).abs().max()) < 1e-4
    assert bool((estimates < steep * (1 + 1e-5)).all())
    curvature = found(h, rank=16)
    precision = POSTERIOR.nbeta * h + POSTERIOR.localization * torch.eye(200).double()
    p = dense(LowRankMetric.of(curvature, POSTERIOR), 200)
    before, after = torch.linalg.eigvalsh(precision), torch.linalg.eigvalsh(p @ precision @ p)
    assert float(before[-1] / before[0]) > 1e4
    # the 2.4 % missed of the weakest, scaled as the floor is (23 times too far), leave half: far below the
    # (2 / 0.7)² = 8 where the default step would be unstable
    assert float(after[-1]) < 2.0 and float(after[0]) > 0.5


def test_the_mean_curvature_is_the_trace_over_the_dimension() -> None:
    """16 directions of signs: the error of one is at most sqrt(2) |H| / d, 0.55 % of the trace here over 16 of them,
    so that 3 % is more than five of it."""
    h = quadratic([1.0 + k / 500 for k in range(1000)], seed=2)
    mean = float(h.trace()) / 1000
    error = float(2**0.5 * h.norm()) / 1000 / 4
    assert error < 0.03 * mean / 2
    assert abs(found(h, rank=4).mean - mean) < 5 * error


def test_directions_downhill_and_flat_ones_are_not_steep() -> None:
    curvature = found(quadratic([4.0, 1.0, 0.0, -3.0]))
    steep = curvature.values > 1e-6
    torch.testing.assert_close(curvature.values[steep], torch.tensor([4.0, 1.0]).double(), rtol=0, atol=1e-6)
    p = dense(LowRankMetric.of(curvature, POSTERIOR), 4)
    assert bool(torch.isfinite(p).all()) and float(torch.linalg.eigvalsh(p)[-1]) < POSTERIOR.localization**-0.5 + 1e-9


def test_gradients_that_are_not_finite_and_no_room_leave_one_scale() -> None:
    anchor = torch.ones(5)
    curvature = curvature_at(anchor, lambda w: torch.full_like(w, torch.nan), gen(0))
    assert len(curvature.values) == 0 and curvature.vectors.shape == (5, 0)
    p = LowRankMetric.of(Curvature(anchor.new_zeros(0), anchor.new_zeros(5, 0), 0.5), POSTERIOR)
    torch.testing.assert_close(p(torch.ones(2, 5)), torch.full((2, 5), (50.0 * 0.5 + 2.0) ** -0.5))
