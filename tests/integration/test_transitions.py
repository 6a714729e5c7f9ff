"""TransitionMonitor in a trainer: what a flag leads to, in any order of callbacks; training does not notice."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_slt import TransitionMonitor
from lightning_slt.callbacks import transitions as module
from tests.integration.harness import RecordingLogger, Scenario, assert_same, nothing_said_of, tiny_monitor
from tests.integration.models import Net, Plain, loaders, with_validation
from tests.integration.scripted import Scripted, flat, jump
from tests.integration.watching import EPOCHS, train


class Seen(Callback):
    """The flag as other callbacks see it at the end of each batch, by step."""

    def __init__(self) -> None:
        self.flags: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.flags[trainer.global_step] = float(trainer.callback_metrics["slt/transition/flag"])


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
    assert next(x for row, x in rows if "slt/transition/log_odds" in row) >= known - 1


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


class InFives(Scripted):
    """What it finds comes five firings at once and a batch late, as results from the background may."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[Any] = []
        self._told = self._reporting.take_up
        self._reporting.take_up = lambda *found: self._held.append(found)  # type: ignore[method-assign]

    def on_train_batch_end(self, *arguments: Any) -> None:
        if len(self._held) == 5:
            for found in self._held:
                self._told(*found)
            self._held.clear()
        super().on_train_batch_end(*arguments)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_flag_is_seen_where_later_points_come_in_the_same_hook(accumulate: int, tmp_path: Path) -> None:
    """The points of steps 31 to 35 come together on the way to step 36; the second or third of them flags."""
    saver = ModelCheckpoint(
        tmp_path, "{step}", monitor="slt/transition/flag", mode="max", every_n_train_steps=1, save_top_k=-1
    )
    watch = TransitionMonitor()
    settings = {"max_epochs": 10 * accumulate, "accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    train(tmp_path, watch, InFives(), saver, **settings)
    assert 31 < watch.transitions[0].known_at < 35
    assert Path(saver.best_model_path).name == "step=36.ckpt" and float(saver.best_model_score) == 1.0


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


def test_early_stop_where_validation_is_rare(tmp_path: Path) -> None:
    """Validation after every fourth epoch: the flag of the sixth is seen after the eighth."""
    stop = EarlyStopping("slt/transition/flag", mode="max", stopping_threshold=0.5, patience=10**9)
    watch = TransitionMonitor()
    scenario = Scenario(Net, with_validation, lambda: {"max_epochs": 16, "check_val_every_n_epoch": 4})
    trace = scenario.run(tmp_path, stop, watch, Scripted())
    assert 31 < watch.transitions[0].known_at <= 36 and trace.trainer.global_step == 48


def test_user_function_can_stop_the_run(tmp_path: Path) -> None:
    def stop(transition: Any, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True

    watch = TransitionMonitor(on_transition=stop)
    trace = train(tmp_path, watch, Scripted())
    assert trace.trainer.global_step == watch.transitions[0].known_at < 60


def saddle(step: int) -> dict[str, Any]:
    """Before the jump chains run downhill: a negative number that is not valid."""
    late = jump(step)
    return late if step > 30 else {**late, "mean": late["mean"] - 40.0, "reasons": ("negative beyond its error: ...",)}


def diverged(step: int) -> dict[str, Any]:
    return {**jump(step), "reasons": ("3 of 4 chains diverged or became non-finite",) if step > 30 else ()}


def test_a_saddle_counts_and_diverged_chains_do_not(tmp_path: Path) -> None:
    watch, strict = TransitionMonitor(), TransitionMonitor("slt_b/llc/mean", saddles=False)
    train(tmp_path, watch, strict, Scripted(saddle), Scripted(saddle, name="b"))
    (report,) = watch.reports
    assert 30 <= report.transition.step <= 32 and report.transition.llc_change > 40
    assert report.before is None and report.after is not None and report.tempered is None
    assert strict.transitions == []
    bad = TransitionMonitor()
    train(tmp_path / "bad", bad, Scripted(diverged))
    assert bad.transitions == []


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
    with nothing_said_of(".*(TransitionMonitor|could not publish).*"):
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


# ------------------------------------------------------------------------------------------------------------- setup


def test_no_monitor_is_refused_at_setup(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"no SLTMonitor of this trainer.*Add SLTMonitor\(\)"):
        train(tmp_path, TransitionMonitor())
    with pytest.raises(MisconfigurationException, match=r"Add SLTMonitor\(name='b'\).*one of 'slt/llc/mean'"):
        train(tmp_path, TransitionMonitor("slt_b/llc/mean"), Scripted())


def test_two_curves_have_keys_and_states_of_their_own(tmp_path: Path) -> None:
    logger = RecordingLogger()
    plain, named = TransitionMonitor(), TransitionMonitor("slt_attn/llc/mean")
    train(tmp_path, named, plain, Scripted(), Scripted(flat, name="attn"), logger=logger)
    assert plain.state_key != named.state_key
    assert (len(plain.transitions), len(named.transitions)) == (1, 0)
    rows = [row for row, _ in logger.of_callback()]
    assert sum(row.get("slt/transition/flag", 0.0) for row in rows) == 1.0
    assert [row["slt_attn/transition/flag"] for row in rows if "slt_attn/transition/flag" in row] == [0.0] * 60


def test_unnamed_monitors_are_told_apart_by_their_place(tmp_path: Path) -> None:
    second = TransitionMonitor("slt_2/llc/mean")
    train(tmp_path, second, Scripted(flat, seed=1), Scripted(jump, seed=2))
    assert len(second.transitions) == 1


def test_smoke_test_flags_nothing_and_writes_nothing(tmp_path: Path) -> None:
    watch = TransitionMonitor()
    Scenario(Plain, loaders, lambda: {"fast_dev_run": 2}).run(tmp_path, Scripted(), watch)
    assert watch.state_dict()["fed"] == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_failure_of_the_detector_follows_the_monitors_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ArithmeticError("broken")

    monkeypatch.setattr(module.TransitionDetector, "update", broken)
    monitor = Scripted(on_failure="warn")
    with pytest.warns(UserWarning, match="TransitionMonitor failed at step 1;.*ArithmeticError: broken") as caught:
        trace = train(tmp_path, monitor, TransitionMonitor())
    assert trace.trainer.global_step == 60 and len(monitor.estimates) == 60
    assert len([w for w in caught if "TransitionMonitor failed" in str(w.message)]) == 1


def test_it_pickles_for_strategies_that_spawn(tmp_path: Path) -> None:
    """After a run too: neither end of the link between the two goes with it, and both work again."""
    monitor, watch = tiny_monitor(), TransitionMonitor()
    Scenario(Plain, loaders).run(tmp_path / "a", monitor, watch)
    monitor.add_listener(watch)
    again, watching = pickle.loads(pickle.dumps((monitor, watch)))
    assert again._reporting._listeners == [] and watching.state_dict() == watch.state_dict()
    Scenario(Plain, loaders).run(tmp_path / "b", watching, again)
    assert watching.state_dict()["fed"] == 12 and len(again.estimates) == 3


def test_barebones_is_watched_without_a_file(tmp_path: Path) -> None:
    watch = TransitionMonitor()
    Scenario(Plain, loaders, lambda: {"barebones": True, **EPOCHS}).run(tmp_path, Scripted(), watch)
    assert len(watch.transitions) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
