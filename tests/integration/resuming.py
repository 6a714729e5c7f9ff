"""Runs that stop, and go on from their last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.integration.harness import (
    Scenario,
)
from tests.integration.models import Net, loaders


class Stops(Callback):
    """Ends the run after so many batches, by raising where an exception is given."""

    def __init__(self, after: int, exception: Optional[BaseException] = None) -> None:
        self.after, self.exception = after, exception

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.after and self.exception is not None:
            raise self.exception

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.after and self.exception is None:
            trainer.should_stop = True


def saving(folder: Path, *others: Callback) -> Callable[[], dict[str, Any]]:
    """A trainer that keeps a checkpoint of every step."""

    def make() -> dict[str, Any]:
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
        return {"callbacks": [*others, saver], "enable_checkpointing": True}

    return make


def stopped_at_5(folder: Path, *callbacks: Callback) -> str:
    """Train 5 of the 6 batches of the first epoch; the checkpoint."""
    Scenario(Net, loaders, saving(folder, Stops(5))).run(folder, *callbacks)
    return str(folder / "step=5.ckpt")


def resume(folder: Path, checkpoint: str, *callbacks: Callback) -> Any:
    return Scenario(Net, loaders).run(folder, *callbacks, ckpt_path=checkpoint)
