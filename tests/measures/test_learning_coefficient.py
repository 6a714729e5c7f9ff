"""The torchmetric says what the function says, however the draws were fed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_slt import LearningCoefficient
from lightning_slt.functional import learning_coefficient, summarise


def losses(chains: int = 4, draws: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    anchor = 0.5 + 0.1 * torch.randn(chains, draws, generator=gen)
    return anchor + 0.05 + 0.01 * torch.randn(chains, draws, generator=gen), anchor


def test_draws_fed_in_stretches_give_what_the_whole_trace_gives() -> None:
    loss, anchor = losses()
    metric = LearningCoefficient(nbeta=50.0)
    for part in (slice(0, 1), slice(1, 40), slice(40, 120)):
        metric.update(loss[:, part], anchor[:, part])
    expected = summarise(learning_coefficient(loss, anchor, 50.0))
    got = metric.compute()
    assert got["mean"].item() == pytest.approx(expected.mean, abs=1e-12)
    assert got["se"].item() == pytest.approx(expected.se, abs=1e-12)
    assert got["rhat"].item() == pytest.approx(expected.rhat, abs=1e-12)
    assert got["ess"].item() == pytest.approx(expected.ess, rel=1e-12)
    assert got["valid"].item() == 1.0 and got["num_bad_chains"].item() == 0.0


def test_a_nan_chain_is_counted_and_left_out() -> None:
    loss, anchor = losses(chains=8)
    loss[2, 50] = math.nan
    metric = LearningCoefficient(nbeta=50.0)
    metric.update(loss, anchor)
    keep = [0, 1, 3, 4, 5, 6, 7]
    assert metric.compute()["num_bad_chains"].item() == 1.0
    assert metric.compute()["mean"].item() == pytest.approx(
        float(learning_coefficient(loss[keep], anchor[keep], 50.0).mean()), abs=1e-12
    )


def test_reset_forgets() -> None:
    metric = LearningCoefficient(nbeta=50.0)
    metric.update(*losses(seed=1))
    metric.reset()
    metric.update(*losses(seed=2))
    assert metric.draws().shape == (4, 120)
    assert metric.compute()["mean"].item() == pytest.approx(
        summarise(learning_coefficient(*losses(seed=2), 50.0)).mean, abs=1e-12
    )


def test_two_processes_are_merged_chain_after_chain() -> None:
    first, second = losses(seed=1), losses(seed=2)
    other = learning_coefficient(*second, 50.0)

    def gather(tensor: Tensor, group: Any = None) -> list[Tensor]:
        return [tensor, other]

    metric = LearningCoefficient(nbeta=50.0, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(*first)
    both = torch.cat([learning_coefficient(*first, 50.0), other])
    assert metric.compute()["mean"].item() == pytest.approx(summarise(both).mean, abs=1e-12)
    assert metric.compute()["se"].item() == pytest.approx(summarise(both).se, abs=1e-12)
    assert metric.draws().shape == (4, 120)  # its own again, after the synchronisation


@pytest.mark.parametrize("nbeta", [0.0, -1.0, math.nan])
def test_nbeta_out_of_range(nbeta: float) -> None:
    with pytest.raises(ValueError, match=r"nbeta=.*positive"):
        LearningCoefficient(nbeta=nbeta)


def test_losses_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="init_loss"):
        LearningCoefficient(nbeta=1.0).update(torch.zeros(2, 3), torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(8,), (1, 2, 8)])
def test_losses_without_chains_and_draws_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\[num_chains, draws\\]"):
        LearningCoefficient(1.0).update(torch.zeros(shape), torch.zeros(shape))


def test_plot_shows_the_running_mean_of_each_chain() -> None:
    metric = LearningCoefficient(nbeta=50.0)
    metric.update(*losses())
    figure, axes = metric.plot()
    assert len(axes.lines) == 4 and axes.figure is figure
    assert axes.lines[2].get_ydata()[-1] == pytest.approx(float(metric.draws()[2].mean()), abs=1e-9)
