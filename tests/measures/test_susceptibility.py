"""Susceptibility as a metric: stretches, and processes, join to the two-pass answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_slt import Susceptibility

CHAINS, DRAWS, SHIFTS, NBETA = 4, 300, 3, 50.0


def traces() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(CHAINS, DRAWS, 1, generator=g)
    loss = 100.0 + 0.1 * (shared[:, :, 0] + torch.randn(CHAINS, DRAWS, generator=g))
    shifted = 90.0 + 0.1 * (shared * torch.tensor([1.0, -2.0, 5.0]) + torch.randn(CHAINS, DRAWS, SHIFTS, generator=g))
    return loss, shifted


def two_pass(loss: Tensor, shifted: Tensor) -> Tensor:
    """The covariance within chains, each chain's own mean replaced as the share of variance between them says."""
    loss, delta = loss.double(), shifted.double() - loss.double().unsqueeze(2)
    rows = []
    for chain in range(len(loss)):
        both = torch.cat([NBETA * loss[chain, None], delta[chain].T])
        rows.append(torch.cov(both)[0, 1:])
    within, between = loss.var(dim=1).mean(), loss.mean(dim=1).var()
    whole = (
        1 - 1 / loss.shape[1]
    ) * within + between  # an unbiased variance within has its chain's mean's part already
    return -torch.stack(rows).mean(dim=0) * whole / within


def test_stretches_join_to_the_two_pass_answer_in_float64() -> None:
    loss, shifted = traces()
    metric = Susceptibility(nbeta=NBETA)
    for start in range(0, DRAWS, 70):
        metric.update(loss[:, start : start + 70], shifted[:, start : start + 70])
    expected = two_pass(loss, shifted)
    assert float(((metric.compute()["chi"] - expected) / expected).abs().max()) < 1e-6
    assert metric.compute()["per_chain"].shape == (CHAINS, SHIFTS)


def test_processes_with_unequal_numbers_of_chains_are_merged_with_nothing_counted_twice() -> None:
    loss, shifted = traces()
    parts = []
    for some in (slice(0, 3), slice(3, 4)):
        part = Susceptibility(nbeta=NBETA)
        part.update(loss[some, :100], shifted[some, :100])
        part.update(loss[some, 100:], shifted[some, 100:])
        parts.append(part)
    gathered = iter([[p.loss_trace[0] for p in parts], [p.shift_trace[0] for p in parts]])
    metric = Susceptibility(nbeta=NBETA)
    metric.update(loss[:3, :100], shifted[:3, :100])
    metric.update(loss[:3, 100:], shifted[:3, 100:])
    metric.sync(dist_sync_fn=lambda value, group=None: next(gathered), distributed_available=lambda: True)
    expected = two_pass(loss, shifted)
    assert float(((metric.response().chi - expected) / expected).abs().max()) < 1e-6


def test_one_shift_may_be_given_without_a_dimension_of_its_own() -> None:
    loss, shifted = traces()
    one, all_of_them = Susceptibility(nbeta=NBETA), Susceptibility(nbeta=NBETA)
    one.update(loss, shifted[:, :, 1])
    all_of_them.update(loss, shifted)
    assert one.response().chi[0] == all_of_them.response().chi[1]


def test_wrong_arguments_are_named() -> None:
    loss, shifted = traces()
    with pytest.raises(ValueError, match=r"nbeta=-1.0: must be positive"):
        Susceptibility(nbeta=-1.0)
    with pytest.raises(ValueError, match=r"nbeta=inf: must be positive"):
        Susceptibility(nbeta=float("inf"))
    with pytest.raises(TypeError, match=r"nbeta='a': expected a number, got str"):
        Susceptibility(nbeta="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"loss \(4, 299\), shifted_loss \(4, 300, 3\): expected"):
        Susceptibility(nbeta=1.0).update(loss[:, 1:], shifted)
    with pytest.raises(ValueError, match="no draws: call update"):
        Susceptibility(nbeta=1.0).response()


def test_plot_shows_every_shift_with_its_error() -> None:
    metric = Susceptibility(nbeta=NBETA)
    metric.update(*traces())
    figure, axes = metric.plot()
    assert figure is axes.get_figure() and len(axes.lines[0].get_xdata()) == SHIFTS
    found = metric.response()
    (bars,) = axes.collections
    ends = torch.tensor([segment[:, 1].tolist() for segment in bars.get_segments()]).double()
    torch.testing.assert_close(ends.mean(dim=1), found.chi, rtol=1e-6, atol=0)
    torch.testing.assert_close(ends[:, 1] - ends[:, 0], 4 * found.se, rtol=1e-5, atol=0)
