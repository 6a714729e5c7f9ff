"""What Lightning does around a run beside training: finders, evaluation of checkpoints, manual optimisation, Ctrl-C,
the signal of a scheduler."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.utils.data import DataLoader

from lightning_slt import TransitionMonitor
from lightning_slt.record import RunRecord
from tests.integration.harness import (
    Scenario,
    assert_same,
    flatten,
    quiet_trainer,
    seed_everything,
    steps_of,
    tiny_monitor,
)
from tests.integration.models import BATCH, IN, Net, Plain, loaders, tensors, with_validation, zeros


def assert_same_state(ours: Any, theirs: Any) -> None:
    """To the last bit, however it is nested."""
    a, b = flatten(ours), flatten(theirs)
    assert a.keys() == b.keys()
    differing = [k for k, v in a.items() if not (torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k])]
    assert not differing


# -------------------------------------------------------------------------------------------------------------- finders


class Searched(Net):
    """Its step size and its batch size are to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.1, 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(tensors(), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(tensors(8), BATCH)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


FINDERS: dict[str, Callable[[], Callback]] = {
    "learning rate": lambda: LearningRateFinder(num_training_steps=30),
    "batch size": lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2, init_val=2),
}


@pytest.mark.parametrize("first", [True, False], ids=["before the monitor", "after the monitor"])
@pytest.mark.parametrize("make", FINDERS.values(), ids=FINDERS)
def test_a_finder_that_trains_before_training_finds_the_same(
    make: Callable[[], Callback], first: bool, tmp_path: Path
) -> None:
    """Its trial steps are no steps of the run: nothing is measured there."""
    monitor = tiny_monitor()
    scenario = Scenario(Searched, dict, lambda: {"enable_checkpointing": True})
    without = scenario.run(tmp_path / "a", make())
    found = scenario.run(tmp_path / "b", *([make(), monitor] if first else [monitor, make()]))
    assert_same(without, found)
    assert (found.module.lr, found.module.batch_size) == (without.module.lr, without.module.batch_size) != (0.1, 2)
    last = found.trainer.global_step
    assert steps_of(monitor) == list(range(4, last + 1, 4)) and last in (12, 24)


def test_a_tuner_with_the_callbacks_in_its_trainer(tmp_path: Path) -> None:
    monitor = tiny_monitor(every_n_train_steps=3)
    found = []
    for callbacks in ([], [monitor, TransitionMonitor()]):
        seed_everything()
        module = Searched()
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
        tuner = Tuner(trainer)
        tuner.scale_batch_size(module, steps_per_trial=2, max_trials=2, init_val=2)
        tuner.lr_find(module, num_training=30)
        assert monitor.estimates == []
        trainer.fit(module)
        found.append((module.batch_size, module.lr, module.state_dict()))
    assert found[0][:2] == found[1][:2]
    assert_same_state(found[1][2], found[0][2])
    assert steps_of(monitor) == list(range(3, trainer.global_step + 1, 3))


# ---------------------------------------------------------------------------------- checkpoints that are looked at only


def test_looking_at_an_old_checkpoint_keeps_the_history(tmp_path: Path) -> None:
    """``test`` and ``validate`` load the callbacks' states too; what came after the checkpoint has been measured."""

    class Tested(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test", self.loss(batch))

    monitor, watch = tiny_monitor(every_n_train_steps=2), TransitionMonitor()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = quiet_trainer(tmp_path, callbacks=[monitor, watch, saver], enable_checkpointing=True)
    module, old = Tested(), str(tmp_path / "step=4.ckpt")
    trainer.fit(module, **with_validation())
    before = watch.state_dict()
    for look in (trainer.test, trainer.validate):
        look(module, DataLoader(tensors(8), BATCH), ckpt_path=old, verbose=False)
        assert steps_of(monitor) == [2, 4, 6, 8, 10, 12]
        assert watch.state_dict() == before
    # a process that has measured nothing itself sees what the checkpoint knows; and resuming goes back to it
    fresh = tiny_monitor(every_n_train_steps=2)
    trainer = quiet_trainer(tmp_path, callbacks=[fresh, TransitionMonitor()])
    trainer.test(module, DataLoader(tensors(8), BATCH), ckpt_path=old, verbose=False)
    assert steps_of(fresh) == [2, 4]
    resumed = quiet_trainer(tmp_path, callbacks=[monitor, watch], max_steps=6)
    resumed.fit(Tested(), ckpt_path=old, **with_validation())
    assert steps_of(monitor) == [2, 4, 6]


def test_evaluation_between_two_fits_with_one_monitor(tmp_path: Path) -> None:
    """``fit`` of one epoch, ``validate``, then ``fit`` up to three: one history, and training is the same."""
    monitor = tiny_monitor()
    seen = []
    for callbacks in ([], [monitor, TransitionMonitor()]):
        seed_everything()
        module, data = Net(), with_validation()
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1)
        trainer.fit(module, **data)
        told = [trainer.validate(module, data["val_dataloaders"], verbose=False)]
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, **data)
        told.append(trainer.validate(module, data["val_dataloaders"], verbose=False))
        seen.append((told, module.state_dict(), torch.get_rng_state()))
    assert_same_state(seen[1], seen[0])
    assert steps_of(monitor) == [4, 8, 12, 16]
    assert [e.step for e in RunRecord(monitor.folder).read()] == [4, 8, 12, 16]


