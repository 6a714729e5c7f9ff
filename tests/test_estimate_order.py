"""Regressions whose answer is exact, from loaders whose batches are not alike: a remainder, an order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from lightning_slt import SLTMonitor, estimate_llc
from lightning_slt.functional import default_nbeta
from tests.sampling.helpers import gen


class Stream(IterableDataset[Any]):
    def __init__(self, *columns: Tensor) -> None:
        self.columns = columns

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*self.columns, strict=True)


class InOrder(Sampler[int]):
    """A sampler of the user's own, whose order nobody else knows to be one."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))

    def __len__(self) -> int:
        return self.n


class Line(L.LightningModule):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.line = nn.Linear(4, 1, bias=False)
        self.line.weight.data = weight

    def training_step(self, batch: Any, _: int) -> Tensor:
        return (self.line(batch[0]) - batch[1]).square().mean() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fitted(x: Tensor, y: Tensor) -> tuple[Line, float]:
    """At its least squares, and ``1/2 sum nbeta h / (nbeta h + 1)``."""
    n, h = len(x), x.T @ x / len(x)
    curvatures = default_nbeta(n) * torch.linalg.eigvalsh(h)
    return Line(torch.linalg.solve(h, x.T @ y / n).T.contiguous()), float((curvatures / (curvatures + 1)).sum() / 2)


def with_a_remainder(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=gen(seed))
    return x, x @ torch.randn(4, 1, generator=gen(seed + 100)) + torch.randn(n, 1, generator=gen(seed + 200))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_one_sample_left_over_at_the_end_of_an_epoch_counts_as_one(seed: int) -> None:
    x, y = with_a_remainder(257, seed)
    module, truth = fitted(x, y)
    est = estimate_llc(module, DataLoader(Stream(x, y), 64), localization=1.0, num_samples=257)
    assert est.valid and abs(est.mean - truth) < 3 * est.se, f"{est.mean} ± {est.se} for {truth}"
    assert est.init_loss == pytest.approx(module.training_step((x, y), 0).item(), rel=0.01)


def test_it_counts_as_one_in_batches_that_training_has_seen(tmp_path: Path) -> None:
    x, y = with_a_remainder(257, 1)
    module, truth = fitted(x, y)
    monitor = SLTMonitor(every_n_epochs=1, localization=1.0, num_samples=257)
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[monitor],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(Stream(x, y), 64))
    est = monitor.estimates[-1]
    assert est.valid and abs(est.mean - truth) < 3 * est.se, f"{est.mean} ± {est.se} for {truth}"


@pytest.mark.slow
def test_chains_do_not_run_after_the_class_that_passes_by() -> None:
    x = torch.randn(4000, 4, generator=gen(2))
    slopes = torch.randn(4, 2, generator=gen(3))
    first = torch.arange(4000) < 2000
    y = torch.where(first, *(x @ slopes).T).unsqueeze(1) + 0.5 * torch.randn(4000, 1, generator=gen(4))
    module, truth = fitted(x, y)
    loader = DataLoader(TensorDataset(x, y), 16, sampler=InOrder(4000))
    est = estimate_llc(module, loader, localization=1.0)
    assert est.valid and abs(est.mean - truth) < 3 * est.se < 1.5, f"{est.mean} ± {est.se} for {truth}"
