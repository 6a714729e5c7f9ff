"""A linear regression whose learning coefficient is known, as modules and data that are named in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from tests.cases.problems import Case, half_squared_error, regular

GAMMA, BATCH, STEP = 2.0, 50, 40


def case() -> Case:
    return regular(n=1000, eigenvalues=[4.0, 2.0, 1.0, 0.5], noise=0.5, gamma=GAMMA)


def half_square(module: nn.Module, batch: Any) -> Tensor:
    return half_squared_error(module, batch)


class Regression(LightningModule):
    """At the minimum, or so far from it that chains run downhill."""

    def __init__(self, away: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1, bias=False)
        self.net.load_state_dict(case().module.state_dict())
        with torch.no_grad():
            self.net.weight.add_(away)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return half_squared_error(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Silent(Regression):
    """Has no loss for any batch."""

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        return None


def plain() -> nn.Module:
    return case().module


def loader() -> DataLoader[Any]:
    return DataLoader(case().dataset, batch_size=BATCH, shuffle=True)


def dataset() -> Any:
    return case().dataset


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(case().dataset)


def endless() -> DataLoader[Any]:
    return DataLoader(Endless(), batch_size=BATCH)


def save(folder: Path) -> Path:
    """The minimum as a checkpoint."""
    path = folder / "minimum.ckpt"
    torch.save({"state_dict": Regression().state_dict(), "step": STEP}, path)
    return path


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "module": "tests.calibrate.runs:Regression",
        "data": "tests.calibrate.runs:loader",
        "localization": GAMMA,
        "method": "sequential",
        "devices": ["cpu"],
        **changes,
    }
