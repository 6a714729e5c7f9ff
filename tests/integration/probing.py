"""Monitors that look at samples while a model trains, and what they look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from lightning_slt.influence_record import InfluenceEstimate
from tests.integration import models
from tests.integration.harness import (
    Scenario,
    SLTMonitor,
    tiny_monitor,
)
from tests.integration.models import IN, Net, Plain, loaders, tensors


def probing(probe: Any = True, **changes: Any) -> SLTMonitor:
    """Chains that are read often enough for every number to be there: 8 draws, and a reading at every fourth step."""
    return tiny_monitor(**{"num_draws": 32, "probe": probe, **changes})


def still(**kwargs: Any) -> Scenario:
    """Weights that stay where they began."""
    return Scenario(lambda: Plain(lr=0.0), lambda: loaders(**kwargs))


def same(a: InfluenceEstimate, b: InfluenceEstimate) -> None:
    x, y = a.tensors(), b.tensors()
    assert x.keys() == y.keys()
    for name in x:
        assert torch.equal(x[name].nan_to_num(nan=-1.25), y[name].nan_to_num(nan=-1.25)), name


class Counts(Dataset[tuple[Tensor, int]]):
    """Counts what is read of it, and gives its samples a little noise of its own."""

    def __init__(self, n: int = models.SAMPLES) -> None:
        self.data, self.rng, self.num_reads = tensors(n), torch.Generator().manual_seed(1), 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.num_reads += 1
        x, y = self.data[index]
        return x + 0.01 * torch.randn(IN, generator=self.rng), int(y)


class Contrastive(Net):
    """Each sample is told from the others of its batch."""

    def loss(self, batch: Any) -> Tensor:
        hidden = self.net(batch[0])
        return cross_entropy(hidden @ hidden.T, torch.arange(len(hidden)))


def refuses(sample: Any) -> str:
    raise KeyError("no such field")


def saving(folder: Path, **kwargs: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
        return {"callbacks": [saver], "enable_checkpointing": True, **kwargs}

    return make
