"""What a training step loses while chains run beside it: ``python benchmarks/background.py``.

Trainer and worker are pinned to a core each and have one thread. One run without a monitor and one with it alternate;
in the second, steps count between the first snapshot and the last result only, so that chains run all the time, and
those steps are left out that take a snapshot or take up a result: of those the mean is printed by itself, and the whole
slowdown is that of all steps. Processor time does not depend on who else is on the core. The
target is at most 1.10 for the median of the others. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_slt import SLTMonitor

TARGET = 1.10


class Model(LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Clock(Callback):
    """Seconds of each step, from start to start, and what the monitor had done by then."""

    def __init__(self, monitor: Any = None) -> None:
        self.monitor, self.steps, self.last = monitor, [], None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now, beside = (time.perf_counter(), time.thread_time()), getattr(self.monitor, "_beside", None)
        state = (
            (beside.last_step, len(self.monitor.estimates), len(beside.pending)) if beside is not None else (0, 0, 0)
        )
        if self.last is not None:
            before, seconds = self.last[1], now[0] - self.last[0][0]
            self.steps.append(
                (seconds, now[1] - self.last[0][1], before[:2] != state[:2], state[2] > 0 and state[1] > 0)
            )
        self.last = now, state


def run(core: int, steps: int, width: int, background: bool) -> list[tuple[float, float, bool, bool]]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(4096, 64), torch.randint(10, (4096,)))
    monitor = None
    if background:
        monitor = SLTMonitor(
            every_n_train_steps=50, execution="background", devices=[f"cpu:{core}"], num_draws=400, max_wait=1.0
        )
    clock = Clock(monitor)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            callbacks=[clock] if monitor is None else [monitor, clock],
        )  # fmt: skip
        trainer.fit(Model(width), DataLoader(data, batch_size=128, shuffle=True))
    return clock.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--cores", type=int, nargs=2, default=(0, 1), help="of training, and of the worker")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {arguments.cores[0]})
    ratios, processor, wholes = [], [], []
    for _ in range(arguments.repeats):
        alone = run(arguments.cores[1], arguments.steps, arguments.width, False)[50:]
        beside = run(arguments.cores[1], arguments.steps, arguments.width, True)[50:]
        quiet = [step for step in beside if step[3] and not step[2]]
        firing = [step[0] for step in beside if step[2]]
        if not quiet:
            sys.exit("no chains ran beside training: give more --steps")
        wall, cpu = (statistics.median(s[i] for s in quiet) / statistics.median(s[i] for s in alone) for i in (0, 1))
        ratios.append(wall)
        processor.append(cpu)
        wholes.append(statistics.fmean(s[0] for s in beside if s[3]) / statistics.fmean(s[0] for s in alone))
        print(
            f"step alone {1e3 * statistics.median(s[0] for s in alone):.2f} ms; beside chains x {wall:.3f}, processor "
            f"time x {cpu:.3f} ({len(quiet)} steps); with snapshots and results x {wholes[-1]:.3f}; a step with one of "
            f"those {1e3 * statistics.fmean(firing):.1f} ms ({len(firing)})",
            flush=True,
        )
    print(
        f"best {min(ratios):.3f}, median {statistics.median(ratios):.3f} (target {TARGET}), processor time "
        f"{statistics.median(processor):.3f}, all in {statistics.median(wholes):.3f}; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
