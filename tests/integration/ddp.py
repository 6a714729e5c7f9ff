"""Scenarios of several data-parallel ranks, run by :mod:`tests.integration.ranks`."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_slt import TransitionMonitor
from lightning_slt.callbacks import clock as clock_module
from lightning_slt.callbacks.distribution import Ranks
from tests.integration import ddp_failures, ddp_samples, models
from tests.integration.ddp_parts import Result, ranks_of, said
from tests.integration.harness import (
    Scenario,
    assert_same,
    quiet_trainer,
    seed_everything,
    tiny_monitor,
)
from tests.integration.models import Net, Plain, loaders, tensors, with_validation
from tests.integration.scripted import Scripted, jump

LIMITS = {"spawn": 180.0, "fork": 90.0}


def undisturbed(folder: Path, world: int) -> Result:
    """3 steps an epoch on each of two ranks, with validation."""
    monitor = tiny_monitor(every_n_train_steps=2)
    trace = Scenario(Net, with_validation, ranks_of(world)).assert_undisturbed(folder, monitor)
    metrics = {k: float(v) for k, v in trace.trainer.callback_metrics.items() if k.startswith("slt")}
    return said(monitor, num_batches=trace.num_batches, metrics=metrics, weights=trace.module.net[0].weight.detach())


def accumulation(folder: Path, world: int) -> Result:
    """4 batches an epoch in windows of 3."""
    monitor = tiny_monitor(every_n_train_steps=1)
    scenario = Scenario(Net, lambda: loaders(28), ranks_of(world, accumulate_grad_batches=3))
    trace = scenario.assert_undisturbed(folder, monitor)
    return said(monitor, num_batches=trace.num_batches, global_step=trace.trainer.global_step)


def _precision(
    folder: Path,
    world: int,
    make: Callable[[], Any] = Net,
    settings: Callable[[], dict[str, Any]] = dict,
    **trainer: Any,
) -> Result:
    """Training is the same on two ranks; what is handed back is of weights that stay where they began."""
    if world > 1:
        scenario = Scenario(make, loaders, lambda: {**ranks_of(world, **trainer)(), **settings()})
        scenario.assert_undisturbed(folder / "net", tiny_monitor())
    held = _held(folder / "held", world, lambda: {**ranks_of(world, max_epochs=1, **trainer)(), **settings()})
    del held["weights"]
    return held


def bf16_mixed(folder: Path, world: int) -> Result:
    return _precision(folder, world, precision="bf16-mixed")


def bf16_true(folder: Path, world: int) -> Result:
    return _precision(folder, world, precision="bf16-true")


def double(folder: Path, world: int) -> Result:
    return _precision(folder, world, precision="64-true")


def fp16_true(folder: Path, world: int) -> Result:
    """Not with Adam, whose epsilon is zero in float16."""
    return _precision(folder, world, Plain, precision="16-true")


def scaled() -> dict[str, Any]:
    """A loss scale that grows every other step, so that the scaler's state moves."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def fp16_mixed(folder: Path, world: int) -> Result:
    return _precision(folder, world, settings=scaled)


def tried_methods(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_epochs=1, method="auto")
    Scenario(Net, loaders, ranks_of(world)).assert_undisturbed(folder, monitor)
    return said(monitor)


def _held(
    folder: Path, world: int, make_trainer: Callable[[], dict[str, Any]] | None = None, **settings: Any
) -> Result:
    """Weights that stay where they began, so that they are the same for any number of ranks."""
    monitor = tiny_monitor(**{"every_n_epochs": 1, "num_chains": 4, "num_draws": 20, **settings})
    trainer = make_trainer or ranks_of(world, max_epochs=1)
    Scenario(lambda: SeesWeights(lr=0.0), loaders, trainer).run(folder, monitor)
    return said(monitor, chain_steps=len(models.CHAIN_SAW), weights=list(models.CHAIN_SAW))


class SeesWeights(Plain):
    pause = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training:
            time.sleep(self.pause)
        models.chain_saw(self, self.net.weight)
        return super().training_step(batch, batch_idx)


def fixed_step(folder: Path, world: int) -> Result:
    return _held(folder, world)


def calibrated_step(folder: Path, world: int) -> Result:
    return _held(folder, world, sampler=None, num_burnin_steps=None, num_steps_bw_draws=None)


def five_chains(folder: Path, world: int) -> Result:
    """No number of ranks but one divides them."""
    return _held(folder, world, num_chains=5)


def two_chains(folder: Path, world: int) -> Result:
    """Four ranks are more than there are chains."""
    return _held(folder, world, num_chains=2)


