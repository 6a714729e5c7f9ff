"""A firing that a checkpoint came before: found when training resumes from it."""

from __future__ import annotations

from typing import Any, Optional

from lightning.pytorch import Trainer

from lightning_slt.callbacks.schedule import Schedule


def step_before_its_firing(trainer: Trainer, schedule: Schedule, last: int, explicit: tuple[int, ...]) -> Optional[int]:
    """The step of the checkpoint that a run resumes from, where it is due and was not measured; else None.

    Another callback may have written it at the end of the batch, before the monitor's turn; and Lightning does not
    come to the end of an epoch again whose last batch a checkpoint has.

    Args:
        trainer: of a run that is resumed.
        schedule: which steps and epochs are due.
        last: the step that the monitor was told of last, by the checkpoint.
        explicit: steps that the schedule names.
    """
    loop, epochs = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
    batches: Any = loop.batch_progress.total  # a tracker with more counts than its declared class has
    at_batch_end = loop.restarting and batches.ready == batches.processed == batches.completed + 1
    if not at_batch_end or loop._should_accumulate():
        return None
    step = loop._batches_that_stepped + 1
    due = schedule.due(last, step, explicit)
    if epochs.completed == epochs.ready:  # the epoch is over
        due |= schedule.due_epoch(epochs.completed)
    return step if due else None


__all__ = ["step_before_its_firing"]
