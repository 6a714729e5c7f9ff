"""The yardstick: forward and backward over minibatches drawn as a chain draws them, and no update of the weights."""

from __future__ import annotations

import _path  # noqa: F401
import torch
from harness import Outcome, Settings, run
from models import Case


def estimate(case: Case, settings: Settings) -> Outcome:
    module, loss = case.module.train(), None
    per_epoch = case.n // case.batch_size
    for chain in range(settings.chains):
        generator = torch.Generator().manual_seed(settings.seed + chain)
        for step in range(settings.draws + settings.burnin):
            if step % per_epoch == 0:
                batches = torch.randperm(case.n, generator=generator)[: per_epoch * case.batch_size].split(
                    case.batch_size
                )
            chosen = batches[step % per_epoch]
            module.zero_grad(set_to_none=True)
            loss = case.batch_loss(module(case.x[chosen]), case.y[chosen])
            loss.backward()
    return Outcome(llc=float("nan"), se=float("nan"))


if __name__ == "__main__":
    run("bare", torch.__version__, estimate)
