"""From saddle to saddle: a deep linear network learns one singular mode after the other, and when is known beforehand.

    python examples/deep_linear.py                        # a minute; wandb offline
    python examples/deep_linear.py --fast --logger csv    # seconds
    python examples/deep_linear.py singular_values='[4,2.5,1.5]' monitor.num_draws=200

A student of two linear layers learns a linear teacher from small weights. The loss falls in steps: each singular mode
of the teacher is learned at a time of its own, the strongest first, and between two of them the network rests near a
saddle. When a mode of strength s is half learned is known in closed form (Saxe et al. 2014, arXiv 1312.6120):
``t = ln(s / u0 - 1) / (2 s)``, u0 its strength at the start; and it can be read off the weights. The detector knows
neither: it sees the learning coefficient and the loss.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

import lightning as L
import torch
from known_times import Known, count, draw, refined, table
from shared import command_line, summarise
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slt import TransitionMonitor
from lightning_slt.config import MonitorConfig, SamplerConfig

FAST = [
    "trainer.max_steps=240",
    "num_samples=64",
    "module.lr=0.04",
    "monitor.every_n_train_steps=8",
    "monitor.num_draws=20",
    "monitor.num_burnin_steps=20",
]


@dataclass
class TrainerConfig:
    """Arguments of ``lightning.Trainer``; an epoch is one step on all the data."""

    max_steps: int = 2000
    max_epochs: int = -1
    accelerator: str = "cpu"
    enable_checkpointing: bool = False
    enable_progress_bar: bool = True
    log_every_n_steps: int = 10


@dataclass
class ModuleConfig:
    """Arguments of :class:`DeepLinear`."""

    width: int = 8
    hidden: int = 8
    init: float = 1e-3
    lr: float = 5e-3


@dataclass
class Config:
    """Everything in ``deep_linear.yaml``."""

    seed: int = 0
    num_samples: int = 256
    noise: float = 0.1
    singular_values: list[float] = field(default_factory=lambda: [4.0, 2.0, 1.0])
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    module: ModuleConfig = field(default_factory=ModuleConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


class DeepLinear(L.LightningModule):
    """Two linear layers, no bias: nothing in it knows that it is measured."""

    def __init__(self, width: int, hidden: int, init: float, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.first, self.second = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=init)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self.second(self.first(x)) - y).square().sum(dim=1).mean() / 2
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@dataclass(frozen=True)
class Teacher:
    """``u diag(s) v'``: the map to be learned; ``u`` and ``v`` are ``[width, modes]``."""

    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def random(cls, width: int, singular_values: list[float]) -> Teacher:
        """Modes in random directions."""
        u, v = (torch.linalg.qr(torch.randn(width, width)).Q[:, : len(singular_values)] for _ in range(2))
        return cls(u, torch.tensor(singular_values), v)

    def data(self, num_samples: int, noise: float) -> TensorDataset:
        """Inputs whose second moment is exactly one in every direction, as the closed form wants it."""
        width = len(self.v)
        x = torch.linalg.qr(torch.randn(num_samples, width)).Q * math.sqrt(num_samples)
        y = x @ self.v @ torch.diag(self.s) @ self.u.T
        return TensorDataset(x, y + noise * torch.randn(num_samples, width))

    def strengths(self, module: DeepLinear) -> Tensor:
        """``[modes]`` how strong each mode is in the student's end-to-end map."""
        product = module.second.weight.detach() @ module.first.weight.detach()
        return torch.einsum("im,ij,jm->m", self.u, product, self.v)

    def predicted_steps(self, module: DeepLinear) -> list[float]:
        """When each mode will be half learned, from the weights at the start.

        While all is small a mode's two vectors in hidden space, ``W1 v`` and ``u' W2``, grow along their sum and decay
        along their difference: only the sum counts, ``u0 = |W1 v + W2' u|^2 / 4``.
        """
        into = module.first.weight.detach() @ self.v
        out = module.second.weight.detach().T @ self.u
        start = (into + out).square().sum(dim=0) / 4
        return (torch.log(self.s / start - 1) / (2 * self.s) / module.lr).tolist()


class ModeRecorder(L.Callback):
    """Reads the modes off the weights after every step: the truth that the found times are held against."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.strengths: list[list[float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DeepLinear)
        self.strengths.append(self.teacher.strengths(pl_module).tolist())

    def passed(self, mode: int, share: float) -> Optional[int]:
        """The first step with at least this share of the teacher's strength, None if there is none."""
        level = share * float(self.teacher.s[mode])
        return next((i + 1 for i, row in enumerate(self.strengths) if row[mode] >= level), None)

    def known(self, predicted: list[float]) -> list[Known]:
        """A boundary for each mode that was learned within the run."""
        found = []
        for mode, strength in enumerate(self.teacher.s.tolist()):
            onset, half, end = (self.passed(mode, share) for share in (0.1, 0.5, 0.9))
            if onset is not None and half is not None:
                last = end if end is not None else len(self.strengths)
                found.append(Known(f"mode {mode + 1} (s = {strength:g})", onset, half, last, predicted[mode]))
        return found


def main() -> None:
    """Train, measure, find, and hold what was found against what is known."""
    config, output, logger = command_line(__file__, Config, FAST, "Saddle to saddle in a deep linear network.")
    L.seed_everything(config.seed, verbose=False)
    teacher = Teacher.random(config.module.width, config.singular_values)
    data = teacher.data(config.num_samples, config.noise)
    module = DeepLinear(**asdict(config.module))
    predicted = teacher.predicted_steps(module)

    # The saddle at the origin has curvatures down to minus the largest singular value: a localization of twice that
    # times nbeta keeps chains where they are. With it the stiffest direction of the minimum, 2 s, makes 2 gamma, and a
    # step of 0.25 / gamma is a quarter of what stays stable there.
    nbeta = config.monitor.nbeta or config.num_samples / math.log(config.num_samples)
    config.monitor.localization = config.monitor.localization or 2 * nbeta * max(config.singular_values)
    config.monitor.sampler = config.monitor.sampler or SamplerConfig(lr=0.25 / config.monitor.localization)
    config.monitor.dirpath = config.monitor.dirpath or str(output / "slt")

    modes, monitor = ModeRecorder(teacher), config.monitor.build()
    transitions = TransitionMonitor()  # nothing else is needed for flags while the network trains
    trainer = L.Trainer(callbacks=[modes, monitor, transitions], logger=logger, **asdict(config.trainer))
    trainer.fit(module, DataLoader(data, len(data)))

    known = modes.known(predicted)
    online, offline = transitions.transitions, refined(monitor.estimates)
    assert monitor.folder is not None
    picture = monitor.folder / "figures" / "deep_linear.png"
    draw("A deep linear network learns mode by mode", known, online, offline, monitor.estimates, picture, linear=10)
    cadence = config.monitor.every_n_train_steps or 1
    print("\n--- Known times beside found ones (training steps)")
    print(table(known, online, offline, cadence))
    print(count(known, online, offline, cadence))
    summarise(monitor, logger, [picture])


if __name__ == "__main__":
    main()
