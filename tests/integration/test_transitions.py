"""TransitionMonitor in a trainer: what a flag leads to, in any order of callbacks, and that training does not notice."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_slt import SLTMonitor, TransitionMonitor
from lightning_slt.callbacks import transitions as module
from lightning_slt.transition_record import TransitionLog
from tests.integration.harness import RecordingLogger, Scenario, assert_same, tiny_monitor
from tests.integration.models import Net, Plain, loaders, with_validation
from tests.integration.scripted import Scripted, flat, jump, moved_influence

EPOCHS = {"max_epochs": 10}  # 60 steps of 6 batches an epoch


class Seen(Callback):
    """The flag as other callbacks see it at the end of each batch, by step."""

    def __init__(self) -> None:
        self.flags: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.flags[trainer.global_step] = float(trainer.callback_metrics["slt/transition/flag"])


def train(folder: Path, *callbacks: Callback, **trainer: Any) -> Any:
    return Scenario(Plain, loaders, lambda: {**EPOCHS, **trainer}).run(folder, *callbacks)


def test_flag_is_one_at_the_flagged_step_only(tmp_path: Path) -> None:
    logger, seen, watch = RecordingLogger(), Seen(), TransitionMonitor()
    train(tmp_path, Scripted(), watch, seen, logger=logger)
    (found,) = watch.transitions
    assert found.kind == "A" and found.state == "confirmed"
    assert 29 <= found.onset <= found.step <= found.end <= 33 and found.known_at <= 36
    assert found.llc_change > 0 and found.loss_change == pytest.approx(-0.5, abs=0.05)
    known = int(found.known_at)
    assert list(seen.flags) == list(range(1, 61))
    assert [step for step, flag in seen.flags.items() if flag == 1.0] == [known]
    assert sum(seen.flags.values()) == 1.0
    rows = [(row, x) for row, x in logger.of_callback() if "slt/transition/flag" in row]
    assert [x for _, x in rows] == list(range(60))
    assert [x for row, x in rows if row["slt/transition/flag"] == 1.0] == [known - 1]
    assert [row["slt/transition/count"] for row, _ in rows] == [0.0] * (known - 1) + [1.0] * (61 - known)
    assert all((row["slt/transition/score"] > row["slt/transition/threshold"]) <= (x == known - 1) for row, x in rows)
    assert [x for row, x in rows if "slt/transition/log_odds" in row][0] >= known - 1


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_order_of_the_callbacks_does_not_matter(first: bool, tmp_path: Path) -> None:
    monitor, watch, seen = Scripted(at_steps=list(range(61))), TransitionMonitor(), Seen()
    train(tmp_path, *((watch, monitor) if first else (monitor, watch)), seen)
    (found,) = watch.transitions
    assert [e.step for e in monitor.estimates] == list(range(61))
    assert watch.state_dict()["fed"] == 60
    assert [step for step, flag in seen.flags.items() if flag] == [found.known_at]
    assert 31 < found.known_at <= 36


def test_checkpoint_on_a_flag_is_that_of_the_flagged_step(tmp_path: Path) -> None:
    saver = ModelCheckpoint(
        tmp_path, "{step}", monitor="slt/transition/flag", mode="max", every_n_train_steps=1, save_top_k=1
    )
    watch = TransitionMonitor()
    train(tmp_path, watch, Scripted(), saver, enable_checkpointing=True)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [f"step={watch.transitions[0].known_at:.0f}.ckpt"]
    assert float(saver.best_model_score) == 1.0


@pytest.mark.parametrize("validation", [False, True], ids=["at the epoch's end", "at a validation's end"])
def test_early_stop_on_a_flag_is_at_the_end_of_its_epoch(validation: bool, tmp_path: Path) -> None:
    stop = EarlyStopping(
        "slt/transition/flag",
        mode="max",
        stopping_threshold=0.5,
        patience=10**9,
        check_on_train_epoch_end=not validation,
    )
    watch = TransitionMonitor()
    scenario = Scenario(Net, with_validation, lambda: dict(EPOCHS))
    trace = scenario.run(tmp_path, stop, watch, Scripted())
    (found,) = watch.transitions
    assert 31 < found.known_at < 36  # within the sixth epoch, with points after it that flag nothing
    assert trace.trainer.global_step == 36 and stop.stopped_epoch == 5


def test_no_flag_stops_nothing(tmp_path: Path) -> None:
    stop = EarlyStopping("slt/transition/flag", mode="max", stopping_threshold=0.5, patience=10**9)
    watch = TransitionMonitor()
    trace = train(tmp_path, Scripted(flat), watch, stop)
    assert watch.transitions == [] and trace.trainer.global_step == 60
    assert float(trace.trainer.callback_metrics["slt/transition/count"]) == 0.0


def test_epoch_cadence_flags_at_the_epochs_end(tmp_path: Path) -> None:
    """The firing comes in the same hook as the end of the epoch, before this callback's turn or after it."""
    for name in ("before", "after"):
        monitor = Scripted(lambda step: jump(step // 2, at=12), every_n_epochs=1)
        watch = TransitionMonitor()
        stop = EarlyStopping("slt/transition/flag", mode="max", stopping_threshold=0.5, patience=10**9)
        pair = [watch, monitor] if name == "before" else [monitor, watch]
        two_batches = lambda: loaders(8)  # noqa: E731
        trace = Scenario(Plain, two_batches, lambda: {"max_epochs": 24}).run(tmp_path / name, stop, *pair)
        assert trace.trainer.global_step == watch.transitions[0].known_at
        assert 26 < watch.transitions[0].known_at <= 34


def test_training_is_bitwise_the_same(tmp_path: Path) -> None:
    called = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(TransitionMonitor|could not publish).*")
        scenario = Scenario(Net, with_validation, lambda: {"max_epochs": 7})
        without = scenario.run(tmp_path / "without")
        watch = TransitionMonitor(on_transition=lambda t, *_: called.append(t.id))
        trace = scenario.run(tmp_path / "with", watch, Scripted())
    assert_same(without, trace)
    assert called == [0]


def test_real_chains_are_watched_and_training_is_the_same(tmp_path: Path) -> None:
    scenario = Scenario(Net, with_validation)
    without = scenario.run(tmp_path / "without")
    monitor, watch = tiny_monitor(every_n_train_steps=1), TransitionMonitor()
    trace = scenario.run(tmp_path / "with", watch, monitor)
    assert_same(without, trace)
    assert watch.state_dict()["fed"] == 12
    assert len(list((monitor.folder / "snapshots").iterdir())) == 12
