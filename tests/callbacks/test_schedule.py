"""When to measure."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_slt.callbacks.schedule import Schedule, log_spaced_steps, steps_of_epoch, steps_of_run


def test_any_number_of_steps_may_be_asked_for_of_a_run_without_a_known_end() -> None:
    """They are a factor of the square root of 2 apart: those of more than a hundred come after any run."""
    assert log_spaced_steps(7, None) == (1, 2, 3, 4, 6, 8)
    many = log_spaced_steps(5000, None)
    assert many[:6] == (1, 2, 3, 4, 6, 8) and many[-1] > 10**18
    assert log_spaced_steps(5000, 1000)[-1] == 1000


@pytest.mark.parametrize(
    ("scheduling", "max_steps", "steps"),
    [({0: 4}, -1, 9), ({0: 4, 2: 1}, -1, 16), ({0: 4, 2: 1}, 7, 7), ({0: 4, 2: 1}, 40, 16)],
)
def test_steps_of_a_run_are_those_of_its_epochs_with_what_is_left_of_each(
    scheduling: dict[int, int], max_steps: int, steps: int
) -> None:
    """Ten batches in fours are three steps: the last two batches of an epoch step as well."""
    trainer: Any = SimpleNamespace(
        estimated_stepping_batches=1000,
        callbacks=[GradientAccumulationScheduler(scheduling)],
        num_training_batches=10,
        max_epochs=3,
        max_steps=max_steps,
    )
    assert steps_of_run(trainer) == steps


@pytest.mark.parametrize(
    ("asked", "step", "due"),
    [
        ({"every_n_train_steps": 100}, 1, 10),
        ({"every_n_train_steps": 100}, 100, 9),
        ({"every_n_train_steps": 100, "at_steps": (0, 50, 150, 200, 2000)}, 100, 10),
        ({"every_n_epochs": 2}, 0, 2),
        ({"every_n_epochs": 2}, 500, 1),
        ({"every_n_epochs": 2, "every_n_train_steps": 400}, 500, 2),
        ({"log_spaced": 4}, 1, 3),
        ({"log_spaced": 4}, 1000, 0),
    ],
)
def test_how_many_firings_are_still_due(asked: dict[str, Any], step: int, due: int) -> None:
    """Of 1,000 steps, 250 an epoch."""
    assert Schedule(**asked).still_due(step, 1000, 250) == due


@pytest.mark.parametrize(
    ("batches", "accumulated", "callbacks", "steps"),
    [
        (100, 1, [], 100),
        (100, 8, [], 13),
        (0, 1, [], 1),
        (math.inf, 1, [], None),
        (100, 1, [GradientAccumulationScheduler({0: 8})], None),
    ],
)
def test_steps_of_an_epoch_are_known_where_all_have_as_many(
    batches: float, accumulated: int, callbacks: list[Any], steps: Optional[int]
) -> None:
    trainer: Any = SimpleNamespace(
        num_training_batches=batches, accumulate_grad_batches=accumulated, callbacks=callbacks
    )
    assert steps_of_epoch(trainer) == steps
