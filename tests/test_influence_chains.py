"""Influence in one call: how it is sampled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    TensorDataset,
)

from lightning_slt import SGLD, estimate_influence
from lightning_slt.functional.block_errors import blocks_per_chain
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.influence import probe_set, reading_interval
from lightning_slt.influence.reader import InfluenceReader
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.objective import Objective
from tests.influences import same, squares, tiny
from tests.sampling.helpers import gen, mlp, regression


def test_another_sampler() -> None:
    data = regression(32)
    inf = tiny(
        mlp(), data, None, squares, sampler=SGLD(), nbeta=10.0, localization=5.0, num_draws=40, num_steps_bw_draws=4
    )
    assert inf.nbeta == 10.0 and inf.localization == 5.0 and inf.matrix.shape == (32, 32)
    given = tiny(mlp(), data, None, squares, sampler=SGLD(lr=1e-3), localization=5.0)
    assert given.nbeta == pytest.approx(32 / np.log(32)) and bool(torch.isfinite(given.matrix).all())


def test_the_posterior_that_is_asked_for_is_used() -> None:
    data = regression(32)
    both = tiny(mlp(), data, nbeta=300.0, localization=70.0)
    assert (both.nbeta, both.localization) == (300.0, 70.0)
    one, other, none = tiny(mlp(), data, nbeta=300.0), tiny(mlp(), data, localization=70.0), tiny(mlp(), data)
    # the same damping for all: 2.5 times the mean curvature
    damping = one.localization / one.nbeta
    assert other.localization / other.nbeta == pytest.approx(damping) == none.localization / none.nbeta
    assert one.nbeta == 300.0 and other.localization == 70.0
    anchor = torch.cat([p.detach().flatten() for p in mlp().parameters()])
    assert none.localization == pytest.approx(len(anchor) / (0.35**2 * float(anchor.square().sum())), rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-6])
def test_weights_that_are_zero_have_a_region_in_which_losses_differ(scale: float) -> None:
    """As of a layer that begins at zero: a share of a norm of nothing was a localisation of 2e13, and noise was valid.
    The local posterior of linear regression is Gaussian, its mean is downhill of these weights."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=g)
    y = x.sum(dim=1) + 0.3 * torch.randn(60, generator=g)
    net = nn.Linear(3, 1, bias=False)
    nn.init.constant_(net.weight, scale)
    inf = estimate_influence(
        net, TensorDataset(x, y), None, lambda m, b: 0.5 * (m(b[0])[:, 0] - b[1]).square().mean(), shrinkage=1.0
    )
    rows, hessian = x.double(), (x.T @ x / 60).double()
    spread = torch.linalg.inv(inf.nbeta * hessian + inf.localization * torch.eye(3).double())
    mean = scale + spread @ (inf.nbeta * (rows.T @ (y.double() - rows.sum(dim=1) * scale)) / 60)
    residual, shared = rows @ mean - y, rows @ spread @ rows.T
    exact = torch.outer(residual, residual) * shared + 0.5 * shared.square()
    assert inf.valid and float((inf.matrix - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("settings", [{}, {"control_variates": False}])
def test_chains_far_from_the_posterior_burn_in_until_they_are_there(settings: dict[str, Any]) -> None:
    """The posterior's mean is 21 of its widths away. Read on the way, covariances were 3.3 times the exact ones (0.955
    with control variates), with all of 20 seeds valid."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=g)
    y = x.sum(dim=1) + 0.3 * torch.randn(60, generator=g)
    net = nn.Linear(3, 1, bias=False)
    nn.init.constant_(net.weight, 0.05)
    found, rows = [], x.double()
    for seed in range(6):
        data = TensorDataset(x, y)
        inf = estimate_influence(
            net, data, None, lambda m, b: 0.5 * (m(b[0])[:, 0] - b[1]).square().mean(), seed=seed, **settings
        )
        precision = inf.nbeta * rows.T @ rows / 60 + inf.localization * torch.eye(3).double()
        spread = torch.linalg.inv(precision)
        mean = 0.05 + spread @ (inf.nbeta * (rows.T @ (y.double() - 0.05 * rows.sum(dim=1))) / 60)
        residual, shared = rows @ mean - y, rows @ spread @ rows.T
        exact = torch.outer(residual, residual) * shared + 0.5 * shared.square()
        assert inf.valid
        found.append(float((inf.matrix * exact).sum() / exact.square().sum()))
    spread_of = 0.01 if not settings else 0.15
    assert sum(found) / 6 == pytest.approx(1.0, abs=3 * spread_of / 6**0.5), found


def test_minibatches_and_all_data() -> None:
    data = regression(64)
    kinds = [{}, {"full_batch": True}, {"batch_size": 64}, {"batch_size": 16}, {"batch_size": 16, "full_batch": True}]
    found = [tiny(mlp(), data, **kind) for kind in kinds]
    for k in (1, 4):
        assert same(found[0], found[k])
    assert not same(found[0], found[3])
    assert bool(torch.isfinite(found[3].matrix).all())


@pytest.mark.parametrize("batch_size", [None, 8])
def test_both_engines_give_the_same_numbers(batch_size: Any) -> None:
    data = regression(32)
    one, all_at_once = (tiny(mlp(), data, method=m, batch_size=batch_size) for m in ("sequential", "batched"))
    scale = float(one.matrix.abs().max())
    torch.testing.assert_close(one.matrix, all_at_once.matrix, rtol=1e-3, atol=1e-3 * scale)
    torch.testing.assert_close(one.mean_loss, all_at_once.mean_loss, rtol=1e-3, atol=0)


def test_the_same_seed_gives_the_same_answer_and_another_another() -> None:
    data = regression(24)
    first, again, other = tiny(mlp(), data), tiny(mlp(), data), tiny(mlp(), data, seed=2)
    assert same(first, again) and not torch.allclose(first.matrix, other.matrix)


def test_one_chain() -> None:
    inf = tiny(mlp(), regression(16), num_chains=1, num_draws=64)
    assert inf.valid and inf.num_chains == 1 and inf.num_blocks == blocks_per_chain(1, 64) == 16
    assert np.isnan(inf.between_share) and bool((inf.se > 0).all()) and "NOT VALID" not in str(inf)


def test_what_no_error_of_few_readings_can_say_is_noted() -> None:
    """One chain has blocks alone, of 4 readings here; four chains have themselves. Chains with a memory of 0.9 draws,
    in 20 of them (all 20 seeds), show two thirds of a variance at the most."""
    one = tiny(mlp(), regression(16), num_chains=1, num_draws=9)
    assert any("9 readings of one chain: what is correlated over more than 4 of them" in note for note in one.notes)
    assert tiny(mlp(), regression(16), num_draws=9).notes == ()
    data = TensorDataset(*regression(16).tensors)
    reader = InfluenceReader(
        Objective(mlp(), squares, None, torch.device("cpu")), probe_set(DatasetSource(data, 16), None, None, None, 0), 0
    )
    for seed in range(20):
        trace = torch.randn(4, 20, 16, generator=gen(seed), dtype=torch.float64)
        independent = reader.read(trace, torch.ones(4, dtype=torch.bool), LocalPosterior(1.0, 1.0), 16)
        assert independent.valid and independent.notes == ()
        for t in range(1, 20):
            trace[:, t] = 0.9 * trace[:, t - 1] + (1 - 0.9**2) ** 0.5 * trace[:, t]
        slow = reader.read(trace, torch.ones(4, dtype=torch.bool), LocalPosterior(1.0, 1.0), 16)
        assert not slow.valid or "chains of 20 readings are short for their memory" in slow.notes[0]


def test_few_readings_are_not_valid_and_say_why() -> None:
    inf = tiny(mlp(), regression(16), num_draws=2)
    assert not inf.valid and "2 readings of 4 chains are too few" in inf.reasons
    none = tiny(mlp(), regression(16), num_draws=1)
    assert not none.valid and none.matrix.numel() == 0 and "NOT VALID" in str(none)


def test_a_sharp_bend_shortens_the_step() -> None:
    """A quartic far steeper away from w* than its curvature there says."""

    def quartic(module: nn.Module, batch: Any) -> Tensor:
        return squares(module, batch) + 1e4 * (module(batch[0]) - batch[1]).square().square().mean(dim=1)

    net = nn.Linear(3, 1, bias=False)
    nn.init.ones_(net.weight)
    x = torch.randn(32, 3, generator=gen(0))
    inf = tiny(net, TensorDataset(x, x.sum(dim=1, keepdim=True)), None, quartic, localization=1.0)
    assert inf.num_chains == 4 and bool(torch.isfinite(inf.matrix).all())


def test_shrinkage_is_noted() -> None:
    plain, shrunk = tiny(mlp(), regression(16)), tiny(mlp(), regression(16), shrinkage=1.5)
    assert shrunk.shrinkage == 1.5 and any("1.5" in note for note in shrunk.notes)
    torch.testing.assert_close(shrunk.matrix, plain.matrix * plain.correlation.abs().sqrt())


def test_reading_interval_is_a_multiple_of_four_and_grows_with_the_samples() -> None:
    found = [reading_interval(n, 64, 10**6) for n in (10, 1000, 10_000)]
    assert found == sorted(found) and all(k % 4 == 0 for k in found) and found[0] == 4
