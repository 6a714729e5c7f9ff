"""When to measure: by steps, by epochs, at named steps, or log-spaced over the run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Optional

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging

from lightning_slt.kinds import check_count

DEFAULT_LOG_SPACED = 20
"""Firings of a run where nothing is said: close together at first, when structure is built fast."""
MOST_SPACED = 128
"""Of a run without a known end: the last one is the step 1.3e19."""


def log_spaced_steps(count: int, last: Optional[int]) -> tuple[int, ...]:
    """At most ``count`` distinct steps from 1 to ``last``, evenly spaced on a log scale.

    Args:
        count: number of steps asked for; near 1 several round to the same step.
        last: the last step; None (a run without a known end) gives steps a factor ``sqrt 2`` apart.

    Example:
        >>> log_spaced_steps(5, 1000)
        (1, 6, 32, 178, 1000)
    """
    if last is None:
        # more than any run has steps; and 2^1024 is no float any more
        return tuple(sorted({round(2 ** (k / 2)) for k in range(min(count, MOST_SPACED))}))
    if count == 1 or last <= 1:
        return (max(last, 1),)
    return tuple(sorted({round(last ** (k / (count - 1))) for k in range(count)}))


def steps_of_run(trainer: Trainer) -> Optional[int]:
    """Batches that will step the optimiser, None where the run has no known end.

    Lightning's own estimate takes the accumulation of the first epoch for every one, and the epoch that
    StochasticWeightAveraging adds for BatchNorm, in which no weight is trained, for one of training.
    """
    total = trainer.estimated_stepping_batches
    if total in (-1, math.inf):
        return None
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    scheduler = next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)
    adds_epoch = any(isinstance(c, StochasticWeightAveraging) and c._model_contains_batch_norm for c in callbacks)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if not (scheduler or adds_epoch) or not math.isfinite(batches) or epochs is None or epochs < 0:
        return int(total)

    def accumulated(epoch: int) -> int:
        return scheduler.get_accumulate_grad_batches(epoch) if scheduler else trainer.accumulate_grad_batches

    steps = sum(math.ceil(batches / accumulated(epoch)) for epoch in range(epochs - adds_epoch))
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def steps_of_epoch(trainer: Trainer) -> Optional[int]:
    """Batches of an epoch that will step the optimiser, None where that is not known or differs between epochs."""
    batches, callbacks = trainer.num_training_batches, trainer.callbacks  # type: ignore[attr-defined]
    if not math.isfinite(batches) or any(isinstance(c, GradientAccumulationScheduler) for c in callbacks):
        return None
    return max(math.ceil(batches / trainer.accumulate_grad_batches), 1)


def is_of_batch_norm(trainer: Trainer) -> bool:
    """Whether this is the epoch that StochasticWeightAveraging adds after the last: the module holds the mean of the
    weights, which is no point of training's course, until BatchNorm has its statistics."""
    return any(
        isinstance(c, StochasticWeightAveraging) and c._model_contains_batch_norm and trainer.current_epoch > c.swa_end
        for c in trainer.callbacks  # type: ignore[attr-defined]
    )


def _named_steps(at_steps: Any) -> tuple[int, ...]:
    """The steps in their order, each once.

    Raises:
        TypeError: for anything but a list of whole numbers, whose parts would be other steps.
    """
    if isinstance(at_steps, (str, Mapping)) or not isinstance(at_steps, Iterable):
        raise TypeError(f"at_steps={at_steps!r}: expected a list of steps, such as [0, 100, 1000].")
    steps = list(at_steps)
    for step in steps:
        if not isinstance(step, Integral) or isinstance(step, bool):
            kind = type(step).__name__
            raise TypeError(f"at_steps={steps}: expected whole numbers, got {step!r}, which is a {kind}. Give ints.")
    return tuple(sorted({int(step) for step in steps}))


