"""Losses that depend on which samples are together in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_slt import SGLD, estimate_llc
from lightning_slt.firing import Course, firing_settings
from lightning_slt.sampling.anchor import coupling, let_pass, open_window
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.objective import Objective
from tests.sampling.helpers import cross_entropy, gen, mean_squared, mlp, regression


def asked(objective: Objective, source: DatasetSource) -> bool | None:
    open_window(objective, source)
    return coupling(objective, source)


def in_batch_negatives(module: nn.Module, batch: Any) -> Tensor:
    scores = module(batch[0]) @ batch[1].T
    return F.cross_entropy(scores, torch.arange(len(scores)))


def pairs(module: nn.Module, batch: Any) -> Tensor:
    residual = module(batch[0]) - batch[1]
    differences = residual - residual.T
    return 0.5 * differences.square().sum() / (2 * len(residual) * (len(residual) - 1))


def weighted_classes(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1].argmax(1), weight=torch.tensor([1.0, 5.0, 25.0]))


def unmasked(module: nn.Module, batch: Any) -> Tensor:
    mask = batch[1] > 0
    return (module(batch[0]).square() * mask).sum() / mask.sum()


def with_penalty(module: nn.Module, batch: Any) -> Tensor:
    return mean_squared(module, batch) + 0.1 * sum(p.square().sum() for p in module.parameters())


def drawn(module: nn.Module, batch: Any) -> Tensor:
    return mean_squared(module, (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]))


def weighted_samples(module: nn.Module, batch: Any) -> Tensor:
    weights = batch[0][:, 0].abs()
    return ((module(batch[0]) - batch[1]).square().mean(1) * weights).sum() / weights.sum()


def augmented_negatives(module: nn.Module, batch: Any) -> Tensor:
    return in_batch_negatives(module, (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]))


@pytest.mark.parametrize(
    ("loss_fn", "coupled"),
    [
        (in_batch_negatives, True),
        (weighted_classes, True),
        (unmasked, True),
        (mean_squared, False),
        (cross_entropy, False),
        (with_penalty, False),
        (lambda module, batch: len(batch[0]) * mean_squared(module, batch), False),  # a sum
        (lambda module, batch: (module(batch[0]) - batch[1]).square().sum(1), False),  # one loss a sample
        (drawn, False),
        (augmented_negatives, True),
    ],
)
def test_no_batch_comes_back_where_a_loss_couples_its_samples(
    loss_fn: Callable[[nn.Module, Any], Tensor], coupled: bool
) -> None:
    source = DatasetSource(regression(96), 9)
    held = source.window(0)
    objective = Objective(mlp(), loss_fn)
    assert asked(objective, source) is coupled
    if coupled:
        let_pass(objective, source)
    assert source.resident is not coupled
    assert (source.window(0) is held) is not coupled
    if coupled:
        assert source.window(0).anchor_loss
        first = {tuple(batch[0].flatten().tolist()) for batch in source.window(0).batches}
        assert len(first) == len(source.window(0)) > len(held)
        assert first.isdisjoint(tuple(batch[0].flatten().tolist()) for batch in source.window(1).batches)


def neighbours(residual: Tensor) -> Tensor:
    return residual[0::2] - residual[1::2]


def both_halves(residual: Tensor) -> Tensor:
    return residual[: len(residual) // 2] - residual[len(residual) // 2 :]


def both_ends(residual: Tensor) -> Tensor:
    return (residual - residual.flip(0))[: len(residual) // 2]


def triplets(residual: Tensor) -> Tensor:
    anchor, near, far = residual.view(-1, 3, residual.shape[1]).unbind(1)
    return (anchor - near).square() - 0.1 * (anchor - far).square()


@pytest.mark.parametrize(
    ("compare", "batch_size"),
    [(way, size) for way in (neighbours, both_halves, both_ends) for size in (2, 4, 6, 8, 12, 16)]
    + [(triplets, size) for size in (3, 6, 12, 18, 24)],
)
def test_samples_that_are_compared_by_their_places_are_coupled(
    compare: Callable[[Tensor], Tensor], batch_size: int
) -> None:
    """Whichever places these are: of neighbours the two halves of a batch know nothing of each other."""
    source = DatasetSource(regression(96), batch_size)
    objective = Objective(mlp(), lambda module, batch: compare(module(batch[0]) - batch[1]).square().mean())
    assert asked(objective, source) is True


def test_all_the_data_in_one_batch_stays_one_batch() -> None:
    source = DatasetSource(regression(32), 32)
    held, objective = source.window(0), Objective(mlp(), in_batch_negatives)
    assert asked(objective, source) is None
    let_pass(objective, source)
    assert source.resident and source.window(0) is held


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_pairs_within_a_batch_have_the_coefficient_of_all_the_pairs(seed: int) -> None:
    """A square in the weights, of which batches of any size are an unbiased mean: exact. With the pairs of sixteen
    batches alone it is 17 % and 20 % too low."""
    n, d = 128, 6
    g = gen(0)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + 3.0 * torch.randn(n, 1, generator=g, dtype=torch.float64)
    centred = x - x.mean(0)
    module = nn.Linear(d, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.linalg.lstsq(centred, y - y.mean(0)).solution.T)
    scaled = torch.linalg.eigvalsh(centred.T @ centred / (n - 1)) * n / math.log(n)
    truth = 0.5 * float((scaled / (scaled + 1.0)).sum())
    data = TensorDataset(x.float(), y.float())
    est = estimate_llc(module, data, pairs, batch_size=8, localization=1.0, seed=seed)
    assert est.valid, est.reasons
    assert abs(est.mean - truth) <= max(0.05 * truth, 2 * est.se)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rounding_of_half_precision_couples_nothing(dtype: torch.dtype) -> None:
    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return mean_squared(module, batch).to(dtype)

    data = regression(96)
    source = DatasetSource(TensorDataset(*(x.to(dtype) for x in data.tensors)), 9)
    assert asked(Objective(mlp().to(dtype), loss_fn), source) is False and source.resident


@pytest.mark.parametrize("loss_fn", [weighted_classes, unmasked])
def test_it_is_seen_where_all_samples_have_the_same_loss(loss_fn: Callable[[nn.Module, Any], Tensor]) -> None:
    """A head that begins at zero."""
    module = mlp()
    head = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    source = DatasetSource(regression(96), 9)
    assert asked(Objective(module, loss_fn), source) is True
    assert not head.weight.any()


def test_labels_that_stay_behind_couple_nothing() -> None:
    """A list beside the tensors is not exchanged with them."""
    data = regression(96).tensors[0]
    samples = [(x, "a" if x[0] > 0 else "b") for x in data]

    def by_name(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), torch.tensor([{"a": 0, "b": 1}[name] for name in batch[1]]))

    source = DatasetSource(samples, 8, lambda s: (torch.stack([x for x, _ in s]), [name for _, name in s]))
    assert asked(Objective(mlp(), by_name), source) is False and source.resident


def test_losses_near_zero_couple_nothing() -> None:
    """At the weights they differ by their last digits alone, which say nothing."""
    module = mlp()
    x, y = regression(96).tensors
    with torch.no_grad():
        fitted = TensorDataset(x, module(x) + 1e-7 * torch.randn(y.shape, generator=gen(1)))
    for loss_fn, coupled in ((mean_squared, False), (weighted_samples, True)):
        source = DatasetSource(fitted, 9)
        assert asked(Objective(module, loss_fn), source) is coupled


def test_it_is_asked_once_and_stays_so_for_the_run() -> None:
    """Also of a run that is resumed, and of data that has been loaded anew."""
    calls = []

    def counted(module: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return in_batch_negatives(module, batch)

    settings = firing_settings(
        num_chains=2, num_draws=4, num_burnin_steps=2, sampler=SGLD(lr=1e-4), method="sequential"
    )
    course, counts = Course(), []
    source = DatasetSource(regression(96), 9)
    for _ in range(2):
        course.measure(Objective(mlp(), counted), source, settings)
        counts.append(len(calls))
        source.forget()
    assert course.coupled is True and counts[1] - counts[0] < counts[0]
    resumed = Course()
    resumed.load_state_dict(course.state_dict())
    other = DatasetSource(regression(96), 9)
    resumed.measure(Objective(mlp(), mean_squared), other, settings)
    assert resumed.coupled is True and not other.resident
    resumed.forget(None, "auto")
    assert resumed.coupled is None
