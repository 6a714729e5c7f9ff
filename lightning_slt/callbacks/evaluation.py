"""Which run a history is of.

Lightning gives callbacks the state of the checkpoint in ``trainer.test(ckpt_path="best")`` as well as when it resumes
training: what came after that checkpoint would be gone from a history. And a callback may be used for one run after
another.
"""

from __future__ import annotations

import weakref
from typing import Any, Optional

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class KeepsHistory(Callback):
    """The part of a callback that knows what a checkpoint is loaded for."""

    _evaluates = False
    _given = False
    """A state has been loaded since the last fit began."""
    _trained_by: Optional[weakref.ref[Trainer]] = None
    """The trainer of the last fit."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # asked right before the state is given
        self._evaluates = trainer.state.fn != TrainerFn.FITTING

    def _keeps(self, has_history: bool) -> bool:
        """Whether to stay as it is, since the state that is given now is for an evaluation; to be asked once."""
        evaluates, self._evaluates = self._evaluates, False
        return evaluates and has_history

    def _begins(self, trainer: Trainer) -> bool:
        """Whether a fit is of a run that the history is not of; to be asked once, as it begins.

        That is one from the first step on, and one from a checkpoint without a state of this callback, in a trainer
        other than that of the last fit.
        """
        given, self._given = self._given, False
        before, self._trained_by = self._trained_by, weakref.ref(trainer)
        first = trainer.ckpt_path is None and trainer.fit_loop.epoch_loop._batches_that_stepped == 0
        return first or not (given or (before is not None and before() is trainer))

    def __getstate__(self) -> dict[str, Any]:
        """Without ``log`` and ``log_dict``, which Lightning takes from the module and leaves here: they hold it."""
        return {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}


__all__ = ["KeepsHistory"]
