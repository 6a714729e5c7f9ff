"""The clock of a run: what measuring takes is no training, over several fits, for this monitor and for others."""

from __future__ import annotations

import pickle

import pytest

from lightning_slt.callbacks import clock as module
from lightning_slt.callbacks.clock import RunClock
from lightning_slt.callbacks.overhead import CAP, OverheadBudget
from lightning_slt.callbacks.schedule import Schedule
from lightning_slt.callbacks.turns import Turns
from lightning_slt.sampling.collective import Alone


class Time:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(module, "time", time)
    return time


def budgeted() -> RunClock:
    """A second of training earns half a second of credit."""
    return RunClock(OverheadBudget(max_overhead=1 / 3, planned_steps=4))


def credit(clock: RunClock) -> float:
    return float(clock.state_dict()["budget"]["credit"])


def test_the_share_at_the_end_counts_what_is_still_to_come_of_both(time: Time) -> None:
    """10 s of training for a tenth of the steps, and 20 s of measuring: 100 s, and 40 with two firings more."""
    clock = RunClock()
    clock.start()
    time.passes(10.0)
    begin = clock.now()
    time.passes(20.0)
    clock.took(begin)
    assert clock.overhead_at_end(0.1, firings=2, seconds=10.0) == pytest.approx(40 / 140)
    assert clock.overhead_at_end(1.0, firings=0, seconds=10.0) == pytest.approx(20 / 30) == clock.overhead(clock.now())


def test_the_share_at_the_end_takes_other_monitors_for_no_training(time: Time) -> None:
    """10 s of training for a tenth of the steps; the other one's 40 s are neither stretched nor this one's."""
    clock, other = RunClock(), RunClock()
    clock.start(others=[clock, other])
    other.start(others=[clock, other])
    time.passes(10.0)
    for measured, seconds in ((clock, 20.0), (other, 40.0)):
        begin = clock.now()
        time.passes(seconds)
        measured.took(begin)
    assert clock.overhead_at_end(0.1, firings=2, seconds=10.0) == pytest.approx(40 / (40 + 40 + 100))


def test_a_run_is_the_sum_of_its_fits(time: Time) -> None:
    clock = RunClock()
    for seconds in (7.0, 5.0):
        clock.start()
        time.passes(seconds)
        clock.stop()
        time.passes(1000.0)
    assert clock.run_seconds == 12.0 and clock.measured_seconds == 0.0
    clock.start()
    time.passes(3.0)
    assert clock.run_seconds == 15.0
    clock.stop()
    clock.forget()
    clock.start()
    time.passes(2.0)
    assert clock.run_seconds == 2.0


def test_measuring_earns_nothing_for_any_monitor(time: Time) -> None:
    clock, other, idle = budgeted(), budgeted(), budgeted()
    other.start(earns=True)
    clock.start(earns=True, others=[clock, other, idle])
    time.passes(10.0)
    begin = clock.now()
    time.passes(4.0)
    clock.took(begin, size=1.0)
    assert clock.measured_seconds == 4.0 and other.measured_seconds == 0.0
    assert clock.budget is not None and clock.budget.predicted_seconds == 4.0
    assert credit(other) == pytest.approx(5.0) and other.budget is not None and other.budget.trained_seconds == 10.0
    assert clock.state_dict()["run_seconds"] == 14.0 and clock.budget.trained_seconds == 10.0
    assert idle.measured_seconds == 0.0 and credit(idle) == 0.0


@pytest.mark.parametrize(
    ("size", "failed", "left"),
    [(None, False, 5.0 - 2.0), (1.0, False, (CAP - 1) * 2.0), (None, True, 5.0 - 4 * 10.0)],
    ids=["other work", "a firing", "a failure"],
)
def test_what_measuring_took_is_debited_by_what_it_was(
    size: float | None, failed: bool, left: float, time: Time
) -> None:
    """Work beside a firing says nothing of the next; after one, half of another is left at the most; and one that
    failed is debited what was predicted."""
    clock = budgeted()
    clock.start(earns=True)
    time.passes(10.0)
    clock.saw_batch()
    begin = clock.now()
    time.passes(2.0)
    clock.took(begin, size, failed)
    assert credit(clock) == pytest.approx(left)
    assert clock.budget is not None and clock.budget.predicted_seconds == (2.0 if size else 4 * 10.0)


def test_overhead_counts_the_firing_that_goes_on(time: Time) -> None:
    clock = RunClock()
    clock.start()
    time.passes(6.0)
    begin = clock.now()
    time.passes(2.0)
    assert clock.overhead(begin) == 0.25
    clock.took(begin)
    time.passes(8.0)
    assert clock.overhead(clock.now()) == 2.0 / 16.0
    assert RunClock().overhead(clock.now()) == 0.0  # no fit, no time


def test_a_checkpoint_has_the_time_so_far(time: Time) -> None:
    clock = budgeted()
    clock.start(earns=True)
    time.passes(8.0)
    begin = clock.now()
    time.passes(2.0)
    clock.took(begin)
    state = clock.state_dict()
    assert (state["seconds"], state["run_seconds"], state["budget"]["trained"]) == (2.0, 10.0, 8.0)
    resumed = budgeted()
    time.passes(1000.0)
    resumed.load_state_dict(state)
    resumed.start(earns=True)
    time.passes(2.0)
    assert resumed.run_seconds == 12.0 and credit(resumed) == pytest.approx(4.0 - 2.0 + 1.0)
    RunClock().load_state_dict(state)  # a run without a budget goes on from one with it
    resumed.load_state_dict({**state, "budget": None})
    assert credit(resumed) == pytest.approx(4.0 - 2.0 + 1.0)


def test_another_process_has_another_clock(time: Time) -> None:
    clock = budgeted()
    clock.start(earns=True, others=[budgeted()])
    time.passes(5.0)
    clock.stop()
    clock.start(earns=True)
    copy = pickle.loads(pickle.dumps(clock))
    time.passes(7.0)
    assert copy.run_seconds == 5.0 and copy.earn() == 0.0 and copy._others == ()


def test_training_up_to_the_end_of_a_fit_is_credited(time: Time) -> None:
    clock, other = budgeted(), budgeted()
    clock.start(earns=True, others=[other])
    time.passes(4.0)
    clock.saw_batch()
    time.passes(6.0)
    clock.stop()
    assert clock.budget is not None and clock.budget.trained_seconds == 10.0 and credit(clock) == pytest.approx(5.0)
    assert clock._others == ()  # of the fit that is over


def test_the_budget_is_asked_with_the_time_up_to_now(time: Time) -> None:
    """At the end of an epoch there was a validation since the last batch, which has earned as well."""
    clock = budgeted()
    turns = Turns(Schedule(every_n_epochs=1), clock)
    clock.start(earns=True)
    time.passes(2.0)
    clock.saw_batch()
    assert turns.decide(1, Alone()) is None
    time.passes(15.0)
    decision = turns.decide(2, Alone())
    assert decision is not None and decision.credit_seconds == pytest.approx(8.5) and decision.predicted_seconds == 8.0
