"""A firing that a checkpoint came before: found when training resumes from it."""

from __future__ import annotations

from typing import Any, Optional

from lightning.pytorch import Trainer

from lightning_slt.callbacks.schedule import Schedule


def step_before_its_firing(trainer: Trainer, schedule: Schedule, last: int, explicit: tuple[int, ...]) -> Optional[int]:
    """The step of the checkpoint that a run resumes from, where it is due and its firing was still to come; else None.

    Another callback may have written it at the end of the batch or of the epoch, before the monitor's turn, or what
    answers Ctrl-C in the middle of the firing. Lightning does not come again to an end that a checkpoint is of.

    Args:
        trainer: of a run that is resumed.
        schedule: which steps and epochs are due.
        last: the step that the monitor was told of last, by the checkpoint.
        explicit: steps that the schedule names.
    """
    loop = trainer.fit_loop.epoch_loop
    # trackers with more counts than their declared class has
    batches: Any = loop.batch_progress.total
    epochs: Any = trainer.fit_loop.epoch_progress.current
    epoch_is_over = epochs.ready == epochs.processed > 0
    if loop.restarting and batches.ready == batches.processed == batches.completed + 1:
        if loop._should_accumulate():
            return None
        step = loop._batches_that_stepped + 1
    elif trainer.ckpt_path is not None and epoch_is_over:
        step = loop._batches_that_stepped
    else:
        return None
    due = schedule.due(last, step, explicit) or (epoch_is_over and schedule.due_epoch(epochs.processed))
    return step if due else None


__all__ = ["step_before_its_firing"]
