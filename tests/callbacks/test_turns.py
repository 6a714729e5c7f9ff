"""Whose turn it is: batches and epochs as Lightning counts them, and what the budget says to a step that is due."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Optional

import pytest

from lightning_slt.callbacks.clock import RunClock
from lightning_slt.callbacks.overhead import Decision, OverheadBudget
from lightning_slt.callbacks.schedule import Schedule
from lightning_slt.callbacks.turns import Ahead, Turn, Turns
from lightning_slt.sampling.collective import Alone


def trainer_at(
    stepped: int,
    accumulates: bool = False,
    epoch: int = 0,
    batches: tuple[int, int, int] = (0, 0, 0),
    epochs: tuple[int, int] = (1, 0),
    **settings: Any,
) -> Any:
    """A trainer whose batches have stepped so often, with what its trackers say: batches that are ready, processed and
    completed in all, and epochs that are ready and processed."""
    loop = SimpleNamespace(
        _batches_that_stepped=stepped,
        _should_accumulate=lambda: accumulates,
        restarting=batches != (0, 0, 0),
        batch_progress=SimpleNamespace(
            total=SimpleNamespace(**dict(zip(("ready", "processed", "completed"), batches, strict=True)))
        ),
    )
    current = SimpleNamespace(ready=epochs[0], processed=epochs[1])
    fit = SimpleNamespace(epoch_loop=loop, epoch_progress=SimpleNamespace(current=current))
    given = {"fast_dev_run": False, "callbacks": [], "ckpt_path": None, "current_epoch": epoch, **settings}
    return SimpleNamespace(fit_loop=fit, **given)


def test_a_step_is_done_once_and_not_by_a_batch_that_accumulates() -> None:
    turns = Turns(Schedule(every_n_train_steps=2), RunClock())
    assert turns.after_batch(trainer_at(1, accumulates=True)) is None and turns.last == 0
    assert turns.after_batch(trainer_at(1)) == Turn(2, 1) and turns.last == 2
    assert turns.after_batch(trainer_at(1)) is None and turns.last == 2
    assert turns.after_batch(trainer_at(2)) is None and turns.last == 3
    assert turns.after_batch(trainer_at(3)) == Turn(4, 3)
    turns.take_back(4)
    assert turns.last == 3 and turns.after_batch(trainer_at(3)) == Turn(4, 3)
    turns.take_back(9)
    assert turns.last == 4
    turns.take_back(0)
    assert turns.last == 0


def test_the_end_of_an_epoch_is_at_the_step_that_is_done_whatever_was_taken_back() -> None:
    turns = Turns(Schedule(every_n_epochs=2), RunClock())
    turns.last = 5
    assert turns.after_epoch(trainer_at(6, epoch=0)) is None
    assert turns.after_epoch(trainer_at(6, epoch=1)) == Turn(6, 5)
    turns.last = 7  # a step more than Lightning has counted
    assert turns.after_epoch(trainer_at(6, epoch=1)) == Turn(7, 5)


@pytest.mark.parametrize(
    ("schedule", "trainer", "step"),
    [
        ({"at_steps": [5]}, trainer_at(4, batches=(5, 5, 4)), 5),
        ({"at_steps": [5]}, trainer_at(4, accumulates=True, batches=(5, 5, 4)), None),
        ({"at_steps": [5]}, trainer_at(5, batches=(5, 5, 5)), None),
        ({"at_steps": [4]}, trainer_at(4, batches=(5, 5, 4)), None),
        ({"every_n_epochs": 1}, trainer_at(4, batches=(5, 5, 4), epochs=(2, 1)), None),
        ({"every_n_epochs": 1}, trainer_at(6, epochs=(1, 1), ckpt_path="a"), 6),
        ({"every_n_epochs": 1}, trainer_at(6, epochs=(1, 1)), None),
        ({"every_n_epochs": 1}, trainer_at(0, epochs=(0, 0), ckpt_path="a"), None),
        ({"every_n_epochs": 2}, trainer_at(6, epochs=(1, 1), ckpt_path="a"), None),
        ({"every_n_epochs": 2}, trainer_at(12, epochs=(2, 2), ckpt_path="a"), 12),
    ],
    ids=[
        "before its end",
        "accumulating",
        "after its end",
        "measured",
        "within an epoch",
        "an epoch",
        "a fit that goes on",
        "no epoch yet",
        "an epoch that is not due",
        "the second epoch",
    ],
)
def test_a_firing_that_a_checkpoint_came_before(schedule: dict[str, Any], trainer: Any, step: Optional[int]) -> None:
    built = Schedule.build(*(schedule.get(n) for n in ("every_n_train_steps", "every_n_epochs", "at_steps")), None)
    turns = Turns(built, RunClock())
    turns._explicit = built.explicit_steps(None)
    assert turns.missed(trainer, 4) == (None if step is None else Turn(step, step - 1))


def test_a_batch_of_this_process_is_no_batch_of_a_checkpoint() -> None:
    """A fit that goes on after one that was broken off in its firing: the monitor was told of the step itself."""
    turns = Turns(Schedule(every_n_train_steps=1), RunClock())
    broken_off = trainer_at(4, batches=(5, 5, 4))
    assert turns.missed(broken_off, 4) == Turn(5, 4)
    broken_off.fit_loop.epoch_loop.restarting = False
    assert turns.missed(broken_off, 4) is None


@pytest.mark.parametrize(
    ("schedule", "batches", "began", "ahead"),
    [
        ({"every_n_train_steps": 10}, 25, 0, Ahead(6, 0.4)),
        ({"every_n_train_steps": 10}, 25, 20, Ahead(6, 0.25)),
        ({"every_n_train_steps": 10}, 25, 100, None),
        ({"every_n_epochs": 1}, 25, 0, Ahead(3, 0.4)),
        ({"every_n_epochs": 1}, math.inf, 0, None),
        ({"at_steps": (5, 50, 200)}, math.inf, 0, Ahead(1, 0.4)),
    ],
)
def test_what_is_ahead_of_a_step(schedule: dict[str, Any], batches: float, began: int, ahead: Optional[Ahead]) -> None:
    """Of 100, at the 40th; None where it cannot be told."""
    turns = Turns(Schedule(**schedule), RunClock())
    assert turns.ahead(40) is None
    given = {"estimated_stepping_batches": 100, "max_epochs": -1, "max_steps": 100, "accumulate_grad_batches": 1}
    turns.open(trainer_at(0, num_training_batches=batches, **given), Alone(), "every_n_epochs")
    turns.began = began
    assert turns.ahead(40) == ahead
    turns.forget()
    assert turns.began == 0
    turns.open(trainer_at(0, num_training_batches=25, **{**given, "estimated_stepping_batches": math.inf}), Alone(), "")
    assert turns.ahead(40) is None


def test_the_budget_is_asked_when_it_said_and_at_once_in_another_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = OverheadBudget(0.05)
    turns = Turns(Schedule(every_n_train_steps=1), RunClock(budget))
    asked: list[int] = []

    def decide(step: int) -> Decision:
        asked.append(step)
        return Decision(step >= 20, step + 10, 0.0, 1.0)

    monkeypatch.setattr(budget, "decide", decide)
    assert [turns.decide(step, Alone()) is not None for step in (1, 2, 10, 11, 20, 21)] == [False] * 5 + [True]
    assert asked == [1, 11, 21]
    trainer = trainer_at(21, num_training_batches=30, estimated_stepping_batches=30, max_epochs=1, max_steps=-1)
    turns.open(trainer, Alone(), "every_n_epochs")
    assert turns.decide(22, Alone()) is not None and asked == [1, 11, 21, 22]
    assert Turns(Schedule(every_n_train_steps=1), RunClock()).decide(1, Alone()) is None