def two_machines(folder: Path, world: int) -> Result:
    """One rank on each of ``world`` machines, as far as Lightning can tell."""
    os.environ.update(NODE_RANK=os.environ["LOCAL_RANK"], LOCAL_RANK="0")
    return _held(folder, world, lambda: {**ranks_of(world, max_epochs=1)(), "devices": 1, "num_nodes": world})


def slow_rank(folder: Path, world: int) -> Result:
    """The second rank takes 0.1 s longer for each step of a chain than the first, and is waited for."""
    SeesWeights.pause = 0.1 if os.environ.get("LOCAL_RANK") == "1" else 0.0
    return _held(folder, world, num_draws=8)


class OtherSizes(LightningDataModule):
    """32 samples on the first rank, 16 on the second: shards that were cut by hand."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return loaders(32 // (1 + self.trainer.global_rank))["train_dataloaders"]


def other_sizes(folder: Path, world: int) -> Result:
    """As many batches on each rank, so that training does not hang."""
    monitor = tiny_monitor(every_n_train_steps=2)
    trainer = ranks_of(world, use_distributed_sampler=False, limit_train_batches=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(Net, lambda: {"datamodule": OtherSizes()}, trainer).assert_undisturbed(folder, monitor)
    return said(monitor, warnings=[str(w.message) for w in caught if "different sizes" in str(w.message)])


class OwnPart(IterableDataset[Any]):
    """24 samples, of which each rank has every second one; or all of them on each."""

    def __init__(self, cut: bool) -> None:
        self.cut, self.samples = cut, tensors()

    def __len__(self) -> int:
        return len(self.samples) // (2 if self.cut else 1)

    def __iter__(self) -> Iterator[Any]:
        numbers = range(torch.distributed.get_rank() if self.cut else 0, len(self.samples), 2 if self.cut else 1)
        return iter([self.samples[number] for number in numbers])


def own_parts(folder: Path, world: int) -> Result:
    """A run of ranks that have parts, of ranks that have all of it, and with n given."""
    sizes, texts = [], []
    for cut, settings in ((True, {}), (False, {}), (True, {"num_samples": 24})):
        monitor = tiny_monitor(every_n_train_steps=3, **settings)
        scenario = Scenario(Net, lambda cut=cut: loaders(dataset=OwnPart(cut)), ranks_of(world))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scenario.run(folder / str(len(sizes)), monitor)
        sizes.append([e.num_samples for e in monitor.estimates])
        texts.append([str(w.message) for w in caught if "of its own, and n counts" in str(w.message)])
    return {"sizes": sizes, "warnings": texts}


def other_lengths(folder: Path, world: int) -> Result:
    """8 batches an epoch on the first rank, 4 on the second: what epochs are refused with, and a run by steps."""
    scenario = Scenario(Net, lambda: {"datamodule": OtherSizes()}, ranks_of(world, use_distributed_sampler=False))
    epochs, steps = tiny_monitor(every_n_epochs=1), tiny_monitor(log_spaced=3)
    raised = []
    for monitor in (epochs, steps):
        try:
            scenario.run(folder, monitor)
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")
    return said(steps, raised=raised)


def fewer_chains_than_ranks(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_epochs=1, num_chains=1)
    Scenario(Net, loaders, ranks_of(world)).assert_undisturbed(folder, monitor)
    return said(monitor)


def resume(folder: Path, world: int) -> Result:
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    first, again = tiny_monitor(every_n_train_steps=2), tiny_monitor(every_n_train_steps=2)
    saving = ranks_of(world, callbacks=[saver], enable_checkpointing=True, max_epochs=1)
    Scenario(Net, loaders, saving).run(folder, first)
    checkpoint = str(folder / "step=3.ckpt")
    without = Scenario(Net, loaders, ranks_of(world)).run(folder, ckpt_path=checkpoint)
    with_monitor = Scenario(Net, loaders, ranks_of(world)).run(folder, again, ckpt_path=checkpoint)
    assert_same(without, with_monitor)
    return said(again, before=[e.state_dict() for e in first.estimates])


class Clock:
    """Stands in for the module ``time`` in the monitor: a step takes 1 s on the first rank, ever longer on others."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def step(self, rank: int) -> None:
        self.now += 1.0 if rank == 0 else 1.0 + 0.7 * self.now


CLOCK = Clock()


