"""Small data: SGLD beside kinetic Langevin on all the data, `python -m benchmarks.small [n ...]`.

The table of docs/choosing.md: convnets with BatchNorm that Adam trained on n of the digits, at default arguments but
for the sampler, on one thread.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_slt import SGLD, Estimate, KineticLangevin, estimate_llc
from tests.cases.networks import ConvNet
from tests.cases.problems import cross_entropy, digits_data

EPOCHS, BATCH_SIZE, LR = 30, 64, 3e-3


def trained(n: int) -> nn.Module:
    """The convnet after training on the first n digits, in eval mode."""
    torch.manual_seed(0)
    module = ConvNet()
    optimiser = torch.optim.Adam(module.parameters(), lr=LR)
    x, y = digits_data(n)
    for _ in range(EPOCHS):
        for index in torch.randperm(n).split(BATCH_SIZE):
            optimiser.zero_grad()
            F.cross_entropy(module(x[index]), y[index]).backward()
            optimiser.step()
    return module.eval()


def row(n: int, name: str, e: Estimate, seconds: float) -> str:
    """A line of the table."""
    return (
        f"n = {n:4d}  {name:15s}  {e.mean:6.1f} ± {e.se:.1f}  valid {e.valid}  gamma {e.localization:.1f}  "
        f"R-hat {e.rhat:.2f}  "
        f"{e.num_burnin_steps} + {e.num_steps_bw_draws * e.num_draws} steps of {e.step_size:.2g}  {seconds:.0f} s"
    )


def main() -> None:
    """Two seeds of SGLD and one of kinetic Langevin for each n."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", nargs="*", type=int, default=[300, 700])
    torch.set_num_threads(1)
    samplers: list[tuple[str, int, dict[str, Any]]] = [
        ("SGLD", 0, {"sampler": SGLD()}),
        ("SGLD", 1, {"sampler": SGLD()}),
        ("KineticLangevin", 0, {"sampler": KineticLangevin(), "full_batch": True}),
    ]
    for n in parser.parse_args().n:
        module, data = trained(n), TensorDataset(*digits_data(n))
        for name, seed, settings in samplers:
            start = time.perf_counter()
            estimate = estimate_llc(module, data, cross_entropy, seed=seed, **settings)
            print(row(n, name, estimate, time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
