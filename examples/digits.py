"""Handwritten digits: how the learning coefficient of a small network grows while it learns.

    python examples/digits.py                                    # about a minute; wandb offline
    python examples/digits.py --fast --logger csv                # seconds
    python examples/digits.py --config examples/digits.yaml trainer.max_epochs=50 monitor.num_chains=8

The data comes with scikit-learn (1797 pictures of 8 x 8 pixels): nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import lightning as L
import torch
from shared import command_line, summarise
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_slt.config import MonitorConfig

FAST = [
    "trainer.max_epochs=3",
    "monitor.every_n_epochs=1",
    "monitor.at_steps=null",
    "monitor.num_draws=20",
    "monitor.num_burnin_steps=20",
]


@dataclass
class TrainerConfig:
    """Arguments of ``lightning.Trainer``."""

    max_epochs: int = 30
    accelerator: str = "cpu"
    enable_checkpointing: bool = False
    enable_progress_bar: bool = True
    log_every_n_steps: int = 10


@dataclass
class ModuleConfig:
    """Arguments of :class:`Digits`."""

    width: int = 128
    lr: float = 1e-3


@dataclass
class Config:
    """Everything in ``digits.yaml``."""

    seed: int = 0
    batch_size: int = 64
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    module: ModuleConfig = field(default_factory=ModuleConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


class Digits(L.LightningModule):
    """An ordinary module: nothing in it knows that it is measured."""

    def __init__(self, width: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val/accuracy", (self.net(x).argmax(dim=1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def loaders(batch_size: int) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Training and validation data, pixels within [0, 1]."""
    data = load_digits()
    pictures = TensorDataset(torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target))
    train, val = random_split(pictures, [0.8, 0.2])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(val, len(val))


def main() -> None:
    """Train, measure, say what came out."""
    config, output, logger = command_line(__file__, Config, FAST, "The learning coefficient of an MLP on digits.")
    L.seed_everything(config.seed, verbose=False)
    train, val = loaders(config.batch_size)
    module = Digits(**asdict(config.module))
    config.monitor.dirpath = config.monitor.dirpath or str(output / "slt")

    monitor = config.monitor.build()  # the same as SLTMonitor(every_n_epochs=3, ...)
    trainer = L.Trainer(callbacks=[monitor], logger=logger, **asdict(config.trainer))
    trainer.fit(module, train, val)

    accuracy = float(trainer.callback_metrics["val/accuracy"])
    print(f"\nAfter {trainer.global_step} steps: accuracy on held-out digits {accuracy:.1%}")
    summarise(monitor, logger)


if __name__ == "__main__":
    main()
