"""A firing inside training from end to end: what is told of it, and what becomes of one that fails."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy

from lightning_slt.callbacks import attempts as module
from lightning_slt.callbacks.attempts import Attempts
from lightning_slt.callbacks.distribution import RankFailedError
from lightning_slt.callbacks.moment import Moment
from lightning_slt.callbacks.overhead import Decision
from lightning_slt.callbacks.signals import BrokenOffError, SignalsHeld
from lightning_slt.callbacks.sizing import size_of, sized
from lightning_slt.callbacks.turns import Ahead
from lightning_slt.estimate import ChainSettings
from lightning_slt.sampling.collective import Alone, RankLostError
from tests.publish.helpers import make_estimate

SETTINGS = ChainSettings(num_draws=100, max_steps_bw_draws=4)


class Held:
    """Signals that came meanwhile."""

    def __init__(self, interrupted: bool = False, waits: bool = False) -> None:
        self.interrupted, self.waits = interrupted, waits or interrupted

    def check(self) -> None: ...

    def check_interrupt(self) -> None: ...


class Firing:
    """Attempts whose parts write down what they are told; a clock that goes on by a second when it is read."""

    def __init__(self, raises: bool = False, components: bool = False, budget: Any = None) -> None:
        self.told: list[Any] = []
        self.fails: Optional[Exception] = None
        self.components_fail: Optional[Exception] = None
        self.measured: Any = None
        self.of_components: Any = None
        self.estimates: list[Any] = []
        self.ahead: Optional[Ahead] = None
        self._time = 0.0
        self.history = SimpleNamespace(skipped=3, susceptibilities=["before"], estimates=self.estimates)
        asked: Any = SimpleNamespace(
            settings=SETTINGS, raises=raises, measures=SimpleNamespace(susceptibility=components)
        )
        said = SimpleNamespace(prefix="slt", who="SLTMonitor", failed=self._failed)
        self.attempts = Attempts(
            asked,
            said,  # type: ignore[arg-type]
            SimpleNamespace(  # type: ignore[arg-type]
                now=self._now, took=self._took, budget=budget, overhead_at_end=lambda *of: of
            ),
            SimpleNamespace(  # type: ignore[arg-type]
                take_back=lambda step: self.told.append(("taken back", step)), ahead=lambda step: self.ahead
            ),
            SimpleNamespace(measure=self._measure),  # type: ignore[arg-type]
            SimpleNamespace(measure=self._measure_components),  # type: ignore[arg-type]
            SimpleNamespace(  # type: ignore[arg-type]
                history=self.history,
                one_row=lambda joins: nullcontext(),
                take_up=lambda trainer, net, estimate, influence, begin: self.estimates.append(estimate),
                take_up_susceptibility=lambda trainer, found: self.told.append(("components", found)),
            ),
        )

    def _now(self) -> float:
        self._time += 1.0
        return self._time

    def _failed(self, step: int, reason: str, goes_on: bool = True) -> None:
        self.told.append(("failed", step, reason, goes_on))

    def _took(self, begin: float, size: Optional[float] = None, failed: bool = False) -> None:
        self.told.append(("took", begin, size, failed))

    def _measure(self, moment: Moment, settings: ChainSettings, progress: Any) -> Any:
        self.measured = settings, progress
        if self.fails is not None:
            raise self.fails
        return make_estimate(step=0), None

    def _measure_components(self, moment: Moment, settings: ChainSettings, before: Any, progress: Any) -> Any:
        self.of_components = progress
        if self.components_fail is not None:
            raise self.components_fail
        return settings, before

    def fire(self, held: Any = None, decision: Optional[Decision] = None, sharded: bool = False, smoke: int = 0) -> Any:
        held = held or Held()
        self.attempts._fire(self.moment(decision, sharded, smoke), held)
        return held

    def moment(
        self, decision: Optional[Decision] = None, sharded: bool = False, smoke: int = 0, ranks: Any = None
    ) -> Any:
        strategy = ModelParallelStrategy() if sharded else SingleDeviceStrategy()
        trainer: Any = SimpleNamespace(
            strategy=strategy, progress_bar_callback=None, is_global_zero=True, current_epoch=2, fast_dev_run=smoke
        )
        net: Any = None
        return Moment(trainer, net, 40, 41, ranks or Alone(), decision)


def test_an_estimate_has_its_place_in_the_run_and_what_it_took() -> None:
    firing = Firing()
    firing.fire()
    (estimate,) = firing.estimates
    assert (estimate.step, estimate.x, estimate.epoch, estimate.seconds) == (40, 41, 2, 1.0)
    assert firing.measured[0] is SETTINGS and firing.told == [("took", 1.0, 1.0, False)]
    assert estimate.skipped == 3 and firing.history.skipped == 3  # of the cadence: nothing counts them anew


def test_a_firing_of_the_budget_is_as_large_as_it_says() -> None:
    """As near as there is one, which is the size that is told; those that were left out before it are counted anew."""
    firing = Firing(budget=object())
    firing.fire(decision=Decision(True, 41, 7.0, 5.0, 0.3))
    (estimate,) = firing.estimates
    small = sized(SETTINGS, 0.3)
    size = size_of(small, SETTINGS)
    assert size == 0.25 and firing.measured[0] == small
    assert (estimate.firing_size, estimate.skipped, firing.history.skipped) == (size, 3, 0)
    assert (estimate.credit_seconds, estimate.predicted_seconds) == (7.0, 5.0)
    assert firing.told == [("took", 1.0, size, False)]


@pytest.mark.parametrize("ahead", [None, Ahead(9, 0.1), Ahead(9, 0.0)])
@pytest.mark.parametrize("budget", [None, object()])
def test_what_measuring_takes_is_spoken_of_where_nothing_bounds_it(
    budget: Any, ahead: Optional[Ahead], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes on by a second at each look: two are in the firing, and a third with what followed."""
    due: list[Any] = []
    shares: list[Any] = []
    monkeypatch.setattr(module, "say_what_is_due", lambda voice, *of: due.append(of))
    monkeypatch.setattr(module, "warn_if_large", lambda voice, estimates, at_end: shares.append((estimates[:], at_end)))
    firing = Firing(budget=budget)
    firing.ahead = ahead
    firing.fire()
    firing.fire()
    if budget is not None:
        assert not due and not shares
        return
    firing.fire(smoke=1)  # of which there is one alone, whatever the cadence says
    firing.estimates.pop()
    assert due == ([(2.0, ahead)] if ahead else [])  # of the first alone
    at_end = (0.1, 9, 2.0) if ahead and ahead.done else None
    assert shares == [(firing.estimates[:1], at_end), (firing.estimates, at_end)]