@dataclass(frozen=True)
class Schedule:
    """Which optimiser steps and epochs are measured.

    Args:
        every_n_train_steps: every n-th batch that stepped an optimiser.
        every_n_epochs: at the end of every n-th epoch.
        at_steps: these steps; 0 is before the first.
        log_spaced: this many steps over the run, log-spaced.

    Raises:
        TypeError: for what is no whole number.
        ValueError: for a number below 1 (below 0 in ``at_steps``), and for ``at_steps`` without a step alone.
    """

    every_n_train_steps: Optional[int] = None
    every_n_epochs: Optional[int] = None
    at_steps: Optional[tuple[int, ...]] = None
    log_spaced: Optional[int] = None

    def __post_init__(self) -> None:
        for name in ("every_n_train_steps", "every_n_epochs", "log_spaced"):
            check_count(name, getattr(self, name), otherwise=", or None to leave it out")
        if self.at_steps is not None and any(step < 0 for step in self.at_steps):
            raise ValueError(f"at_steps={list(self.at_steps)}: steps must not be negative.")
        if self.at_steps == () and (self.every_n_train_steps, self.every_n_epochs, self.log_spaced) == (None,) * 3:
            raise ValueError(
                "at_steps=[]: names no step, and nothing else says when to measure. Name steps, such as [0, 100, "
                "1000], or leave it None for log-spaced ones."
            )

    def __str__(self) -> str:
        """What was asked for, as it is written.

        Example:
            >>> print(Schedule.build(500, None, None, None))
            every_n_train_steps=500
        """
        asked = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return ", ".join(
            f"{name}={list(value) if name == 'at_steps' else value}" for name, value in asked if value is not None
        )

    @staticmethod
    def build(
        every_n_train_steps: Optional[int],
        every_n_epochs: Optional[int],
        at_steps: Optional[Sequence[int]],
        log_spaced: Optional[int],
    ) -> Schedule:
        """A schedule; log-spaced over the run where nothing is given."""
        steps = _named_steps(at_steps) if at_steps is not None else None
        if every_n_train_steps is None and every_n_epochs is None and steps is None and log_spaced is None:
            log_spaced = DEFAULT_LOG_SPACED
        return Schedule(every_n_train_steps, every_n_epochs, steps, log_spaced)

    def explicit_steps(self, total_steps: Optional[int]) -> tuple[int, ...]:
        """``at_steps`` and the log-spaced ones, of a run of ``total_steps`` (None where it has no known end)."""
        spaced = log_spaced_steps(self.log_spaced, total_steps) if self.log_spaced else ()
        return tuple(sorted({*(self.at_steps or ()), *spaced}))

    def due(self, last: int, step: int, explicit: tuple[int, ...]) -> bool:
        """Whether a step that is to be measured lies in ``(last, step]``: none is lost where steps come in twos."""
        n = self.every_n_train_steps
        if n is not None and math.floor(step / n) > math.floor(last / n):
            return True
        return bisect_right(explicit, step) > bisect_right(explicit, last)

    def still_due(self, step: int, total: int, steps_of_epoch: Optional[int]) -> int:
        """About how many steps after ``step`` are to be measured, of a run of ``total`` with so many steps an epoch
        (needed for ``every_n_epochs`` alone): the end of an epoch counts beside a step of the cadence that it falls
        together with.

        Example:
            >>> Schedule.build(100, None, [0, 50, 200], None).still_due(100, 1000, 250)
            9
        """
        count = 0
        explicit = [due for due in self.explicit_steps(total) if step < due <= total]
        if self.every_n_train_steps is not None:
            n = self.every_n_train_steps
            count += total // n - step // n
            explicit = [due for due in explicit if due % n]
        if self.every_n_epochs is not None and steps_of_epoch is not None:
            apart = self.every_n_epochs * steps_of_epoch
            count += total // apart - step // apart
        return count + len(explicit)

    def due_epoch(self, epochs_done: int) -> bool:
        """Whether the end of this epoch (counted from 1) is to be measured."""
        return self.every_n_epochs is not None and epochs_done % self.every_n_epochs == 0
