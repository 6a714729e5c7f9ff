"""Trains the networks of the cases and stores their weights: `python -m tests.cases.train_networks [name ...]`.

Deterministic on one thread (seed 0): Adam on minibatches, in training mode, then full-batch Adam with a decaying rate
in eval mode (BatchNorm with the statistics it has by then), so that w* is close to a minimum of the loss that is
sampled, at a training loss that is not zero.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tests.cases.problems import NETWORKS, weights_file


@dataclass(frozen=True)
class Recipe:
    """Epochs of minibatches at `lr`, then `settle` full-batch steps from `settle_lr` down to zero."""

    epochs: int = 30
    batch_size: int = 64
    lr: float = 1e-3
    settle: int = 300
    settle_lr: float = 1e-4


RECIPES: dict[str, Recipe] = {
    "digits_mlp": Recipe(),
    "convnet": Recipe(epochs=12, lr=3e-3, settle=400, settle_lr=1e-3),
    "lstm": Recipe(epochs=30, lr=1e-2, settle=300, settle_lr=2e-3),
    "transformer": Recipe(epochs=30, batch_size=32, lr=3e-3, settle=300, settle_lr=1e-3),
}


def train(name: str, seed: int = 0) -> nn.Module:
    """The trained module, in eval mode."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network, recipe = NETWORKS[name], RECIPES[name]
    data = network.data()
    module = network.build()
    generator = torch.Generator().manual_seed(seed)

    def step(optimiser: torch.optim.Optimizer, batch: tuple[Tensor, ...]) -> None:
        optimiser.zero_grad()
        network.loss_fn(module, batch).backward()
        optimiser.step()

    optimiser = torch.optim.Adam(module.parameters(), lr=recipe.lr)
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(data[0]), generator=generator).split(recipe.batch_size):
            step(optimiser, tuple(tensor[index] for tensor in data))
    module.eval()
    optimiser = torch.optim.Adam(module.parameters(), lr=recipe.settle_lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=recipe.settle)
    for _ in range(recipe.settle):
        step(optimiser, data)
        schedule.step()
    return module


def report(name: str, module: nn.Module) -> str:
    """Where training ended."""
    network = NETWORKS[name]
    loss = network.loss_fn(module, network.data())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return (
        f"{name}: {len(weights)} weights, loss {loss.item():.6f}, gradient norm {float(gradient.norm()):.2e}, "
        f"d / |w*|^2 = {len(weights) / float(weights.square().sum()):.2f}"
    )


def main() -> None:
    """Train, store, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"among {', '.join(RECIPES)}")
    for name in parser.parse_args().names or RECIPES:
        module = train(name)
        np.savez(weights_file(name), **{key: value.detach().numpy() for key, value in module.state_dict().items()})
        print(report(name, module), flush=True)


if __name__ == "__main__":
    main()