# -------------------------------------------------------------------------------------------------- manual optimisation


class Gan(LightningModule):
    """Two optimisers with schedules, which step at every other batch; gradients are clipped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, IN))
        self.critic = nn.Sequential(nn.Linear(IN, 8), nn.LeakyReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, steps = batch[0], batch_idx % 2 == 1
        fake = self.generator(torch.randn(len(real), 2))
        losses: list[Callable[[], Tensor]] = [
            lambda: says(self.critic(fake), 1.0),
            lambda: (says(self.critic(real), 1.0) + says(self.critic(fake.detach()), 0.0)) / 2,
        ]
        for optimizer, schedule, loss in zip(self.optimizers(), self.lr_schedulers(), losses, strict=True):
            self.toggle_optimizer(optimizer)
            self.manual_backward(loss() / 2)
            if steps:
                self.clip_gradients(optimizer, 1.0, "norm")
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (self.generator, self.critic)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in optimizers]


def says(logits: Tensor, what: float) -> Tensor:
    return cross_entropy(logits, torch.full_like(logits, what))


def loss_of_critic(module: Any, batch: Any) -> Tensor:
    return says(module.critic(batch[0]), 1.0)


def test_a_gan_that_accumulates_gradients(tmp_path: Path) -> None:
    """Each two optimiser steps; the critic alone is looked at, and influence with it."""
    monitor = tiny_monitor(loss_fn=loss_of_critic, restrict="critic.*", every_n_train_steps=2, probe=6, num_draws=20)
    trace = Scenario(Gan, loaders).assert_undisturbed(tmp_path, monitor)
    assert trace.trainer.global_step == 12  # both count
    assert steps_of(monitor) == [2, 4, 6, 8, 10, 12] == [e.step for e in monitor.influences]
    assert {e.num_weights for e in monitor.estimates} == {IN * 8 + 8 + 8 + 1}


# ----------------------------------------------------------------------------------- accumulation, resumed, warm chains


class Dies(Callback):
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("the power is gone")


def test_calibrated_warm_chains_go_on_from_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """From a checkpoint of every step, with accumulation: step sizes and estimates are those of an unbroken run."""
    settings: dict[str, Any] = {"every_n_train_steps": 2, "sampler": None, "num_burnin_steps": None, "num_draws": 20}

    def scenario(folder: Path, *callbacks: Callback) -> Scenario:
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = {"accumulate_grad_batches": 2, "enable_checkpointing": True}
        return Scenario(
            Plain,
            lambda: loaders(dataset=zeros(48), shuffle=False),  # an epoch that is begun anew is the same
            lambda: {**trainer, "callbacks": [saver, *callbacks]},
        )

    whole, broken, resumed = (tiny_monitor(**settings) for _ in range(3))
    scenario(tmp_path / "a").run(tmp_path / "a", whole)
    with pytest.raises(RuntimeError, match="the power is gone"):
        scenario(tmp_path / "b", Dies()).run(tmp_path / "b", broken)
    scenario(tmp_path / "c").run(tmp_path / "c", resumed, ckpt_path=str(tmp_path / "b" / "step=5.ckpt"))
    assert steps_of(broken) == [2, 4]
    assert steps_of(resumed) == steps_of(whole) == [2, 4, 6, 8, 10, 12]
    assert [(e.mean, e.step_size) for e in resumed.estimates] == [(e.mean, e.step_size) for e in whole.estimates]


# --------------------------------------------------------------------------------------------------------------- Ctrl-C


CALLS = [0]
"""Steps of chains so far: a global, as chains work on copies."""


class Interrupted(Net):
    """Ctrl-C in the middle of a chain."""

    def loss(self, batch: Any) -> Tensor:
        if not self.training:
            CALLS[0] += 1
            if CALLS[0] == 9:
                raise KeyboardInterrupt
        return super().loss(batch)


class InPlace(Interrupted):
    """Cannot be copied: its chains move the weights that train."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a socket cannot be copied")


