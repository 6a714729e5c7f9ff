"""Mislabelled digits: the callback finds wrong labels while a small network trains on them.

    python examples/mislabelled_digits.py                        # about a minute; wandb offline
    python examples/mislabelled_digits.py --fast --logger csv    # seconds
    python examples/mislabelled_digits.py flipped=0.05 trainer.max_epochs=100

A tenth of the training labels of scikit-learn's digits (nothing is downloaded) are replaced by wrong ones. At each
firing the monitor ranks the training samples by the mean of their loss over the local posterior: a wrong label stays
expensive there, also where the network has learnt it by heart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import lightning as L
import torch
from digits import Digits, ModuleConfig, TrainerConfig
from shared import command_line, summarise
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_slt.config import MonitorConfig

FAST = [
    "trainer.max_epochs=6",
    "monitor.every_n_epochs=3",
    "monitor.probe=300",
    "monitor.num_draws=20",
    "monitor.num_burnin_steps=20",
]
WORST = 20


@dataclass
class Config:
    """Everything in ``mislabelled_digits.yaml``."""

    seed: int = 0
    batch_size: int = 64
    flipped: float = 0.1
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    module: ModuleConfig = field(default_factory=ModuleConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


def data(flipped: float, seed: int) -> tuple[TensorDataset, TensorDataset, set[int]]:
    """Training data with wrong labels, validation data with right ones, and which training samples are wrong."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=g)
    train, val = order[: int(0.8 * len(x))], order[int(0.8 * len(x)) :]
    labels = y[train].clone()
    wrong = torch.randperm(len(train), generator=g)[: round(flipped * len(train))]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=g)) % 10
    return TensorDataset(x[train], labels), TensorDataset(x[val], y[val]), set(wrong.tolist())


def main() -> None:
    """Train on wrong labels, and count how many of the suspects are wrong."""
    config, output, logger = command_line(__file__, Config, FAST, "Wrong labels found while training.")
    L.seed_everything(config.seed, verbose=False)
    train, val, wrong = data(config.flipped, config.seed)
    module = Digits(**asdict(config.module))
    config.monitor.dirpath = config.monitor.dirpath or str(output / "slt")

    monitor = config.monitor.build()  # the same as SLTMonitor(every_n_epochs=10, probe=2000)
    trainer = L.Trainer(callbacks=[monitor], logger=logger, **asdict(config.trainer))
    trainer.fit(module, DataLoader(train, config.batch_size, shuffle=True), DataLoader(val, len(val)))

    accuracy = float(trainer.callback_metrics["val/accuracy"])
    print(f"\nAfter {trainer.global_step} steps: accuracy on held-out digits {accuracy:.1%}")
    for influence in monitor.influences:
        index = influence.train_index.tolist()
        worst = [index[j] for j in influence.suspects(WORST)]
        found = sum(i in wrong for i in worst)
        plain = [index[j] for j in influence.init_loss.argsort(descending=True)[:WORST].tolist()]
        print(
            f"  step {influence.step}: {found} of the {len(worst)} worst were flipped "
            f"({sum(i in wrong for i in plain)} of the {len(plain)} worst by plain loss); "
            f"{len(wrong.intersection(index))} of all {len(index)} samples looked at were"
        )
    pictures = []
    if monitor.folder is not None:
        pictures = sorted((monitor.folder / "figures").glob("suspects_*"))[-1:]
        pictures += sorted((monitor.folder / "figures").glob("influence_*"))[-1:]
    summarise(monitor, logger, pictures)


if __name__ == "__main__":
    main()
