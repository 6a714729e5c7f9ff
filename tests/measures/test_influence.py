"""The torchmetric says what the functions say, however the draws were fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_slt import Influence
from lightning_slt.functional.influence import correlation, covariance, mean_and_error, shrink, variance


def losses(chains: int = 4, draws: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of six training samples and two queries, a thousand above zero, with a shared part."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(chains, draws, 1, generator=g, dtype=torch.float64)
    noise = torch.randn(chains, draws, 8, generator=g, dtype=torch.float64)
    both = 1000.0 + noise + shared * torch.linspace(-1, 1, 8, dtype=torch.float64)
    return both[..., :6], both[..., 6:]


def same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-12) -> None:
    assert a.keys() == b.keys() == {"matrix", "correlation", "se", "self_influence", "mean_loss"}
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=rtol, atol=1e-12)


def test_compute_is_the_covariance() -> None:
    train, query = losses()
    start, other = torch.full((6,), 1000.0), torch.full((2,), 1000.0)
    metric = Influence()
    metric.update(train, query, start, other)
    got = metric.compute()
    x, y = (train - 1000).float(), (query - 1000).float()  # what is kept
    expected = covariance(x, y)
    assert torch.equal(got["matrix"], expected.matrix) and torch.equal(got["se"], expected.se)
    own, own_query = variance(x)[0], variance(y)[0]
    assert torch.equal(got["correlation"], correlation(expected.matrix, own, own_query))
    assert torch.equal(got["self_influence"], own)
    torch.testing.assert_close(got["mean_loss"], 1000.0 + mean_and_error(x)[0])
    # and of the losses themselves to float32 of the differences
    torch.testing.assert_close(got["matrix"], covariance(train, query).matrix, rtol=1e-5, atol=1e-6)


def test_draws_fed_in_pieces_give_what_the_whole_gives() -> None:
    train, query = losses()
    whole, pieces = Influence(shrinkage=1.5), Influence(shrinkage=1.5)
    whole.update(train, query)
    for part in (slice(0, 1), slice(1, 40), slice(40, 96)):
        pieces.update(train[:, part], query[:, part])
    same(pieces.compute(), whole.compute())
    plain = Influence()
    plain.update(train, query)
    expected = shrink(plain.compute()["matrix"], plain.compute()["correlation"], 1.5)
    torch.testing.assert_close(whole.compute()["matrix"], expected)


def test_training_samples_are_their_own_queries() -> None:
    train, _ = losses()
    alone, twice = Influence(), Influence()
    alone.update(train)
    twice.update(train, train)
    same(alone.compute(), twice.compute())
    got = alone.compute()
    torch.testing.assert_close(got["matrix"], got["matrix"].T)
    torch.testing.assert_close(got["matrix"].diagonal(), got["self_influence"], rtol=1e-9, atol=0)


def test_reset_forgets_and_half_precision_is_taken() -> None:
    first, second = losses(seed=1), losses(seed=2)
    metric, fresh = Influence(), Influence()
    metric.update(*first)
    metric.reset()
    metric.update(*(t.float() for t in second))
    fresh.update(*second)
    same(metric.compute(), fresh.compute(), rtol=1e-2)


def test_two_processes_are_merged_chain_after_chain() -> None:
    first, second = losses(seed=1), losses(seed=2)
    whole = Influence()
    whole.update(*(torch.cat([a, b]) for a, b in zip(first, second, strict=True)), torch.ones(6), torch.ones(2))
    parts = []
    for part in (first, second):
        metric = Influence(
            distributed_available_fn=lambda: True, dist_sync_fn=lambda value, group=None: gathered(value, parts)
        )
        metric.update(*part, torch.ones(6), torch.ones(2))
        parts.append(metric)

    def gathered(value: Tensor, of: list[Any]) -> list[Tensor]:
        """What the same state is in both processes."""
        for name in ("train_trace", "query_trace"):
            own = getattr(of[0], f"_{name}")
            if torch.equal(value, own):
                return [getattr(p, f"_{name}") for p in of]
        return [value, value]

    for metric in parts:
        for name in ("train_trace", "query_trace"):
            metric.__dict__[f"_{name}"] = getattr(metric, name)[0]
    same(parts[0].compute(), whole.compute())


def test_plot_returns_the_figure_and_the_axes() -> None:
    metric = Influence()
    metric.update(*losses())
    figure, axes = metric.plot()
    assert isinstance(figure, Figure) and axes.figure is figure
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), metric.compute()["correlation"])
    again, own = metric.plot(metric.compute(), axes)
    assert again is figure and own is axes


def test_errors() -> None:
    train, query = losses()
    with pytest.raises(ValueError, match=r"expected \[num_chains, draws, n\] with the same chains and draws"):
        Influence().update(train, query[:, 1:])
    with pytest.raises(ValueError, match=r"expected \[num_chains, draws, n\]"):
        Influence().update(train[0])
    with pytest.raises(ValueError, match=r"shrinkage=0\.5"):
        Influence(shrinkage=0.5)
    with pytest.warns(UserWarning, match="compute"), pytest.raises(ValueError, match="no draws"):
        Influence().compute()


@pytest.mark.parametrize("changed", ["init_train", "init_query"])
def test_losses_at_the_start_that_change_between_updates_are_refused(changed: str) -> None:
    """They had moved half of the draws: an influence of 2.6 between losses that had none."""
    draws = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0)) + 3.0
    start = {"init_train": torch.full((3,), 3.0), "init_query": torch.full((3,), 3.0)}
    metric = Influence()
    metric.update(draws, draws, **start)
    with pytest.raises(ValueError, match=f"{changed}: not that of the update before"):
        metric.update(draws, draws, **{name: value for name, value in start.items() if name != changed})
    metric.reset()
    metric.update(draws, draws)
