"""The overhead budget inside a trainer, by a clock that only training steps and chain-steps move."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_slt.callbacks.background.firings import BackgroundFirings, Late
from lightning_slt.callbacks.background.pool import Result
from lightning_slt.callbacks.overhead import CAP
from lightning_slt.publish.run import load_run
from lightning_slt.publish.words import cost_of
from tests.integration.harness import RecordingLogger, Scenario, SLTMonitor, steps_of, tiny_monitor
from tests.integration.models import loaders
from tests.integration.timed import CHAIN_STEPS, Clock, Timed, budgeted, said, scenario


def share(monitor: SLTMonitor) -> float:
    seconds, run_seconds = (monitor.state_dict()[key] for key in ("seconds", "run_seconds"))
    return float(seconds / run_seconds)


def test_every_step_is_a_candidate_and_the_share_is_kept(clock: Clock, tmp_path: Path) -> None:
    monitor = budgeted()
    scenario(400).run(tmp_path, monitor)
    assert 0.8 * 0.2 < share(monitor) <= 0.2
    first, later = monitor.estimates[0], monitor.estimates[1:]
    assert first.predicted_seconds == CHAIN_STEPS * 1.0  # as planned, before any was measured
    assert first.step == 4 * CHAIN_STEPS
    cost = later[0].predicted_seconds
    assert CHAIN_STEPS <= cost <= 2.5 * CHAIN_STEPS  # and the losses at the anchor
    intervals = [b.step - a.step for a, b in zip(monitor.estimates, later, strict=False)]
    # the first one asks besides whether the loss couples its samples
    assert intervals[1:] == pytest.approx([4 * e.seconds for e in later[:-1]], abs=2)
    assert [e.skipped for e in later] == [n - 1 for n in intervals]
    assert all(e.credit_seconds >= e.predicted_seconds for e in monitor.estimates)
    assert all(e.overhead <= 0.2 for e in later[2:])


def test_what_is_published(clock: Clock, tmp_path: Path) -> None:
    monitor, logger = budgeted(), RecordingLogger()
    scenario(100, logger=logger).run(tmp_path, monitor)
    row, _ = logger.of_callback()[0]
    assert {k for k in row if k.startswith("slt/cost/")} == {
        f"slt/cost/{k}"
        for k in ("seconds", "overhead_frac", "credit_seconds", "predicted_seconds", "firing_size", "skipped")
    }
    assert row["slt/cost/skipped"] == 4 * CHAIN_STEPS - 1
    assert monitor.folder is not None
    lines = [json.loads(line) for line in (monitor.folder / "estimates.jsonl").read_text().splitlines()]
    assert lines[0]["skipped"] == 4 * CHAIN_STEPS - 1 and lines[0]["predicted_seconds"] == CHAIN_STEPS
    assert monitor._config()["max_overhead"] == 0.2 and monitor._config()["every_n_train_steps"] == 1


def test_the_steps_of_a_cadence_are_the_candidates(clock: Clock, tmp_path: Path) -> None:
    monitor = budgeted(every_n_train_steps=10)
    scenario(400).run(tmp_path, monitor)
    steps = steps_of(monitor)
    assert 3 < len(steps) < 20 and all(step is not None and step % 10 == 0 for step in steps)
    assert share(monitor) <= 0.2
    skipped = [e.skipped for e in monitor.estimates]
    assert skipped == [(b - a) // 10 - 1 for a, b in zip([0, *steps], steps, strict=False)]


@pytest.mark.parametrize(
    ("cadence", "candidates"),
    [({"at_steps": [0, 5, 60, 61, 210]}, [60, 210]), ({"log_spaced": 3}, [220]), ({"every_n_epochs": 12}, [72, 216])],
    ids=["steps", "log-spaced", "epochs"],
)
def test_any_cadence(cadence: dict[str, Any], candidates: list[int], clock: Clock, tmp_path: Path) -> None:
    """Six batches an epoch, 220 in all; step 0 comes before anything is earned."""
    monitor = budgeted(**cadence)
    scenario(220).run(tmp_path, monitor)
    assert steps_of(monitor) == candidates


def test_cheap_firings_keep_their_cadence(clock: Clock, tmp_path: Path) -> None:
    clock.chain_step = 0.01
    monitor = budgeted(every_n_train_steps=60)
    scenario(240).run(tmp_path, monitor)
    assert steps_of(monitor) == [60, 120, 180, 240]
    assert [e.skipped for e in monitor.estimates] == [0, 0, 0, 0]


class Validates(Timed):
    """A validation batch takes a hundred times as long as one of training."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 50.0


