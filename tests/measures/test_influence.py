"""The torchmetric says what the functions say, however the draws were fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import Influence
from lightning_slt.functional.between_chains import between_share, factor_of
from lightning_slt.functional.block_errors import mean_and_error
from lightning_slt.functional.influence import correlation, covariance, shrink, variance
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.influence import probe_set
from lightning_slt.influence.reader import InfluenceReader
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.objective import Objective


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
    whole = factor_of(between_share(x), x.shape[1])
    expected = covariance(x, y).scaled(whole)
    assert torch.equal(got["matrix"], expected.matrix) and torch.equal(got["se"], expected.se)
    own, own_query = variance(x)[0] * whole, variance(y)[0] * whole
    assert torch.equal(got["correlation"], correlation(expected.matrix, own, own_query))
    assert torch.equal(got["self_influence"], own)
    torch.testing.assert_close(got["mean_loss"], 1000.0 + mean_and_error(x)[0])
    # and of the losses themselves to float32 of the differences
    torch.testing.assert_close(got["matrix"], covariance(train, query).matrix * whole, rtol=1e-5, atol=1e-6)


def test_the_estimate_and_the_metric_say_the_same_of_the_same_draws() -> None:
    """AR(1) draws, a memory of 0.8 in chains of 20: a chain's own mean takes three tenths of the variance. Over 400
    repetitions of losses of variance 1, in directions of their own, the metric finds 0.962 +- 0.006 (the factor is a
    quotient, of four chains), in three ranges of seeds; without the factor 0.69."""
    module = nn.Linear(3, 1)
    data = TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
    objective, source = Objective(module, squares, None, torch.device("cpu")), DatasetSource(data, 8)
    queries = DatasetSource(TensorDataset(*(t[:4] for t in data.tensors)), 4)
    reader = InfluenceReader(objective, probe_set(source, queries, None, None, 0), 0)
    posterior, found = LocalPosterior(10.0, 1.0), []
    for seed in range(400):
        trace = autocorrelated(4, 20, 12, 0.8, seed).float()
        metric = Influence()
        metric.update(trace[:, :, :8], trace[:, :, 8:])
        got = metric.compute()
        if not found:
            estimate = reader.read(trace, torch.ones(4, dtype=torch.bool), posterior, 8)
            assert estimate.valid and estimate.matrix.shape == (4, 8)
            for name in ("matrix", "correlation", "se", "self_influence"):
                torch.testing.assert_close(got[name], getattr(estimate, name), rtol=1e-9, atol=1e-12)
        found.append(float(got["self_influence"].mean()))
    assert 0.9 < sum(found) / len(found) < 1.02


def squares(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean(dim=1)


def autocorrelated(chains: int, draws: int, n: int, memory: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(chains, draws, n, generator=g, dtype=torch.float64)
    for t in range(1, draws):
        out[:, t] = memory * out[:, t - 1] + (1 - memory**2) ** 0.5 * out[:, t]
    return out


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


def test_training_samples_that_are_their_own_queries_are_kept_above_the_same_start() -> None:
    """In float32 a million has steps of a sixteenth: kept as they are, the queries' losses would have lost theirs."""
    train, _ = losses()
    start = train.mean(dim=(0, 1)) + 1e6
    alone, twice = Influence(), Influence()
    alone.update(train + 1e6, init_train=start)
    twice.update(train + 1e6, train + 1e6, start, start)
    same(alone.compute(), twice.compute())
    torch.testing.assert_close(alone.draws()[1].double(), train + 1e6 - start, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone.compute()["mean_loss"], start, rtol=0, atol=1e-6)


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
    with pytest.raises(ValueError, match=r"shrinkage=nan: must be at least 1"):
        Influence(shrinkage=float("nan"))
    with pytest.raises(TypeError, match=r"shrinkage='a': expected a number, got str"):
        Influence(shrinkage="a")  # type: ignore[arg-type]
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
