"""Scenarios of several data-parallel ranks in which one of them fails, or a signal comes in the middle of chains."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import Tensor

from tests.integration import ddp_samples
from tests.integration.ddp_parts import Firing, Result, Unreadable, ranks_of, said
from tests.integration.harness import Scenario, tiny_monitor
from tests.integration.models import Net, Plain, loaders, with_validation


class Dies(Plain):
    """The second rank is gone without a word, in its chains."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training and self.trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def rank_dies(folder: Path, world: int) -> Result:
    """What the rank that is left comes to; the other one leaves nothing."""
    monitor = tiny_monitor(every_n_train_steps=2, on_failure="warn")
    try:
        Scenario(Dies, loaders, ranks_of(world)).run(folder, monitor)
    except Exception as error:
        return said(monitor, raised=f"{type(error).__name__}: {error}")
    return said(monitor, raised="")


def unreadable_on_one_rank(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_train_steps=2, on_failure="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scenario = Scenario(Net, lambda: loaders(dataset=Unreadable()), ranks_of(world))
        trace = scenario.run(folder, Firing(True), monitor, Firing(False))
    texts = [str(w.message) for w in caught if "failed and is left out" in str(w.message)]
    return said(monitor, num_batches=trace.num_batches, warnings=texts)


class OneRankRaises(Net):
    """Fails on rank 1, in the chains of the second firing."""

    def loss(self, batch: Any) -> Tensor:
        in_chain = not self.training and not self.trainer.validating
        if in_chain and self.trainer.global_rank == 1 and self.trainer.global_step == 4:
            raise RuntimeError("only this rank fails")
        return super().loss(batch)


def one_rank_raises_warn(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_train_steps=2, on_failure="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = Scenario(OneRankRaises, loaders, ranks_of(world)).assert_undisturbed(folder, monitor)
    texts = [str(w.message) for w in caught if "only this rank fails" in str(w.message)]
    return said(monitor, num_batches=trace.num_batches, warnings=texts)


def one_rank_raises_raise(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_train_steps=2, on_failure="raise")
    try:
        Scenario(OneRankRaises, loaders, ranks_of(world)).run(folder, monitor)
    except Exception as error:
        return said(monitor, raised=f"{type(error).__name__}: {error}")
    return said(monitor, raised="")


class Requeues(Callback):
    """Answers a scheduler's signal with a checkpoint, at once, as Lightning does for SLURM."""

    pids: list[int] = []

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        Requeues.pids = [0] * trainer.world_size
        torch.distributed.all_gather_object(Requeues.pids, os.getpid())
        signal.signal(signal.SIGUSR1, lambda *_: trainer.save_checkpoint(self.path))


class SignalsAll(Net):
    """The first rank's only chain is at work, the second rank waits for it, and the job is told to end."""

    calls = 0
    number = signal.SIGUSR1

    def loss(self, batch: Any) -> Tensor:
        if not self.training and self.trainer.global_rank == 0 and self.trainer.global_step == 4:
            SignalsAll.calls += 1
            if SignalsAll.calls == 12:
                time.sleep(0.5)  # the other one waits by now
                for pid in Requeues.pids:
                    os.kill(pid, self.number)
        return super().loss(batch)


def signalled(folder: Path, world: int) -> Result:
    """A checkpoint in the middle of the chains would wait for the rank that waits for them."""
    path = folder / "requeue.ckpt"
    monitor = tiny_monitor(every_n_train_steps=2, num_chains=1, on_failure="warn")
    trace = Scenario(SignalsAll, loaders, ranks_of(world)).run(folder, Requeues(path), monitor)
    step = torch.load(path, weights_only=False)["global_step"]
    return said(monitor, num_batches=trace.num_batches, step=step)


class SignalsAfterLLC(Net):
    """The same, in the chains of components that come after those of the learning coefficient."""

    monitor: Any = None
    calls = 0

    def loss(self, batch: Any) -> Tensor:
        measured = [estimate.step for estimate in SignalsAfterLLC.monitor.estimates]
        if not self.training and self.trainer.global_rank == 0 and measured[-1:] == [4]:
            SignalsAfterLLC.calls += 1
            if SignalsAfterLLC.calls == 12:
                time.sleep(0.5)
                for pid in Requeues.pids:
                    os.kill(pid, signal.SIGUSR1)
        return super().loss(batch)


def signalled_components(folder: Path, world: int) -> Result:
    """The learning coefficient is there, and its components at that step are not."""
    path = folder / "requeue.ckpt"
    settings = ddp_samples.beside(ddp_samples.COMPONENTS)
    monitor = tiny_monitor(every_n_train_steps=2, num_chains=1, on_failure="warn", **settings)
    SignalsAfterLLC.monitor = monitor
    trace = Scenario(SignalsAfterLLC, with_validation, ranks_of(world)).run(folder, Requeues(path), monitor)
    step = torch.load(path, weights_only=False)["global_step"]
    return ddp_samples.susceptible(monitor, num_batches=trace.num_batches, step=step)


class InterruptsAll(SignalsAll):
    number = signal.SIGINT


def _ctrl_c(folder: Path, world: int, on_failure: str) -> Result:
    """Ctrl-C, as a terminal sends it to all ranks; they write a checkpoint together."""
    monitor = tiny_monitor(every_n_train_steps=2, num_chains=1, on_failure=on_failure)
    callbacks = [Requeues(folder / "requeue.ckpt"), OnExceptionCheckpoint(folder, "interrupted"), monitor]
    ended: list[str] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
    try:
        make = ranks_of(world, enable_checkpointing=True)
        Scenario(InterruptsAll, loaders, make).run(folder, *callbacks)
    except SystemExit as error:  # which Lightning makes of it
        ended.append(type(error.__context__).__name__)
    saved = torch.load(folder / "interrupted.ckpt", weights_only=False)
    (state,) = (state for key, state in saved["callbacks"].items() if key.startswith("SLTMonitor"))
    return said(monitor, ended=ended, step=saved["global_step"], last=state["last_step"])


def ctrl_c(folder: Path, world: int) -> Result:
    return _ctrl_c(folder, world, "warn")


def ctrl_c_raise(folder: Path, world: int) -> Result:
    return _ctrl_c(folder, world, "raise")


SCENARIOS: dict[str, Callable[[Path, int], Result]] = {
    f.__name__: f
    for f in (
        rank_dies,
        unreadable_on_one_rank,
        one_rank_raises_warn,
        one_rank_raises_raise,
        signalled,
        signalled_components,
        ctrl_c,
        ctrl_c_raise,
    )
}
