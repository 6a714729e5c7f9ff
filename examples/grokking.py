"""Grokking: modular addition is memorised first and understood much later; the learning coefficient sees both.

    python examples/grokking.py                          # a few minutes; wandb offline
    python examples/grokking.py --fast --logger csv      # seconds, too short to grok
    python examples/grokking.py --config examples/grokking.yaml module.weight_decay=0.3 monitor.num_chains=8

The network sees 70 % of all sums a + b modulo a prime. It has them by heart within a hundred steps; that it gets the
other 30 % right too comes a thousand steps later (Power et al. 2022, arXiv 2201.02177).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

import lightning as L
import torch
from matplotlib.figure import Figure  # not pyplot: a figure of our own needs no window and no backend
from shared import command_line, summarise
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_slt import Estimate
from lightning_slt.config import MonitorConfig

FAST = ["trainer.max_steps=40", "monitor.at_steps=[5,20,40]", "monitor.num_draws=20", "monitor.num_burnin_steps=20"]


@dataclass
class TrainerConfig:
    """Arguments of ``lightning.Trainer``; an epoch is one step on all the data."""

    max_steps: int = 2000
    max_epochs: int = -1
    check_val_every_n_epoch: int = 10
    accelerator: str = "cpu"
    enable_checkpointing: bool = False
    enable_progress_bar: bool = True
    log_every_n_steps: int = 10


@dataclass
class ModuleConfig:
    """Arguments of :class:`ModularAddition`."""

    prime: int = 31
    embedding: int = 32
    width: int = 128
    lr: float = 3e-3
    weight_decay: float = 1.0


@dataclass
class Config:
    """Everything in ``grokking.yaml``."""

    seed: int = 0
    train_share: float = 0.7
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    module: ModuleConfig = field(default_factory=ModuleConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


class ModularAddition(L.LightningModule):
    """Two embedded numbers in, their sum modulo ``prime`` out. Keeps its accuracies in ``history``."""

    def __init__(self, prime: int, embedding: int, width: int, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        self.history: list[tuple[int, float, float]] = []  # step, train accuracy, test accuracy
        self.net = nn.Sequential(
            nn.Embedding(prime, embedding),
            nn.Flatten(),
            nn.Linear(2 * embedding, width),
            nn.ReLU(),
            nn.Linear(width, prime),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pairs, sums = batch
        loss = cross_entropy(self.net(pairs), sums)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int) -> None:
        pairs, sums = batch
        accuracy = (self.net(pairs).argmax(dim=1) == sums).float().mean()
        self.log(f"{('train', 'test')[dataloader_idx]}/accuracy", accuracy, prog_bar=True, add_dataloader_idx=False)

    def on_validation_end(self) -> None:
        train, test = (float(self.trainer.callback_metrics[f"{part}/accuracy"]) for part in ("train", "test"))
        self.history.append((self.global_step, train, test))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.98))


def passed(history: list[tuple[int, float, float]], column: int, level: float) -> Optional[int]:
    """The first step with at least this accuracy (column 1: train, 2: test), None if there is none."""
    return next((row[0] for row in history if row[column] >= level), None)


def draw(history: list[tuple[int, float, float]], estimates: list[Estimate], path: Path) -> None:
    """Accuracies above the learning coefficient, both against the step."""
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    grokked = passed(history, 1, 0.99) is not None and passed(history, 2, 0.9) is not None
    story = "learned by heart first, understood later" if grokked else "not understood in this run"
    figure.suptitle(f"Grokking a + b modulo p: {story}", fontweight="bold")
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps, train, test = zip(*history, strict=True)
    top.plot(steps, train, color="#8a8a8a", lw=2.5, label="sums it is trained on")
    top.plot(steps, test, color="#d35400", lw=2.5, label="sums it never sees")
    top.set(ylabel="accuracy", ylim=(-0.04, 1.08), xscale="log")

    colour = "#1f5fa8"
    good = [e for e in estimates if e.valid]
    low, high = [e.interval[0] for e in good], [e.interval[1] for e in good]
    bottom.fill_between([e.step for e in good], low, high, color=colour, alpha=0.25, lw=0, label="± 1.96 se")
    bottom.plot([e.step for e in good], [e.mean for e in good], "-o", color=colour, ms=5, label="LLC")
    bad = [e for e in estimates if not e.valid]
    if bad:
        bottom.plot([e.step for e in bad], [e.mean for e in bad], "o", color="#c62828", mfc="white", label="not valid")
    bottom.set(xlabel="training step (logarithmic)", ylabel="learning coefficient (LLC)")

    # the labels stand where the curve of a run that groks leaves room
    moments = (
        (1, 0.99, "by heart: train accuracy 99 %", 0.08, "left"),
        (2, 0.9, "understood: test accuracy 90 %", 0.92, "right"),
    )
    for column, level, text, height, side in moments:
        step = passed(history, column, level)
        if step is not None:
            top.axvline(step, color="#555555", lw=1, ls="--")
            bottom.axvline(step, color="#555555", lw=1, ls="--")
            place = ("data", "axes fraction")
            bottom.annotate(f"  {text}, step {step}  ", (step, height), xycoords=place, ha=side, va="center")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", lw=0.6)
        axes.legend(frameon=False, loc=(0.43, 0.4) if axes is top else "lower left")
    figure.savefig(path)


def verdict(history: list[tuple[int, float, float]], estimates: list[Estimate]) -> str:
    """What happened to the learning coefficient between memorising and understanding, read off the run."""
    memorised, understood = passed(history, 1, 0.99), passed(history, 2, 0.9)
    if memorised is None or understood is None:
        return f"No grokking in {history[-1][0]} steps: train accuracy {history[-1][1]:.0%}, test {history[-1][2]:.0%}."
    text = f"Train accuracy passed 99 % at step {memorised}, test accuracy 90 % at step {understood}."
    valid = [e for e in estimates if e.valid]
    if not valid:
        return text + " No estimate of the LLC is valid."
    first, last = (min(valid, key=lambda e: abs((e.step or 0) - step)) for step in (memorised, understood))
    change, error = last.mean - first.mean, (first.se**2 + last.se**2) ** 0.5
    word = "did not change beyond its error" if abs(change) < 2 * error else "rose" if change > 0 else "fell"
    return (
        f"{text} The LLC {word} in between: {first.mean:.1f} ± {first.se:.1f} at step {first.step}, "
        f"{last.mean:.1f} ± {last.se:.1f} at step {last.step} ({change / abs(first.mean):+.0%})."
    )


def main() -> None:
    """Train, measure, draw, say what came out."""
    config, output, logger = command_line(__file__, Config, FAST, "The learning coefficient while a network groks.")
    L.seed_everything(config.seed, verbose=False)
    pairs = torch.cartesian_prod(torch.arange(config.module.prime), torch.arange(config.module.prime))
    data = TensorDataset(pairs, pairs.sum(dim=1) % config.module.prime)
    train, test = (
        DataLoader(part, len(part)) for part in random_split(data, [config.train_share, 1 - config.train_share])
    )
    module = ModularAddition(**asdict(config.module))
    config.monitor.dirpath = config.monitor.dirpath or str(output / "slt")

    monitor = config.monitor.build()  # the same as SLTMonitor(at_steps=[10, 20, ...], batch_size=128)
    trainer = L.Trainer(callbacks=[monitor], logger=logger, num_sanity_val_steps=0, **asdict(config.trainer))
    trainer.fit(module, train, [train, test])

    assert monitor.folder is not None
    picture = monitor.folder / "figures" / "grokking.png"
    draw(module.history, monitor.estimates, picture)
    print("\n" + verdict(module.history, monitor.estimates))
    summarise(monitor, logger, [picture])


if __name__ == "__main__":
    main()
