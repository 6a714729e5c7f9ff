"""The toy model of superposition: six features in two dimensions, from nothing to a square to a pentagon.

    python examples/superposition.py                        # a minute or two; wandb offline
    python examples/superposition.py --fast --logger csv    # seconds
    python examples/superposition.py seed=3 module.features=5

The model is ``relu(W' W x + b)`` with two rows in W (Elhage et al. 2022, arXiv 2209.10652), its inputs as sparse as
can be: one feature each. The features that it represents stand at the corners of a regular polygon, the others near
zero; these are the critical points, and training goes from one to another (Chen et al. 2023, arXiv 2310.06301). Which
polygon there is can be seen in the columns of W; the detector does not see them, only the learning coefficient and the
loss.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from known_times import Known, count, draw, refined, table
from matplotlib.axes import Axes
from shared import command_line, summarise
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.utils.data import DataLoader, TensorDataset

from lightning_slt import TransitionMonitor
from lightning_slt.config import MonitorConfig, SamplerConfig

FAST = [
    "trainer.max_steps=240",
    "num_samples=200",
    "module.lr=0.3",
    "monitor.every_n_train_steps=8",
    "monitor.num_draws=20",
    "monitor.num_burnin_steps=20",
]
REPRESENTED = 0.5
"""Norm from which on a column counts as a corner: those of polygons are 1 and longer, all others near 0."""
SETTLED = 4
"""Firings that a phase must last to be one; what is shorter is a part of the way from the phase before to the next."""


@dataclass
class TrainerConfig:
    """Arguments of ``lightning.Trainer``."""

    max_steps: int = 1500
    max_epochs: int = -1
    accelerator: str = "cpu"
    enable_checkpointing: bool = False
    enable_progress_bar: bool = True
    log_every_n_steps: int = 10


@dataclass
class ModuleConfig:
    """Arguments of :class:`Superposition`."""

    features: int = 6
    init: float = 1e-3
    lr: float = 0.1


@dataclass
class Config:
    """Everything in ``superposition.yaml``."""

    seed: int = 0
    num_samples: int = 1000
    batch_size: int = 100
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    module: ModuleConfig = field(default_factory=ModuleConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


class Superposition(L.LightningModule):
    """``relu(W' W x + b)``: nothing in it knows that it is measured."""

    def __init__(self, features: int, init: float, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.weight = nn.Parameter(init * torch.randn(2, features))
        self.bias = nn.Parameter(torch.zeros(features))

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        loss = (relu(x @ self.weight.T @ self.weight + self.bias) - x).square().sum(dim=1).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def sparse_inputs(num_samples: int, features: int) -> TensorDataset:
    """One feature in each sample, of a strength between 0 and 1."""
    x = torch.zeros(num_samples, features)
    x[torch.arange(num_samples), torch.randint(features, (num_samples,))] = torch.rand(num_samples)
    return TensorDataset(x)


@dataclass(frozen=True)
class Phase:
    """A stretch of training, in steps, in which the same features are represented."""

    first: int
    last: int
    corners: tuple[int, ...]
    columns: Tensor
    """``[2, features]`` in the middle of the stretch."""

    @property
    def middle(self) -> int:
        """The step half way, at which the columns are shown."""
        return (self.first + self.last) // 2

    @property
    def name(self) -> str:
        """The polygon, where the corners stand evenly; else how many there are."""
        k = len(self.corners)
        if k < 3:
            return ("nothing", "1 column", "2 columns")[k]
        angles = torch.atan2(self.columns[1], self.columns[0])[list(self.corners)].sort().values
        gaps = torch.diff(angles, append=angles[:1] + 2 * math.pi)
        even = float((gaps - 2 * math.pi / k).abs().max()) < math.pi / 9  # 20 degrees
        return f"{k}-gon" if even else f"{k} columns"


class ColumnRecorder(L.Callback):
    """Keeps W after every step: the truth that the found times are held against."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Superposition)
        self.weights.append(pl_module.weight.detach().clone())

    def phases(self, least: int) -> list[Phase]:
        """The phases that lasted at least this many steps, in order."""
        norms = torch.stack(self.weights).norm(dim=1)
        corners = [tuple(torch.nonzero(row > REPRESENTED).flatten().tolist()) for row in norms]
        changes = [i for i in range(1, len(corners)) if corners[i] != corners[i - 1]]
        found: list[Phase] = []
        for first, after in zip([0, *changes], [*changes, len(corners)], strict=True):
            if after - first >= least:
                # a flicker, and back to the same corners: the phase goes on
                again = bool(found) and found[-1].corners == corners[first]
                start = found.pop().first if again else first + 1
                found.append(Phase(start, after, corners[first], self.weights[(start + after) // 2 - 1]))
        return found

    def known(self, phases: Sequence[Phase]) -> list[Known]:
        """A boundary between each phase and the next: where the columns that came or went are half way.

        Half of the way of their norms, on the mean, from the middle of one phase to the middle of the next: a column
        that a polygon does not represent need not have been at zero. The onset and the end are at 10 % and 90 %.
        """
        norms = torch.stack(self.weights).norm(dim=1)
        found = []
        for old, new in itertools.pairwise(phases):
            changed = sorted(set(old.corners) ^ set(new.corners))
            before, after = norms[old.middle - 1, changed], norms[new.middle - 1, changed]
            way = ((norms[old.middle - 1 : new.middle, changed] - before) / (after - before)).mean(dim=1)
            onset, half, end = (old.middle + int((way >= share).nonzero()[0]) for share in (0.1, 0.5, 0.9))
            found.append(Known(f"{old.name} to {new.name}", onset, half, end))
        return found


def draw_columns(axes: Axes, phase: Phase) -> None:
    """The columns of W in the plane, the represented ones as corners."""
    reach = 1.45
    for i in range(phase.columns.shape[1]):
        x, y = phase.columns[:, i].tolist()
        on = i in phase.corners
        axes.plot([0, x], [0, y], color="#1f5fa8" if on else "#999999", lw=1.4)
        axes.plot([x], [y], "o", color="#1f5fa8" if on else "#999999", ms=5)
    ring = [phase.columns[:, i].tolist() for i in phase.corners]
    ring.sort(key=lambda p: math.atan2(p[1], p[0]))
    if len(ring) > 2:
        axes.plot(*zip(*ring, ring[0], strict=True), color="#1f5fa8", lw=0.8, alpha=0.5)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
    axes.set_title(f"{phase.name}, step {phase.middle}", fontsize=9)
    axes.spines[:].set_color("#dddddd")


def main() -> None:
    """Train, measure, find, and hold what was found against what is known."""
    config, output, logger = command_line(__file__, Config, FAST, "Polygons in the toy model of superposition.")
    L.seed_everything(config.seed, verbose=False)
    data = sparse_inputs(config.num_samples, config.module.features)
    module = Superposition(**asdict(config.module))

    # The saddle at the origin is left with a curvature of 4 E[x_i^2] = 4 / (3 features) at the most: a localization of
    # twice that times nbeta keeps the chains where they are, there and at the polygons.
    nbeta = config.monitor.nbeta or config.num_samples / math.log(config.num_samples)
    config.monitor.localization = config.monitor.localization or 2 * nbeta * 4 / (3 * config.module.features)
    config.monitor.sampler = config.monitor.sampler or SamplerConfig(lr=0.15 / config.monitor.localization)
    config.monitor.dirpath = config.monitor.dirpath or str(output / "slt")

    columns, monitor = ColumnRecorder(), config.monitor.build()
    transitions = TransitionMonitor()  # nothing else is needed for flags while the network trains
    trainer = L.Trainer(callbacks=[columns, monitor, transitions], logger=logger, **asdict(config.trainer))
    trainer.fit(module, DataLoader(data, config.batch_size, shuffle=True))

    cadence = config.monitor.every_n_train_steps or 1
    phases = columns.phases(SETTLED * cadence)
    known = columns.known(phases)
    online, offline = transitions.transitions, refined(monitor.estimates)
    assert monitor.folder is not None
    picture: Path = monitor.folder / "figures" / "superposition.png"
    title = "Superposition: " + ", ".join(phase.name for phase in phases)
    figure, row = draw(title, known, online, offline, monitor.estimates, picture, row=len(phases))
    for axes, phase in zip(row, phases, strict=True):
        draw_columns(axes, phase)
    figure.savefig(picture)
    corners = ", ".join(f"{phase.name} at steps {phase.first} to {phase.last}" for phase in phases)
    print(f"\n--- Corners, columns of W with a norm above {REPRESENTED}: {corners}")
    print("\n--- Known times beside found ones (training steps)")
    print(table(known, online, offline, cadence))
    print(count(known, online, offline, cadence))
    summarise(monitor, logger, [picture])


if __name__ == "__main__":
    main()
