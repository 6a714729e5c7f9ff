"""The harness itself: a callback that disturbs training in one way is found out, and the disturbance is named."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from tests.integration.harness import Scenario, assert_same
from tests.integration.models import Net, loaders, with_validation

Disturbance = Callable[[Trainer, LightningModule, Any], Any]


class Disturbs(Callback):
    """Does one thing after the fourth batch."""

    def __init__(self, disturbance: Disturbance) -> None:
        self.disturbance = disturbance

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if trainer.global_step == 4:
            self.disturbance(trainer, pl_module, batch)


def move_statistics(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    """What an estimate on the live module does: a forward pass in train mode, with the generator put back."""
    with torch.random.fork_rng(), torch.no_grad():
        module.net(batch[0])


def nudge_weight(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    """Noise added and taken off again: right up to a rounding error."""
    with torch.no_grad():
        module.net[0].weight.add_(1.0).sub_(1.0)


def edit_optimizer(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    next(iter(trainer.optimizers[0].state.values()))["exp_avg"].mul_(0.5)


def take_a_batch(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    next(iter(trainer.train_dataloader))


def log_a_value(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    trainer.logger.log_metrics({"loss_step": 0.0}, step=3)


def backward(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    with torch.random.fork_rng():
        module.eval()
        module.loss(batch).backward()
        module.train()


DISTURBANCES: dict[str, tuple[Disturbance, str]] = {
    "torch random numbers": (lambda *_: torch.rand(1), "rng/torch"),
    "numpy random numbers": (lambda *_: np.random.rand(1), "rng/numpy"),  # noqa: NPY002
    "python random numbers": (lambda *_: random.random(), "rng/python"),
    "BatchNorm statistics": (move_statistics, "running_mean"),
    "weights": (nudge_weight, "weights/net.0.weight"),
    "gradients": (backward, "grad/net.0.weight"),
    "training flags": (lambda trainer, module, _: module.eval(), "flags"),
    "a frozen parameter": (lambda t, module, _: module.net[0].bias.requires_grad_(False), "requires_grad/net.0.bias"),
    "storage": (lambda t, m, _: setattr(m.net[0].weight, "data", m.net[0].weight.data.clone()), "storage/net.0.weight"),
    "a python attribute": (lambda trainer, module, _: setattr(module, "num_calls", 0), "attributes/num_calls"),
    "a hook left behind": (lambda t, m, _: m.net[0].register_forward_hook(lambda *_: None), "flags/net.0"),
    "optimiser state": (edit_optimizer, "exp_avg"),
    "scheduler": (lambda trainer, *_: trainer.lr_scheduler_configs[0].scheduler.step(), "optimizer|scheduler"),
    "gradient mode": (lambda *_: torch.set_grad_enabled(False), "torch/0|does not require grad"),
    "the loader's generator": (take_a_batch, "rng"),
    "a row in the log": (log_a_value, "logged row"),
    "a monitored value": (lambda t, *_: t.callback_metrics.update(other=torch.ones(())), "metrics/other"),
    "an early end": (lambda trainer, *_: setattr(trainer, "should_stop", True), "should_stop"),
}


@pytest.mark.parametrize(("disturbance", "name"), DISTURBANCES.values(), ids=DISTURBANCES)
def test_disturbance_is_found_and_named(disturbance: Disturbance, name: str, tmp_path: Path) -> None:
    scenario = Scenario(Net, lambda: loaders(generator=torch.Generator().manual_seed(3)))
    with pytest.raises((AssertionError, RuntimeError), match=name), torch.enable_grad():
        scenario.assert_undisturbed(tmp_path, Disturbs(disturbance))


def test_two_runs_without_a_callback_are_the_same(tmp_path: Path) -> None:
    scenario = Scenario(Net, with_validation)
    first, second = scenario.run(tmp_path), scenario.run(tmp_path)
    assert_same(first, second)
    assert first.num_batches == 12
    assert len({float(loss) for loss in first.losses}) == 12
    assert first.rows


def test_own_keys_are_allowed_to_be_new(tmp_path: Path) -> None:
    def publish(trainer: Trainer, module: LightningModule, batch: Any) -> None:
        trainer.logger.log_metrics({"slt/llc/mean": 1.0}, step=3)
        module.log("slt/llc/mean", 1.0)

    Scenario(Net, loaders).assert_undisturbed(tmp_path, Disturbs(publish))
