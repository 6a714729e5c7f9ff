"""Scenarios of several data-parallel ranks that look at single samples: influence and susceptibility."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.integration.ddp_parts import Firing, Result, Unreadable, ranks_of, said
from tests.integration.harness import Scenario, SLTMonitor, tiny_monitor
from tests.integration.models import Net, Plain, loaders, with_validation


class Validates(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


def _influence(folder: Path, world: int, **settings: Any) -> Result:
    """Weights that stay where they began; 4 chains over all ranks, each read 8 times."""
    plain = {"num_chains": 4, "num_draws": 32, "probe": True, "query": 4}
    monitor = tiny_monitor(every_n_epochs=1, **{**plain, **settings})
    trainer = ranks_of(world, max_epochs=1)
    Scenario(lambda: Validates(lr=0.0), with_validation, trainer).run(folder, monitor)
    return said(monitor, influences=[e.state_dict() for e in monitor.influences], folder=str(monitor.folder))


def influence(folder: Path, world: int) -> Result:
    return _influence(folder, world)


def influence_of_three_chains(folder: Path, world: int) -> Result:
    """Two ranks do not divide them, and of four one has none."""
    return _influence(folder, world, num_chains=3)


def influence_of_calibrated_chains(folder: Path, world: int) -> Result:
    return _influence(folder, world, sampler=None, num_burnin_steps=None, num_steps_bw_draws=None)


def influence_undisturbed(folder: Path, world: int) -> Result:
    """Fewer chains than ranks: one rank has nothing to read, and joins in all the same."""
    monitor = tiny_monitor(every_n_train_steps=2, num_chains=1, num_draws=32, probe=7, query=3)
    trace = Scenario(Net, with_validation, ranks_of(world)).assert_undisturbed(folder, monitor)
    return said(monitor, num_batches=trace.num_batches, influences=[e.state_dict() for e in monitor.influences])


class OneRankLacksSamples(Plain):
    """Its chains move on both ranks; the losses of single samples cannot be had on rank 1."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training and len(batch[0]) == 1 and self.trainer.global_rank == 1:
            raise RuntimeError("only this rank fails")
        return super().training_step(batch, batch_idx)


def influence_fails_on_one_rank(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_train_steps=2, probe=7, on_failure="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = Scenario(OneRankLacksSamples, loaders, ranks_of(world)).assert_undisturbed(folder, monitor)
    texts = [str(w.message) for w in caught if "only this rank fails" in str(w.message)]
    return said(monitor, num_batches=trace.num_batches, warnings=texts, influences=len(monitor.influences))


COMPONENTS = {"first": ["net.0.*"], "last": ["net.4.*"]}


def beside(components: Any) -> dict[str, Any]:
    """Susceptibility as well, towards four queries of the validation data."""
    measure = {"name": "susceptibility", "components": components}
    return {"num_draws": 16, "probe": 7, "query": 4, "measures": ["llc", measure]}


def susceptible(monitor: SLTMonitor, **more: Any) -> Result:
    found = [e.state_dict() for e in monitor.susceptibilities]
    return said(monitor, susceptibilities=found, folder=str(monitor.folder), **more)


class HeldNet(Net):
    """Weights and statistics that stay where they began: the same for any number of ranks."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net[1].momentum = 0.0


def _susceptibility(folder: Path, world: int, **settings: Any) -> Result:
    monitor = tiny_monitor(every_n_epochs=1, **{"num_chains": 4, **beside(COMPONENTS), **settings})
    Scenario(HeldNet, with_validation, ranks_of(world, max_epochs=1)).run(folder, monitor)
    return susceptible(monitor)


def susceptibility(folder: Path, world: int) -> Result:
    return _susceptibility(folder, world)


def susceptibility_of_three_chains(folder: Path, world: int) -> Result:
    """Two ranks do not divide them, and of four one has none."""
    return _susceptibility(folder, world, num_chains=3)


def susceptibility_undisturbed(folder: Path, world: int) -> Result:
    """One chain for two ranks: one of them has nothing to read, and joins in all the same."""
    monitor = tiny_monitor(every_n_train_steps=2, num_chains=1, **beside(COMPONENTS))
    trace = Scenario(Net, with_validation, ranks_of(world)).assert_undisturbed(folder, monitor)
    return susceptible(monitor, num_batches=trace.num_batches)


def unreadable_validation() -> dict[str, Any]:
    """Samples of the validation data, which the chains of the learning coefficient do not ask for."""
    return {**loaders(), "val_dataloaders": torch.utils.data.DataLoader(Unreadable(), batch_size=4)}


def susceptibility_fails_on_one_rank(folder: Path, world: int) -> Result:
    monitor = tiny_monitor(every_n_train_steps=2, on_failure="warn", **beside(COMPONENTS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scenario = Scenario(Net, unreadable_validation, ranks_of(world))
        trace = scenario.run(folder, Firing(True), monitor, Firing(False))
    texts = [str(w.message) for w in caught if "only this rank fails" in str(w.message)]
    return susceptible(monitor, num_batches=trace.num_batches, warnings=texts)


class NotCopiedHere(Net):
    """Something on one rank cannot be copied."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def setup(self, stage: str) -> None:
        if self.trainer.global_rank == self.rank:
            self.held = (i for i in range(3))


def _not_copied(folder: Path, world: int, rank: int) -> Result:
    monitor = tiny_monitor(every_n_train_steps=2, method="auto", **beside(COMPONENTS))
    scenario = Scenario(lambda: NotCopiedHere(rank), with_validation, ranks_of(world))
    trace = scenario.assert_undisturbed(folder, monitor)
    return susceptible(monitor, num_batches=trace.num_batches)


def one_rank_cannot_copy(folder: Path, world: int) -> Result:
    return _not_copied(folder, world, 1)


def first_rank_cannot_copy(folder: Path, world: int) -> Result:
    return _not_copied(folder, world, 0)


def susceptibility_resume(folder: Path, world: int) -> Result:
    """From the checkpoint of step 3: the firing at step 2 is behind it, that at step 4 is measured a second time."""
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    settings = {"every_n_train_steps": 2, "dirpath": str(folder / "slt"), **beside(COMPONENTS)}
    first, again = tiny_monitor(**settings), tiny_monitor(**settings)
    saving = ranks_of(world, callbacks=[saver], enable_checkpointing=True, max_steps=4)
    Scenario(Net, with_validation, saving).run(folder, first)
    checkpoint = str(folder / "step=3.ckpt")
    Scenario(Net, with_validation, ranks_of(world)).run(folder, again, ckpt_path=checkpoint)
    return susceptible(again, before=[e.state_dict() for e in first.susceptibilities])


SCENARIOS: dict[str, Callable[[Path, int], Result]] = {
    f.__name__: f
    for f in (
        influence,
        influence_of_three_chains,
        influence_of_calibrated_chains,
        influence_undisturbed,
        influence_fails_on_one_rank,
        susceptibility,
        susceptibility_of_three_chains,
        susceptibility_undisturbed,
        susceptibility_fails_on_one_rank,
        one_rank_cannot_copy,
        first_rank_cannot_copy,
        susceptibility_resume,
    )
}
ALONE = (
    "influence",
    "influence_of_three_chains",
    "influence_of_calibrated_chains",
    "susceptibility",
    "susceptibility_of_three_chains",
)
"""Also in one process, which the ranks are held against."""
FOUR = ("influence_of_three_chains", "susceptibility_of_three_chains")
"""Also on four ranks."""