def test_validation_is_wall_clock_too(clock: Clock, tmp_path: Path) -> None:
    """50 s at the end of every epoch of 6 s: all of it earns, and the median prices a chain-step without it."""
    monitor = budgeted()
    trainer = lambda: {"max_epochs": 10, "num_sanity_val_steps": 0}  # noqa: E731
    Scenario(Validates, lambda: loaders(validation=True), trainer).run(tmp_path, monitor)
    assert monitor.estimates[0].step in (7, 8)  # wherever it asks next after the first epoch
    assert monitor.estimates[0].predicted_seconds == CHAIN_STEPS
    assert share(monitor) <= 0.2


def test_without_a_budget_nothing_is_decided(clock: Clock, tmp_path: Path) -> None:
    monitor = tiny_monitor(every_n_train_steps=1)
    scenario(3).run(tmp_path, monitor)
    assert steps_of(monitor) == [1, 2, 3]
    assert all(e.skipped is None and math.isnan(e.credit_seconds) for e in monitor.estimates)
    assert monitor.state_dict()["budget"] is None


@pytest.mark.parametrize("max_overhead", [None, 0.01])
def test_fast_dev_run_is_unaffected(max_overhead: Optional[float], clock: Clock, tmp_path: Path) -> None:
    monitor = SLTMonitor(max_overhead=max_overhead)
    Scenario(Timed, loaders, lambda: {"fast_dev_run": 3}).run(tmp_path, monitor)
    assert [(e.num_chains, e.num_draws) for e in monitor.estimates] == [(1, 4)]


# ------------------------------------------------------------------------------------------------- failing and resuming


class Fails(Timed):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training:
            self.clock.now += 0.5
            raise RuntimeError("the step failed inside a chain")
        return super().training_step(batch, batch_idx)


def test_a_firing_that_fails_is_not_tried_again_at_every_step(clock: Clock, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(Fails, loaders, lambda: {"max_epochs": 34}).run(tmp_path, budgeted(on_failure="warn"))
    texts = [str(w.message) for w in caught]
    assert len([text for text in texts if "training goes on" in text]) == 204 // (4 * CHAIN_STEPS)
    assert not any("nothing was measured" in text for text in texts)


def saving(folder: Path, steps: int) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=20, save_on_train_epoch_end=False)
        return {"callbacks": [saver], "enable_checkpointing": True, "max_epochs": -1, "max_steps": steps}

    return make


def test_resume_keeps_the_ledger_and_not_the_time_between(clock: Clock, tmp_path: Path) -> None:
    whole, first, again = budgeted(), budgeted(), budgeted()
    Scenario(Timed, loaders, saving(tmp_path / "whole", 300), watched=False).run(tmp_path, whole)
    Scenario(Timed, loaders, saving(tmp_path / "first", 150), watched=False).run(tmp_path, first)
    path = tmp_path / "first" / "step=120.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "SLTMonitor" in k]
    assert state["budget"]["trained"] == 120.0 and len(state["budget"]["costs"]) == len(state["estimates"]) > 0

    clock.now += 1e7
    Scenario(Timed, loaders, saving(tmp_path / "again", 300), watched=False).run(tmp_path, again, ckpt_path=str(path))
    before = [step for step in steps_of(whole) if step is not None and step <= 120]
    assert steps_of(again)[: len(before)] == before
    # it asks at other steps than the run that was not cut off, and finds the credit a step or two sooner or later
    assert steps_of(again) == pytest.approx(steps_of(whole), abs=2)
    assert 0.8 * 0.2 < share(again) <= 0.2


def test_a_new_run_has_a_new_ledger(clock: Clock, tmp_path: Path) -> None:
    monitor = budgeted()
    for name in ("one", "two"):
        scenario(60).run(tmp_path / name, monitor)
        assert steps_of(monitor) == [4 * CHAIN_STEPS]


def test_a_checkpoint_of_before_there_was_a_budget(clock: Clock) -> None:
    old = tiny_monitor().state_dict()
    del old["budget"], old["skipped"]
    monitor = budgeted()
    monitor.load_state_dict(old)
    assert monitor.estimates == []