class Timed(Plain):
    """Moves the clock with each step of training and of a chain."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        CLOCK.step(self.trainer.global_rank)
        return super().training_step(batch, batch_idx)


def budget(folder: Path, world: int) -> Result:
    """The ranks' clocks tell quite different times, and only the first one's counts."""
    clock_module.time = CLOCK  # type: ignore[assignment]
    monitor = tiny_monitor(every_n_train_steps=None, max_overhead=0.2)
    exchanges = 0
    original = Ranks.exchange

    def counted(self: Ranks, work: Callable[[], Any]) -> list[Any]:
        nonlocal exchanges
        exchanges += 1
        return original(self, work)

    Ranks.exchange = counted  # type: ignore[method-assign]
    trainer = ranks_of(world, max_epochs=-1, max_steps=200)
    trace = Scenario(Timed, loaders, trainer).assert_undisturbed(folder, monitor)
    return said(monitor, num_batches=trace.num_batches, now=CLOCK.now, exchanges=exchanges)


def spawn(folder: Path, world: int) -> Result:
    """Lightning starts the ranks itself; what is asked is what the process that called ``fit`` has after."""
    return _started("spawn", folder)


def fork(folder: Path, world: int) -> Result:
    """As in a notebook."""
    return _started("fork", folder)


def _started(how: Any, folder: Path) -> Result:
    seed_everything()
    strategy = DDPStrategy(process_group_backend="gloo", start_method=how)
    monitor = tiny_monitor(every_n_train_steps=2)
    trainer = quiet_trainer(folder, devices=2, strategy=strategy, callbacks=[monitor])
    trainer.fit(Net(), **loaders())
    return said(monitor, metrics={k: float(v) for k, v in trainer.callback_metrics.items()})


def _scripted(world: int, folder: Path, **trainer: Any) -> Result:
    """A run of 30 steps with a jump at 16: what each rank did about it."""
    called: list[Any] = []
    monitor = Scripted(lambda step: jump(step, at=16))
    watch = TransitionMonitor(on_transition=lambda t, trainer, _: called.append((t.id, trainer.global_step)))
    settings = {"max_epochs": 10, **trainer}
    trace = Scenario(Plain, loaders, ranks_of(world, **settings)).run(folder, watch, monitor)
    metrics = {k: float(v) for k, v in trace.trainer.callback_metrics.items() if "transition" in k}
    return {
        "called": called,
        "transitions": [t.as_dict() for t in watch.transitions],
        "metrics": metrics,
        "checkpoints": dict(watch.reports[0].checkpoints),
        "global_step": trace.trainer.global_step,
    }


def transitions(folder: Path, world: int) -> Result:
    return _scripted(world, folder)


def transitions_fail(folder: Path, world: int) -> Result:
    """What is called at the flag fails on the second rank alone."""

    def call(transition: Any, trainer: Any, module: Any) -> None:
        if trainer.global_rank == 1:
            raise OSError("only this rank fails")

    monitor, watch = Scripted(lambda step: jump(step, at=16)), TransitionMonitor(on_transition=call)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = Scenario(Plain, loaders, ranks_of(world, max_epochs=10)).run(folder, watch, monitor)
    texts = [str(w.message) for w in caught if "on_transition failed" in str(w.message)]
    return {"warnings": texts, "num_batches": trace.num_batches}


def transitions_stop(folder: Path, world: int) -> Result:
    """Both ranks stop on the flag."""
    stop = EarlyStopping("slt/transition/flag", mode="max", stopping_threshold=0.5, patience=10**9)
    return _scripted(world, folder, callbacks=[stop])


SCENARIOS: dict[str, Callable[[Path, int], Result]] = {
    **ddp_samples.SCENARIOS,
    **ddp_failures.SCENARIOS,
    **{
        f.__name__: f
        for f in (
            undisturbed,
            accumulation,
            tried_methods,
            fixed_step,
            calibrated_step,
            five_chains,
            two_chains,
            two_machines,
            slow_rank,
            other_sizes,
            own_parts,
            other_lengths,
            bf16_mixed,
            bf16_true,
            fp16_mixed,
            fp16_true,
            double,
            transitions,
            transitions_stop,
            transitions_fail,
            fewer_chains_than_ranks,
            resume,
            budget,
            spawn,
            fork,
        )
    },
}
ALONE = (
    "fixed_step",
    "calibrated_step",
    "five_chains",
    "two_chains",
    "slow_rank",
    "bf16_mixed",
    "bf16_true",
    "fp16_mixed",
    "fp16_true",
    "double",
    *ddp_samples.ALONE,
)
"""Also in one process, which the ranks are held against."""
FOUR = (
    "fixed_step",
    "calibrated_step",
    "five_chains",
    "two_chains",
    *ddp_samples.FOUR,
)
SPAWNED = ("spawn", "fork")
RUNS: tuple[tuple[str, int], ...] = (
    *((name, 0 if name in SPAWNED else 2) for name in SCENARIOS),
    *((name, 1) for name in ALONE),
    *((name, 4) for name in FOUR),
)
"""Names and ranks; 0 leaves the start of the ranks to Lightning."""
