"""A checkpoint that is looked at is none that a run goes on from.

Lightning gives callbacks the state of the checkpoint in ``trainer.test(ckpt_path="best")`` as well as when it resumes
training: what came after that checkpoint would be gone from a history.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class KeepsHistory(Callback):
    """The part of a callback that knows what a checkpoint is loaded for."""

    _evaluates = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # asked right before the state is given
        self._evaluates = trainer.state.fn != TrainerFn.FITTING

    def _keeps(self, has_history: bool) -> bool:
        """Whether to stay as it is, since the state that is given now is for an evaluation; to be asked once."""
        evaluates, self._evaluates = self._evaluates, False
        return evaluates and has_history


__all__ = ["KeepsHistory"]