BROKEN_OFF = BrokenOffError("SIGTERM came")
ELSEWHERE = RankFailedError("rank 1 failed", {"BrokenOffError"})


@pytest.mark.parametrize(
    ("error", "held", "again"),
    [
        (ValueError("no loss"), Held(), False),
        (BROKEN_OFF, Held(waits=True), True),
        (ELSEWHERE, Held(), True),
        (RankFailedError("rank 1 failed", {"ValueError"}), Held(), False),
        (ValueError("BrokenOffError"), Held(), False),
    ],
    ids=["failed", "signal", "signal on another rank", "failed on another rank", "other words"],
)
def test_a_failure_is_told_and_a_firing_that_a_signal_ends_is_due_again(
    error: Exception, held: Held, again: bool
) -> None:
    firing = Firing()
    firing.fails = error
    firing.fire(held)
    # what answers a signal may end training
    failed = [("failed", 40, f"{type(error).__name__}: {error}", not again), ("took", 1.0, None, True)]
    assert firing.told == [*([("taken back", 40)] if again else []), *failed]
    assert not firing.estimates and firing.history.skipped == 3


@pytest.mark.parametrize(
    ("raises", "smoke", "error"),
    [(True, 0, ValueError("no loss")), (False, 1, ValueError("no loss")), (False, 0, RankLostError("rank 1 is gone"))],
    ids=["on_failure", "fast_dev_run", "a rank is gone"],
)
def test_a_failure_that_ends_the_run_is_no_firing_of_it(raises: bool, smoke: int, error: Exception) -> None:
    firing = Firing(raises=raises)
    firing.fails = error
    with pytest.raises(type(error), match=str(error)):
        firing.fire(smoke=smoke)
    assert firing.told == [("taken back", 40)]


@pytest.mark.parametrize("raises", [False, True])
def test_whatever_fails_with_ctrl_c_waiting_is_neither_told_nor_raised(raises: bool) -> None:
    firing = Firing(raises=raises)
    firing.fails = BROKEN_OFF
    firing.fire(Held(interrupted=True))
    assert firing.told == []
    later = Firing(raises=raises, components=True)
    later.components_fail = BROKEN_OFF
    later.fire(Held(interrupted=True))
    assert later.told == [] and len(later.estimates) == 1


@pytest.mark.parametrize(
    ("raises", "sharded", "asked"), [(False, False, "check"), (True, False, "check_interrupt"), (True, True, None)]
)
def test_what_a_signal_breaks_off(raises: bool, sharded: bool, asked: Optional[str]) -> None:
    """Where failures raise Ctrl-C alone, and nothing of ranks with shards, which can only leave off together."""
    firing = Firing(raises=raises, components=True)
    held = firing.fire(sharded=sharded)
    check = getattr(held, asked) if asked else None
    assert firing.measured[1]._check == check and firing.of_components._check == check


@pytest.mark.parametrize("sharded", [False, True])
def test_ctrl_c_waits_for_chains_of_several_ranks_that_could_be_left_alone(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains over shards are all ranks' own."""
    held: list[int] = []

    class Counted(SignalsHeld):
        def __init__(self, ranks: int) -> None:
            held.append(ranks)
            super().__init__(ranks)

    monkeypatch.setattr(module, "SignalsHeld", Counted)
    firing = Firing()
    firing.attempts.fire(firing.moment(sharded=sharded, ranks=SimpleNamespace(rank=0, world_size=3)))
    assert held == [1 if sharded else 3] and len(firing.estimates) == 1


def test_components_come_after_the_estimate_which_stands_where_they_fail() -> None:
    firing = Firing(components=True)
    firing.fire()
    assert firing.told == [("components", (SETTINGS, ["before"])), ("took", 1.0, 1.0, False)]
    firing.components_fail = ValueError("no samples")
    with pytest.warns(UserWarning, match=r"SLTMonitor: susceptibility at step 40 failed.*ValueError: no samples"):
        firing.fire()
    assert len(firing.estimates) == 2 and firing.told[-1][0] == "took"
    firing.components_fail = RankLostError("rank 1 is gone")
    with pytest.raises(RankLostError):
        firing.fire()
    for raising, smoke in ((Firing(True, True), 0), (Firing(False, True), 1)):
        raising.components_fail = ValueError("no samples")
        with pytest.raises(ValueError, match="no samples"):
            raising.fire(smoke=smoke)
        assert len(raising.estimates) == 1
