"""What a step reaches beside its own state: hooks, anomalies, profilers, wandb, data and thawing weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset, default_collate

from lightning_slt import SGLD
from tests.integration.harness import Scenario, quiet_trainer, seed_everything, steps_of, tiny_monitor
from tests.integration.models import BATCH, IN, Plain, loaders, tensors
from tests.integration.one_epoch import estimates


class BackwardHooked(Plain):
    """Its hook of the backward pass keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        seen = self.seen
        self.net.register_full_backward_hook(lambda module, gi, go: seen.append(go[0].norm()))

    def on_train_epoch_end(self) -> None:
        self.log("gradients", torch.stack(self.seen).mean())


def test_a_backward_hook_does_not_hear_the_chains(tmp_path: Path) -> None:
    monitor = tiny_monitor()
    Scenario(BackwardHooked, loaders).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 3


WATCHED: list[bool] = []


class Watched(Plain):
    """Writes down at each call, where chains write as well, whether autograd looks for anomalies."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        WATCHED.append(torch.is_anomaly_enabled())
        return super().training_step(batch, batch_idx)


def test_anomalies_are_looked_for_in_training_alone(tmp_path: Path) -> None:
    WATCHED.clear()
    monitor = tiny_monitor(every_n_train_steps=3, method="sequential")
    trainer = quiet_trainer(tmp_path, max_epochs=1, detect_anomaly=True, callbacks=[monitor])
    trainer.fit(Watched(), **loaders(6 * BATCH))
    assert sum(WATCHED) == 6 and len(WATCHED) > 30


class Profiled(Plain):
    """Times a part of its step; it costs twice where the profiler is another one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.trainer.profiler.profile("mine"):  # type: ignore[attr-defined]
            loss = super().training_step(batch, batch_idx)
        return loss * (1.0 if isinstance(self.trainer.profiler, SimpleProfiler) else 2.0)  # type: ignore[attr-defined]


def test_what_a_step_profiles_is_of_training_alone(tmp_path: Path) -> None:
    profiler, monitor = SimpleProfiler(tmp_path, "profile"), tiny_monitor(every_n_train_steps=3)
    seed_everything()
    trainer = quiet_trainer(tmp_path, max_epochs=1, profiler=profiler, callbacks=[monitor])
    trainer.fit(Profiled(), **loaders(6 * BATCH))
    assert len(profiler.recorded_durations["mine"]) == 6
    assert [e.init_loss for e in monitor.estimates] == [e.init_loss for e in estimates(Plain, tmp_path)]


class LogsToWandb(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        wandb.log({"loss": loss.item()})
        return loss


def test_what_a_step_sends_to_wandb_itself_is_of_training_alone(tmp_path: Path) -> None:
    run = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    try:
        estimates(LogsToWandb, tmp_path)
        assert run.step == 6
        wandb.log({"after": 1})
        assert run.step == 7
    finally:
        run.finish()


class Mines(Plain):
    """Returns None where no triplet is left, which depends on the weights."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if loss.item() > 3.0 else loss


def test_a_chain_whose_step_has_no_loss_any_more_has_diverged_and_the_firing_is_not_lost(tmp_path: Path) -> None:
    for estimate in estimates(Mines, tmp_path, sampler=SGLD(lr=0.5)):
        assert estimate.reasons == ("no chain stayed finite",)
        assert estimate.num_bad_chains == estimate.num_chains == 2


class Jitters(Subset[Any]):
    """A subset of the user's own, with noise of its own."""

    def __init__(self) -> None:
        super().__init__(tensors(24), list(range(24)))
        self.noise = torch.Generator().manual_seed(2)
        self.reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        x, y = super().__getitem__(index)
        return x + torch.randn(x.shape, generator=self.noise) + 0.01 * self.reads, y

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


class Masks:
    """A collate function that draws."""

    def __init__(self) -> None:
        self.noise = torch.Generator().manual_seed(4)

    def __call__(self, samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return x * (torch.rand(x.shape, generator=self.noise) > 0.3), y


@pytest.mark.parametrize("data", [lambda: loaders(dataset=Jitters()), lambda: loaders(collate_fn=Masks())])
def test_data_with_a_state_of_its_own_is_not_moved_on(data: Callable[[], Any], tmp_path: Path) -> None:
    monitor = tiny_monitor()
    Scenario(Plain, data).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 3


class WithBackbone(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(IN, IN)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def test_weights_that_thaw_later_are_measured_from_then_on(tmp_path: Path) -> None:
    monitor = tiny_monitor(every_n_epochs=1, restrict="backbone", on_failure="warn")
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[monitor, thaw])
    with pytest.warns(UserWarning, match=r"step 6 failed and is left out.*'backbone'.* is frozen"):
        trainer.fit(WithBackbone(), **loaders(6 * BATCH))
    assert steps_of(monitor) == [12, 18]


def test_weights_that_nothing_thaws_are_refused_at_the_start(tmp_path: Path) -> None:
    module = WithBackbone()
    module.backbone.requires_grad_(False)
    trainer = quiet_trainer(tmp_path, callbacks=[tiny_monitor(restrict="backbone")])
    with pytest.raises(MisconfigurationException, match=r"'backbone'.* is frozen"):
        trainer.fit(module, **loaders())
