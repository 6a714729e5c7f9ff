"""What a monitor costs a training: ``python benchmarks/training.py``, on a GPU where there is one.

A small language model (sequences of 128 from a random Markov chain, batches of 32) is trained without a monitor, with
``SLTMonitor(max_overhead=0.05)`` and with one whose chains run beside the training, in turn. The first steps, which
load kernels, are left out of the clock. Printed: seconds a step in those of the run without, how often it fired, on
which path, what it measured, and whether the weights at the end are those of the run without, to the last bit.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from models import Transformer, next_token_loss
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_slt import SLTMonitor

LENGTH, BATCH, ROWS, WARM_UP = 128, 32, 8192, 50


def sequences(vocabulary: int) -> Tensor:
    """From a Markov chain whose tokens have four successors each."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(vocabulary, (vocabulary, 4), generator=generator)
    tokens = torch.empty(ROWS, LENGTH, dtype=torch.long)
    tokens[:, 0] = torch.randint(vocabulary, (ROWS,), generator=generator)
    for k in range(1, LENGTH):
        tokens[:, k] = successors[tokens[:, k - 1], torch.randint(4, (ROWS,), generator=generator)]
    return tokens


@dataclass(frozen=True)
class Size:
    steps: int
    vocabulary: int
    width: int
    layers: int
    precision: Any


class Model(LightningModule):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.net = Transformer(size.vocabulary, LENGTH, size.width, heads=max(size.width // 64, 1), layers=size.layers)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return next_token_loss(self.net(batch[0]), batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


class Clock(Callback):
    def __init__(self) -> None:
        self.start = self.steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == WARM_UP:
            self._wait()
            self.start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wait()
        self.seconds = (time.perf_counter() - self.start) / (trainer.global_step - WARM_UP)

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def run(size: Size, data: Tensor, monitor: Any = None) -> tuple[float, float, list[Tensor]]:
    """Seconds a step, GiB at the peak, and the weights at the end."""
    seed_everything(0, verbose=False)
    module, clock = Model(size), Clock()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=size.steps, precision=size.precision, devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            callbacks=[clock, *([monitor] if monitor is not None else [])],
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(data), batch_size=BATCH, shuffle=True, drop_last=True))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return clock.seconds, peak, [p.detach().cpu() for p in module.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}")
    data = sequences(given.vocabulary)
    size = Size(given.steps, given.vocabulary, given.width, given.layers, given.precision)
    run(replace(size, steps=WARM_UP + 50), data)
    alone, peak, weights = run(size, data)
    print(
        f"without: {1000 * alone:.2f} ms a step, {peak:.2f} GiB, {sum(w.numel() for w in weights):,} weights",
        flush=True,
    )
    kinds: dict[str, dict[str, Any]] = {
        "inline": {"max_overhead": 0.05},
        "background": {"execution": "background", "every_n_train_steps": max(given.steps // 8, 1), "max_wait": 60.0},
    }
    for name, settings in kinds.items():
        monitor = SLTMonitor(**settings)
        seconds, peak, after = run(size, data, monitor)
        same = all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
        print(f"{name}: {seconds / alone:.3f} of that a step, {peak:.2f} GiB, the same weights: {same}", flush=True)
        for e in monitor.estimates:
            state = "valid" if e.valid else ", ".join(e.reasons)
            print(f"  step {e.step}: {e.mean:.1f} +- {e.se:.1f}, {e.num_chains} x {e.num_draws}, {e.method}, {state}")


if __name__ == "__main__":
    main()
