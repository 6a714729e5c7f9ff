"""Scenarios of ranks that share the weights of one model (FSDP2), run by :mod:`tests.integration.ranks`.

With one rank a scenario runs without any strategy: that is what the others are held against.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_slt import SLTMonitor
from tests.integration import models
from tests.integration.harness import Scenario, TrainingTrace, tiny_monitor
from tests.integration.models import Net, Plain, loaders, with_validation

LIMITS: dict[str, float] = {}
Result = dict[str, Any]


def shards_of(world: int, **kwargs: Any) -> Callable[[], dict[str, Any]]:
    """A trainer whose ``world`` ranks hold a part of the weights each; of one process without a strategy where it is
    1."""

    def make() -> dict[str, Any]:
        if world == 1:
            return dict(kwargs)
        strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, process_group_backend="gloo")
        return {"devices": world, "strategy": strategy, **kwargs}

    return make


def shard(module: Any) -> None:
    """Each layer of ``module.net`` alone, and what is left; nothing without a mesh."""
    mesh = module._device_mesh
    if mesh is None:
        return
    for layer in module.net:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(module.net, mesh=mesh["data_parallel"])


class Sharded(Net):
    """BatchNorm, dropout, Adam, a scheduler."""

    def configure_model(self) -> None:
        shard(self)


class Held(Sharded):
    """Weights and statistics that stay where they began: the same on any number of ranks, whose batches differ."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net[1].momentum = 0.0


def said(monitor: SLTMonitor, trace: TrainingTrace, **more: Any) -> Result:
    return {
        "estimates": [e.state_dict() for e in monitor.estimates],
        "num_batches": trace.num_batches,
        "displacements": monitor._course.memory.displacements,
        **more,
    }


def _held(folder: Path, world: int, **settings: Any) -> Result:
    monitor = tiny_monitor(at_steps=[0], num_chains=3, num_draws=20, **settings)
    return said(monitor, Scenario(Held, loaders, shards_of(world, max_epochs=1)).run(folder, monitor))


def fixed_step(folder: Path, world: int) -> Result:
    return _held(folder, world)


def restricted(folder: Path, world: int) -> Result:
    """Only the last layer moves; its gradients alone are computed."""
    return _held(folder, world, restrict="net.4.*")


def defaults(folder: Path, world: int) -> Result:
    """Nothing is said but when, and to raise: 4 chains whose step, burn-in and length are found."""
    monitor = SLTMonitor(at_steps=[0], on_failure="raise", num_draws=25)
    return said(monitor, Scenario(Held, loaders, shards_of(world, max_epochs=1)).run(folder, monitor))


def undisturbed(folder: Path, world: int) -> Result:
    """Three firings, of which the later ones start from the chains of the first."""
    monitor = tiny_monitor(every_n_train_steps=2)
    trace = Scenario(Sharded, with_validation, shards_of(world)).assert_undisturbed(folder, monitor)
    metrics = {k: float(v) for k, v in trace.trainer.callback_metrics.items() if k.startswith("slt")}
    return said(monitor, trace, metrics=metrics)


def accumulation(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_train_steps=1)
    trainer = shards_of(world, accumulate_grad_batches=3, max_epochs=1)
    trace = Scenario(Sharded, lambda: loaders(28), trainer).assert_undisturbed(folder, monitor)
    return said(monitor, trace, global_step=trace.trainer.global_step)


class Fails(nn.Module):
    """Between the layers, in chains, when it is told to."""

    armed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.armed and not self.training and x.requires_grad:
            raise RuntimeError("failed between the layers")
        return x


class FailsInChain(Sharded):
    """On all ranks: between two sharded layers at the first firing, in the loss at the second, in the backward pass at
    the third; the fourth is well."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, Fails())

    def loss(self, batch: Any) -> Tensor:
        step = self.trainer.global_step
        in_chain = not self.training and torch.is_grad_enabled()
        self.net[3].armed = in_chain and step == 2
        loss = super().loss(batch)
        if in_chain and step == 4:
            raise RuntimeError("failed in the loss")
        if in_chain and step == 6:
            loss.register_hook(_fail)
        return loss


def _fail(_: Tensor) -> None:
    raise RuntimeError("failed on the way back")


def fails_in_chain(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_train_steps=2, on_failure="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = shards_of(world, max_epochs=3)
        trace = Scenario(FailsInChain, loaders, trainer).assert_undisturbed(folder, monitor)
    texts = [str(w.message) for w in caught if "failed" in str(w.message)]
    return said(monitor, trace, warnings=texts)


class FlatLoss(Plain):
    """A loss that does not depend on the 4,000 weights: all that moves them is the noise."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net = nn.Sequential(nn.Linear(4, 800), nn.Linear(800, 2, bias=False))

    def configure_model(self) -> None:
        shard(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        models.chain_saw(self, torch.zeros(()))
        return 0.0 * self.net(batch[0]).sum() + batch[0].mean() ** 2


def noise(folder: Path, world: int) -> Result:
    """Where two chains are after 6 steps."""
    monitor = tiny_monitor(at_steps=[0], localization=0.0)
    return said(monitor, Scenario(FlatLoss, loaders, shards_of(world, max_epochs=1)).run(folder, monitor))


SCENARIOS: dict[str, Callable[[Path, int], Result]] = {
    f.__name__: f
    for f in (
        fixed_step,
        restricted,
        defaults,
        undisturbed,
        accumulation,
        fails_in_chain,
        noise,
    )
}
RUNS: tuple[tuple[str, int], ...] = (
    *((name, 2) for name in SCENARIOS),
    ("fixed_step", 1),
    ("restricted", 1),
    ("defaults", 1),
    ("noise", 1),
    ("fixed_step", 4),
)
