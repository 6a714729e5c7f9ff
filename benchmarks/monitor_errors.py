"""Are the error bars of a monitor true? `python -m benchmarks.monitor_errors [--seeds 24]`.

One training run, scikit-learn's digits with a tenth of the labels flipped, measured by monitors of many seeds at four
moments. Training is the same under all of them, so that each moment has one true value: that of long SGLD chains at
its weights (8 of 6,000 steps after 1,600). An error bar is true where the distances from it, in standard errors, have
a root mean square of 1. One thread.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import warnings
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_slt import SGLD, Estimate, SLTMonitor, estimate_llc
from tests.cases.networks import mlp
from tests.cases.problems import digits_data

EPOCHS, EVERY = 40, 10
GAMMA = 100.0
"""What d / |w*|² within its bounds is here."""


class Module(L.LightningModule):
    """An MLP of 26,122 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Keep(L.Callback):
    """The weights at the moments of the firings."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy them."""
        if (trainer.current_epoch + 1) % EVERY == 0:
            self.weights[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}


def data() -> TensorDataset:
    """Four fifths of the digits, a tenth of their labels wrong."""
    (x, y), g = digits_data(), torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(x), generator=g)[: int(0.8 * len(x))]
    x, y = x[chosen], y[chosen]
    wrong = torch.randperm(len(y), generator=g)[: len(y) // 10]
    y[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),), generator=g)) % 10
    return TensorDataset(x, y)


def run(dataset: TensorDataset, seed: int) -> tuple[list[Estimate], dict[int, dict[str, Tensor]]]:
    """The estimates of one monitor, and the weights that they are of."""
    L.seed_everything(0, verbose=False)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        monitor, keep = SLTMonitor(every_n_epochs=EVERY, seed=seed, localization=GAMMA, dirpath=folder), Keep()
        trainer = L.Trainer(callbacks=[monitor, keep], max_epochs=EPOCHS, accelerator="cpu", **quiet)
        trainer.fit(Module(), DataLoader(dataset, 64, shuffle=True))
    return list(monitor.estimates), keep.weights


def main() -> None:
    """A line for each moment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=24)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning_slt"):
        logging.getLogger(name).setLevel(logging.ERROR)
    dataset = data()
    runs = [run(dataset, seed) for seed in range(seeds)]
    weights = runs[0][1]
    for number, step in enumerate(sorted(weights)):
        module = Module()
        module.load_state_dict(weights[step])
        long = {"num_burnin_steps": 1500, "num_steps_bw_draws": 30, "localization": GAMMA, "batch_size": 64}
        true = estimate_llc(module, dataset, sampler=SGLD(1e-4), seed=1000, **long)
        found = [estimates[number] for estimates, _ in runs]
        assert {e.step for e in found} == {step}
        z = [(e.mean - true.mean) / math.hypot(e.se, true.se) for e in found]
        print(
            f"step {step:4d}  {true.mean:.2f} ± {true.se:.2f}  mean of the monitors "
            f"{sum(e.mean for e in found) / seeds:.2f}, their errors {sum(e.se for e in found) / seeds:.2f}  "
            f"rms z {math.sqrt(sum(x * x for x in z) / seeds):.2f}  "
            f"within 2: {sum(abs(x) <= 2 for x in z)} of {seeds}  valid {sum(e.valid for e in found)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
