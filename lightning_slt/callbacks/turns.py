"""Whose turn it is: the steps of a run that are measured, by the schedule and the budget, on all ranks alike."""

from __future__ import annotations

from typing import NamedTuple, Optional

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_slt.callbacks.arguments import is_smoke_test
from lightning_slt.callbacks.clock import RunClock
from lightning_slt.callbacks.overhead import Decision
from lightning_slt.callbacks.resuming import step_before_its_firing
from lightning_slt.callbacks.schedule import Schedule, is_of_batch_norm, steps_of_epoch, steps_of_run
from lightning_slt.sampling.collective import Collective


class Turn(NamedTuple):
    """A step that is to be measured.

    Attributes:
        step: optimiser steps done.
        x: the step under which loggers have it.
    """

    step: int
    x: int


class Ahead(NamedTuple):
    """What a run has before it.

    Attributes:
        firings: that are still due.
        done: share that is behind of the steps that the monitor sees.
    """

    firings: int
    done: float


class Turns:
    """Keeps count of a run's steps, and says which of them the schedule names and the budget covers.

    Lightning's own count is one behind at the end of a batch, and after a resume until the first batch starts; it logs
    the metrics of a batch at the count before, and those of an epoch at that of its last batch.

    Args:
        schedule: which steps and epochs are due.
        clock: of the run, with the budget of its wall-clock where there is one.

    Attributes:
        last: the step told of last; a later one is not looked at twice.
        began: the step at which the monitor came to the run: 0, but where it was added to one that is resumed.
    """

    def __init__(self, schedule: Schedule, clock: RunClock) -> None:
        self._schedule, self._clock = schedule, clock
        self._explicit: tuple[int, ...] = ()
        self._total: Optional[int] = None
        self._steps_of_epoch: Optional[int] = None
        self._ask_at = 0
        self._done_fast_run = False
        self.last = self.began = 0

    def open(self, trainer: Trainer, collective: Collective, called: str) -> None:
        """A fit begins: find the steps of its schedule, those of the first rank for all ranks.

        A rank that measured alone would wait for the others.

        Args:
            trainer: of the run.
            collective: the ranks that measure together.
            called: how messages name the argument ``every_n_epochs``.

        Raises:
            MisconfigurationException: where epochs are to be measured that end at another step on each rank.
        """
        told = collective.exchange(lambda: (trainer.num_training_batches, steps_of_run(trainer)))
        lengths = [batches for batches, _ in told]
        if self._schedule.every_n_epochs is not None and len(set(lengths)) > 1:
            raise MisconfigurationException(
                f"{called}: an epoch has {lengths} batches on the ranks, which would come to its end at different "
                "steps and wait for each other. Use every_n_train_steps=, or loaders of one length."
            )
        self._total = told[0][1]
        self._steps_of_epoch = steps_of_epoch(trainer) if self._schedule.every_n_epochs is not None else None
        self._explicit = self._schedule.explicit_steps(self._total)
        self._ask_at = 0  # every rank asks at once
        self._done_fast_run = False

    def forget(self) -> None:
        """Another run, no step of which is done."""
        self.last = self.began = 0

    def before_training(self, trainer: Trainer) -> Optional[Turn]:
        """Step 0 of a run that begins, where it is named."""
        begins = trainer.fit_loop.epoch_loop._batches_that_stepped == 0
        return Turn(0, 0) if begins and 0 in self._explicit and not is_smoke_test(trainer) else None

    def missed(self, trainer: Trainer, last: int) -> Optional[Turn]:
        """The step of the checkpoint that a run resumes from, where that was written between the end of its batch and
        the firing there; else None.

        Args:
            trainer: of the run.
            last: the step that the checkpoint was told of last.
        """
        step = None if is_smoke_test(trainer) else step_before_its_firing(trainer, self._schedule, last, self._explicit)
        return None if step is None else Turn(step, step - 1)

    def see(self, trainer: Trainer) -> None:
        """A batch starts, or a fit: steps that were done before are behind."""
        self.last = max(self.last, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def after_batch(self, trainer: Trainer) -> Optional[Turn]:
        """The step that a batch has just done, where it is due; of ``fast_dev_run`` the first one."""
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return None
        turn, last = Turn(loop._batches_that_stepped + 1, loop._batches_that_stepped), self.last
        if turn.step <= last:
            return None
        self.last = turn.step
        if is_smoke_test(trainer):
            first, self._done_fast_run = not self._done_fast_run, True
            return turn if first else None
        return turn if self._schedule.due(last, turn.step, self._explicit) and not is_of_batch_norm(trainer) else None

    def after_epoch(self, trainer: Trainer) -> Optional[Turn]:
        """The step at which an epoch has just ended, where its end is due."""
        if is_smoke_test(trainer) or not self._schedule.due_epoch(trainer.current_epoch + 1):
            return None
        if is_of_batch_norm(trainer):
            return None
        done = trainer.fit_loop.epoch_loop._batches_that_stepped
        # not the step told of last: a firing that was broken off has taken it back
        return Turn(max(self.last, done), done - 1)

    def take_back(self, step: int) -> None:
        """A checkpoint of now is of weights that were to be measured: a run that resumes from it makes up for that."""
        self.last = min(self.last, max(step - 1, 0))

    def ahead(self, step: int) -> Optional[Ahead]:
        """What comes after ``step``; None where the end of the run is not known, or how many epochs it has."""
        epochs_unknown = self._schedule.every_n_epochs is not None and self._steps_of_epoch is None
        if self._total is None or self._total <= self.began or epochs_unknown:
            return None
        firings = self._schedule.still_due(step, self._total, self._steps_of_epoch)
        return Ahead(firings, min((step - self.began) / (self._total - self.began), 1.0))

    def decide(self, step: int, collective: Collective) -> Optional[Decision]:
        """What the budget says to a step that is due; None where it does not cover it.

        The first rank decides, and tells the others at which step to ask next: clocks differ between ranks, and an
        exchange at every step would be dear.
        """
        budget = self._clock.budget
        if budget is None or step < self._ask_at:
            return None
        self._clock.earn()
        decision: Decision = collective.exchange(lambda: budget.decide(step))[0]
        self._ask_at = decision.ask_at
        return decision if decision.fire else None


__all__ = ["Ahead", "Turn", "Turns"]
