"""Trains the digits MLP and stores its weights: `python -m tests.cases.train_digits`.

Deterministic on one thread (seed 0): Adam at 1e-3, batch 64, then full-batch Adam with a decaying rate, so that w* is
close to a minimum at a small, non-zero training loss.
"""

from __future__ import annotations

import numpy as np
import torch

from tests.cases.problems import DIGITS_WEIGHTS, cross_entropy, digits_data, digits_module


def train(epochs: int = 30, settle: int = 300, seed: int = 0) -> torch.nn.Module:
    """The trained module."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    x, y = digits_data()
    module = digits_module()
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(64):
            optimiser.zero_grad()
            cross_entropy(module, (x[index], y[index])).backward()
            optimiser.step()
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=settle)
    for _ in range(settle):
        optimiser.zero_grad()
        cross_entropy(module, (x, y)).backward()
        optimiser.step()
        schedule.step()
    return module


def main() -> None:
    """Train, store, report."""
    module = train()
    x, y = digits_data()
    loss = cross_entropy(module, (x, y))
    loss.backward()
    norm = sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None) ** 0.5
    accuracy = float((module(x).argmax(dim=1) == y).float().mean())
    np.savez(DIGITS_WEIGHTS, **{name: value.detach().numpy() for name, value in module.state_dict().items()})
    print(f"loss {float(loss):.6f}, accuracy {accuracy:.4f}, gradient norm {norm:.2e}, {DIGITS_WEIGHTS}")


if __name__ == "__main__":
    main()
