"""A small run with checkpoints, and its data: what a sweep imports by name; and a sweep in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_slt.sweep.executors import Executor, Outcome
from lightning_slt.sweep.point import Task, measure_point
from tests.integration.harness import quiet_trainer, seed_everything, tiny_monitor
from tests.integration.models import BATCH, Net, tensors


class Model(Net):
    """Made from the hyperparameters in its checkpoints."""

    def __init__(self, lr: float) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


def plain(lr: float = 1e-2) -> Net:
    """A module from a function."""
    return Net(lr)


def bare() -> nn.Module:
    """Knows no trainer; of the names that the weights of :class:`Model` have."""
    return nn.ModuleDict({"net": Net().net})


def loss_of_bare(module: Any, batch: Any) -> torch.Tensor:
    return cross_entropy(module["net"](batch[0]), batch[1])


class Dies(Model):
    """Its process ends at chains of step 4, as where memory runs out."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.training and self.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


class Fails(Model):
    """Fails in chains of step 4, while the file ``repaired`` is not there."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.training and self.trainer.global_step == 4 and not Path("repaired").exists():
            raise RuntimeError("the step failed inside a chain")
        return super().training_step(batch, batch_idx)


def loader() -> DataLoader[Any]:
    return DataLoader(tensors(), batch_size=BATCH, shuffle=True)


def dataset() -> TensorDataset:
    return tensors()


def of_size(size: int) -> TensorDataset:
    return TensorDataset(*(t[:size] for t in tensors().tensors))


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


def six() -> TensorDataset:
    return TensorDataset(*(t[:6] for t in tensors().tensors))


class Validated(Data):
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(six(), batch_size=2)


def number() -> int:
    return 3


def train(folder: Path, *callbacks: Any, **monitored: Any) -> tuple[list[Path], Any]:
    """Twelve steps with a checkpoint at every other one; the files, and the monitor that measured at the same steps."""
    seed_everything()
    monitor = tiny_monitor(every_n_train_steps=2, warm_start=False, **monitored)
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=2, save_on_train_epoch_end=False)
    trainer = quiet_trainer(folder, callbacks=[monitor, *callbacks, saver], enable_checkpointing=True)
    trainer.fit(Model(1e-2), loader())
    return sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2])), monitor


def settings(**changes: Any) -> dict[str, Any]:
    """Those of the monitor of :func:`train`, for a sweep."""
    return {
        "module": "tests.sweep.runs:Model",
        "data": "tests.sweep.runs:loader",
        "sampler": {"lr": 1e-4},
        "num_chains": 2,
        "num_draws": 4,
        "num_burnin_steps": 2,
        "num_steps_bw_draws": 1,
        "method": "sequential",
        **changes,
    }


def numbers(estimates: Any) -> list[tuple[int, torch.Tensor]]:
    return [(e.step, e.trace) for e in estimates]


def here(measured: list[int], fail_after: int = 1000) -> Executor:
    """In this process; keeps the steps, and is interrupted after some of them."""

    def run(tasks: Sequence[Task]) -> Iterator[Outcome]:
        for task in tasks:
            if len(measured) == fail_after:
                raise KeyboardInterrupt
            try:
                measure_point(task)
            except Exception as error:
                yield task, f"{type(error).__name__}: {error}"
                continue
            measured.append(task.step)
            yield task, None

    return run


def assert_same_points(ours: Any, theirs: Any) -> None:
    assert [e.step for e in ours] == [e.step for e in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.trace, b.trace)
        assert (a.mean, a.se, a.init_loss, a.nbeta, a.localization) == (
            b.mean, b.se, b.init_loss, b.nbeta, b.localization)  # fmt: skip