def test_a_monitor_that_comes_to_a_resumed_run_counts_from_there(clock: Clock, tmp_path: Path) -> None:
    """Its clock has seen no step of before; and it remembers when it came, where it is resumed in turn."""
    path = str(tmp_path / "a.ckpt")
    scenario(16).run(tmp_path / "a").trainer.save_checkpoint(path)
    first = tiny_monitor(every_n_train_steps=4)
    scenario(24).run(tmp_path / "b", first, ckpt_path=path).trainer.save_checkpoint(path)
    again = tiny_monitor(every_n_train_steps=4)
    scenario(28).run(tmp_path / "b", again, ckpt_path=path)
    assert [steps_of(monitor) for monitor in (first, again)] == [[20, 24], [20, 24, 28]]
    assert [monitor.state_dict()["first_step"] for monitor in (first, again)] == [16, 16]
    fresh = tiny_monitor(every_n_train_steps=4)
    scenario(8).run(tmp_path / "c", fresh)
    assert fresh.state_dict()["first_step"] == 0


def test_the_clock_stops_between_two_fits(clock: Clock, tmp_path: Path) -> None:
    monitor = budgeted()
    trace = scenario(60).run(tmp_path, monitor)
    clock.now += 1e7
    assert monitor.state_dict()["run_seconds"] < 1e3
    trace.trainer.fit_loop.epoch_loop.max_steps = 400
    trace.trainer.fit(trace.module, **loaders())
    assert 0.8 * 0.2 < share(monitor) <= 0.2


# -------------------------------------------------------------------------------------- other monitors, and waiting


@pytest.mark.parametrize("value", [0.0, 1.0, 5])
def test_a_share_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="max_overhead="):
        SLTMonitor(max_overhead=value)


def test_two_monitors_each_keep_their_own_share(clock: Clock, tmp_path: Path) -> None:
    """Of the one trainer's wall-clock, in which the other's firings lie too: together at most the sum of both."""
    pair = [budgeted(0.1, name="one"), budgeted(0.2, name="two")]
    scenario(900).run(tmp_path, *pair)
    assert 0.7 * 0.1 < share(pair[0]) <= 0.1 and 0.7 * 0.2 < share(pair[1]) <= 0.2
    states = [monitor.state_dict() for monitor in pair]
    trained = 900 * clock.batch
    measured = states[0]["seconds"] + states[1]["seconds"]
    assert states[0]["run_seconds"] == states[1]["run_seconds"] == pytest.approx(trained + measured)
    assert measured / (trained + measured) <= 0.1 + 0.2
    # the other one's firings are no training that would earn credit
    assert [state["budget"]["trained"] for state in states] == pytest.approx([trained, trained])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "other",
    [{"max_overhead": 0.3}, pytest.param({"every_n_train_steps": 5}, marks=pytest.mark.slow)],
    ids=["a budget", "none"],
)
def test_a_monitor_fires_as_it_would_without_another_one(
    other: dict[str, Any], first: bool, clock: Clock, tmp_path: Path
) -> None:
    """Whatever the other takes: firings pay for no firings, in whichever order the callbacks stand."""
    alone, beside = budgeted(), budgeted()
    another = tiny_monitor(name="other", **{"every_n_train_steps": None, **other})
    scenario(300).run(tmp_path / "alone", alone)
    scenario(300).run(tmp_path / "beside", *((beside, another) if first else (another, beside)))
    assert len(another.estimates) >= 4 and len(alone.estimates) >= 3
    assert steps_of(beside) == steps_of(alone)
    assert [e.credit_seconds for e in beside.estimates] == pytest.approx([e.credit_seconds for e in alone.estimates])


class WaitsAlways(BackgroundFirings):
    """A queue that is full: every firing waits for 50 s, in which one result comes back, and is left out after it."""

    full = True
    result: Optional[Late] = None

    def __init__(self, clock: Clock) -> None:
        super().__init__(["cpu"], when_full="wait")
        self.clock = clock

    def open(self, *_: Any, **__: Any) -> None:
        pass

    begin = close = open

    def recover(self, known: Any) -> tuple[list[Late], list[int]]:
        return [], []

    def make_room(self, progress: Any) -> Iterator[Late]:
        self.clock.now += 20.0
        if self.result is not None:
            yield self.result
            self.result = None
        self.clock.now += 30.0