class InterruptsAt4(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        pytest.param(Interrupted, {}, id="a copy"),
        pytest.param(Interrupted, {"method": "batched"}, id="batched"),
        pytest.param(InPlace, {}, id="in place"),
        pytest.param(InPlace, {"probe": 6, "num_draws": 20}, id="in place, samples"),
    ],
)
def test_ctrl_c_in_the_middle_of_a_chain_leaves_training_as_it_was(
    module: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Weights, gradients, flags, random states and the checkpoint that is written then."""
    CALLS[0] = 0
    left = []
    for name, callback in (("without", InterruptsAt4()), ("with", tiny_monitor(**changes))):
        seed_everything()
        net = module()
        saver = OnExceptionCheckpoint(tmp_path / name, "interrupted")
        trainer = quiet_trainer(tmp_path, callbacks=[callback, saver], enable_checkpointing=True)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(net, **loaders())
        saved = torch.load(tmp_path / name / "interrupted.ckpt", weights_only=False)
        left.append(
            {
                "weights": net.state_dict(),
                "gradients": [p.grad for p in net.parameters()],
                "trainable": [p.requires_grad for p in net.parameters()],
                "training": [m.training for m in net.modules()],
                "random state": torch.get_rng_state(),
                "saved": saved["state_dict"],
                "moments": saved["optimizer_states"],
                "attributes": sorted(vars(net)),
            }
        )
    assert CALLS[0] == 9 and trainer.global_step == 4
    assert_same_state(left[1], left[0])


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [({"every_n_train_steps": 4}, [4, 8, 12]), ({"every_n_epochs": 1}, [6, 12])],
    ids=["at a step", "at the end of an epoch"],
)
def test_ctrl_c_in_a_firing_is_said_and_the_point_is_measured_on_resume(
    schedule: dict[str, Any], steps: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint that is written then is of the weights that were to be measured."""
    CALLS[0] = 0
    first, again, whole = (tiny_monitor(**schedule) for _ in range(3))
    saver = OnExceptionCheckpoint(tmp_path, "interrupted")
    with caplog.at_level("INFO", logger="lightning.pytorch"), pytest.raises((KeyboardInterrupt, SystemExit)):
        Scenario(Interrupted, loaders, lambda: {"enable_checkpointing": True}).run(tmp_path / "a", first, saver)
    said = [r.getMessage() for r in caplog.records if "interrupted and" in r.getMessage()]
    assert said == [f"SLTMonitor: the measurement at step {steps[0]} was interrupted and is not recorded."]
    assert steps_of(first) == []
    Scenario(Net, loaders).run(tmp_path / "a", again, ckpt_path=str(tmp_path / "interrupted.ckpt"))
    Scenario(Net, loaders).run(tmp_path / "b", whole)
    assert steps_of(again) == steps_of(whole) == steps
    assert torch.equal(again.estimates[0].trace, whole.estimates[0].trace)


# ------------------------------------------------------------------------------------------- the signal of a scheduler


class Signalled(Net):
    """The scheduler announces the end of the job in the middle of a chain, of the second firing."""

    def loss(self, batch: Any) -> Tensor:
        if not self.training and self.trainer.global_step == 4:
            CALLS[0] += 1
            if CALLS[0] == 12:
                signal.raise_signal(signal.SIGUSR1)
        return super().loss(batch)


class SignalledInPlace(Signalled):
    """Cannot be copied: its chains move the weights that train."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a socket cannot be copied")


class Requeues(Callback):
    """Answers that signal with a checkpoint, at once, as Lightning does for SLURM."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: trainer.save_checkpoint(self.path))


@pytest.fixture
def _usr1() -> Any:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("_usr1")
@pytest.mark.parametrize("module", [Signalled, SignalledInPlace])
@pytest.mark.parametrize(("on_failure", "measured"), [("warn", [2, 6, 8]), ("raise", [2, 4, 6, 8])])
def test_a_checkpoint_that_a_signal_asks_for_in_a_firing_is_of_training(
    module: Any, on_failure: str, measured: list[int], tmp_path: Path
) -> None:
    """The chains are broken off, or run to their end where a failure would end the run; then it is written."""
    CALLS[0] = 0
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4, save_on_train_epoch_end=False)
    monitor = tiny_monitor(every_n_train_steps=2, on_failure=on_failure)
    callbacks = [Requeues(tmp_path / "requeue.ckpt"), monitor, saver]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_steps=8, max_epochs=-1, enable_checkpointing=True)
    seed_everything()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module(), **loaders())
    requeued, regular = (torch.load(tmp_path / f"{n}.ckpt", weights_only=False) for n in ("requeue", "step=4"))
    assert requeued["global_step"] == regular["global_step"] == 4
    assert_same_state(requeued["state_dict"], regular["state_dict"])
    assert_same_state(requeued["optimizer_states"], regular["optimizer_states"])
    assert steps_of(monitor) == measured
    said = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert len(said) == (on_failure == "warn") and all("SIGUSR1 came" in text for text in said)
    if module is Signalled:
        again = tiny_monitor(every_n_train_steps=2, on_failure=on_failure)
        steps = {"max_steps": 8, "max_epochs": -1}
        Scenario(Net, loaders, lambda: steps).run(tmp_path, again, ckpt_path=str(tmp_path / "requeue.ckpt"))
        assert steps_of(again) == [2, 4, 6, 8]  # the one that was broken off too
