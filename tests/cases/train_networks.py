"""Trains the networks of the cases and stores their weights: `python -m tests.cases.train_networks [name ...]`.

Deterministic on one thread (seed 0): Adam on minibatches, in training mode, then full-batch Adam with a decaying rate
in eval mode (BatchNorm with the statistics it has by then), so that w* is close to a minimum of the loss that is
sampled, at a training loss that is not zero. Where a recipe says so,
L-BFGS in float64 goes on from there to the minimum.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tests.cases.problems import NETWORKS, LossFn, weights_file


@dataclass(frozen=True)
class Recipe:
    """Epochs of minibatches at `lr`, `settle` full-batch steps from `settle_lr` down to zero, `minimise` of L-BFGS."""

    epochs: int = 30
    batch_size: int = 64
    lr: float = 1e-3
    settle: int = 300
    settle_lr: float = 1e-4
    minimise: int = 0


RECIPES: dict[str, Recipe] = {
    "digits_mlp": Recipe(),
    "convnet": Recipe(epochs=40, lr=1e-2, settle=400, settle_lr=1e-3, minimise=600),
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
    if recipe.minimise:
        minimise(module, network.loss_fn, data, recipe.minimise)
    return module


def minimise(module: nn.Module, loss_fn: LossFn, data: tuple[Tensor, ...], steps: int) -> None:
    """L-BFGS with a line search on all the data, in float64; the module ends in float32."""
    module.double()
    exact = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in data)
    optimiser = torch.optim.LBFGS(
        module.parameters(),
        max_iter=steps,
        history_size=50,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = loss_fn(module, exact)
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    module.float()


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