def test_waiting_for_room_is_measuring_and_counts_once(clock: Clock, tmp_path: Path) -> None:
    """50 s, of which taking up the result, 7 s more, is counted by itself; none of it is training."""
    inline = tiny_monitor(at_steps=[1])
    scenario(1).run(tmp_path / "inline", inline)
    monitor = tiny_monitor(every_n_train_steps=None, at_steps=[40], max_overhead=0.5, execution="background")
    assert monitor._late is not None
    beside = monitor._late._beside = WaitsAlways(clock)
    beside.result = Late(Result(40, inline.estimates[0].replace(step=None), None, None, None), {"step": 20, "x": 19})

    class Listens:
        def on_estimate(self, *_: Any) -> None:
            clock.now += 7.0

        def on_monitor_end(self, *_: Any) -> list[Any]:
            return []

    monitor.add_listener(Listens())  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="the firing at step 40 is left out"):
        scenario(60).run(tmp_path, monitor)
    state = monitor.state_dict()
    assert steps_of(monitor) == [20]
    assert state["seconds"] == 57.0 and state["run_seconds"] == 117.0
    assert state["budget"]["trained"] == 60.0
    assert state["budget"]["credit"] == pytest.approx(CAP * 1.0 - 57.0 + 20.0)  # a snapshot is priced at a batch


class WaitsAtTheEnd(WaitsAlways):
    """Results that are still out when training is over: one comes after 20 s, another one not within 30 more."""

    full = False
    pending = (40, 60)
    await_all = WaitsAlways.make_room

    def make_room(self, progress: Any) -> Iterator[Late]:
        return iter(())

    def send(self, *_: Any) -> None:
        pass


def test_waiting_for_the_last_results_is_measuring_too(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inline = tiny_monitor(at_steps=[1])
    scenario(1).run(tmp_path / "inline", inline)
    monitor = tiny_monitor(every_n_train_steps=None, at_steps=[40], execution="background")
    assert monitor._late is not None
    beside = monitor._late._beside = WaitsAtTheEnd(clock)
    beside.result = Late(Result(40, inline.estimates[0].replace(step=None), None, None, None), {"step": 40, "x": 39})
    caplog.clear()
    with (
        caplog.at_level("INFO", logger="lightning.pytorch"),
        pytest.warns(UserWarning, match=r"steps \(40, 60\) did not come within"),
    ):
        scenario(60).run(tmp_path, monitor)
    assert monitor.state_dict()["seconds"] == 50.0 and monitor.state_dict()["run_seconds"] == 110.0
    assert "SLTMonitor: measuring cost this run 50 s, 45% of its wall-clock" in caplog.messages
    assert monitor.folder is not None
    assert cost_of(load_run(monitor.folder)).startswith("Measuring cost this run 50 s, 45% of its wall-clock; ")


# -------------------------------------------------------------------------------------------------------------- sizes

FULL_STEPS, LEAST_STEPS = 2 * 202, 2 * 22
"""Of two chains of 2 + 200 steps, and of 2 + 20."""


def test_a_run_too_short_for_a_full_firing_has_a_small_one(clock: Clock, tmp_path: Path) -> None:
    """Every second of training earns one: 60 of them, where a full firing takes 404."""
    monitor = budgeted(0.5, num_draws=200)
    assert said(lambda: scenario(60).run(tmp_path, monitor)) == []
    (estimate,) = monitor.estimates
    assert estimate.step == LEAST_STEPS and estimate.num_draws == 20 and estimate.trace.shape == (2, 20)
    assert estimate.firing_size == pytest.approx(LEAST_STEPS / FULL_STEPS)
    assert estimate.predicted_seconds == pytest.approx(LEAST_STEPS)
    assert math.isfinite(estimate.se) and estimate.se > 0
    assert share(monitor) <= 0.5


@pytest.mark.slow
def test_a_long_run_grows_to_full_firings_within_the_share(clock: Clock, tmp_path: Path) -> None:
    monitor = budgeted(0.5, num_draws=200)
    scenario(1_800).run(tmp_path, monitor)
    draws = [e.num_draws for e in monitor.estimates]
    assert draws[0] == 20 and draws[-2:] == [200, 200] and draws == sorted(draws)
    assert [e.firing_size for e in monitor.estimates] == pytest.approx([(2 + n) / 202 for n in draws])
    assert 0.7 * 0.5 < share(monitor) <= 0.5 + FULL_STEPS * 0.05 / 1_800


def test_a_fixed_cadence_has_full_firings_only(clock: Clock, tmp_path: Path) -> None:
    monitor = tiny_monitor(every_n_train_steps=2, num_draws=30)
    scenario(4).run(tmp_path, monitor)
    assert [e.num_draws for e in monitor.estimates] == [30, 30]
    assert all(math.isnan(e.firing_size) for e in monitor.estimates)
