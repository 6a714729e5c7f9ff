"""Stein's identity along real chains: the mean of the product of a loss's two linear parts is known."""

from __future__ import annotations

import torch

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.control import SteinControl
from lightning_slt.sampling.metric import Curvature, LowRankMetric
from tests.sampling.helpers import gen

POSTERIOR = LocalPosterior(3.0, 2.0)


def quartic_slope(delta: torch.Tensor) -> torch.Tensor:
    """Gradient of ``sum (delta² / 2 + delta⁴ / 4)``."""
    return delta + delta**3


def draws(n: int) -> torch.Tensor:
    """From ``exp(-3 (u²/2 + u⁴/4) - u²)`` in each of four directions, by rejection from its Gaussian."""
    g = gen(3)
    u = torch.randn(4, 4 * n, generator=g, dtype=torch.float64) * (3.0 + 2.0) ** -0.5
    kept = torch.rand(4, 4 * n, generator=g, dtype=torch.float64) < torch.exp(-3 * u**4 / 4)
    return torch.stack([row[k][:n] for row, k in zip(u, kept, strict=True)], dim=1)


def test_the_product_has_the_known_mean_though_the_posterior_is_no_gaussian() -> None:
    """40,000 independent draws: every one of 25 means within 4 of its errors (by chance beyond that: 0.2 %)."""
    anchor = torch.linspace(-1, 1, 4, dtype=torch.float64)
    gradients = torch.randn(5, 4, generator=gen(0), dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(4, 2, generator=gen(1), dtype=torch.float64)).Q
    metric = LowRankMetric.of(Curvature(torch.tensor([2.0, 0.7]).double(), basis, 0.5), POSTERIOR)
    control = SteinControl(gradients, anchor, POSTERIOR, metric)
    delta = draws(40_000)
    direct, pulled = control(anchor + delta, quartic_slope(delta))
    products = direct[:, :, None] * pulled[:, None, :]
    expected = control.expected(torch.arange(5), torch.arange(5))
    error = products.std(dim=0) / 40_000**0.5
    assert float(((products.mean(dim=0) - expected) / error).abs().max()) < 4
    # and it is not the covariance, which is narrower than the metric takes it to be
    assert float((direct.T @ direct / 40_000 - expected).norm() / expected.norm()) > 0.05
    torch.testing.assert_close(control.diagonal(torch.arange(5)), expected.diagonal(), rtol=1e-12, atol=0)
    some = torch.tensor([3, 1])
    torch.testing.assert_close(control.expected(some, torch.arange(5)), expected[some], rtol=1e-12, atol=0)
