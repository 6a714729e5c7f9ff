"""The overhead budget alone: simulated runs, with seconds that are made up."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Optional

import pytest

from lightning_slt.callbacks.overhead import CAP, OverheadBudget
from lightning_slt.callbacks.sizing import chain_steps, least_size, size_of, sized
from lightning_slt.estimate import ChainSettings
from lightning_slt.sampling.samplers import SGLD

BATCH_SECONDS = 0.1
PLANNED = 20
"""Chain-steps that cost as much as most firings here do, 2 s."""


@dataclass
class Run:
    """A training run that asks the budget as the monitor does, and keeps what came of it.

    Attributes:
        fired: the steps at which it fired.
        times: the seconds of training before each of them.
        shares: the share of wall-clock that firings had taken, after each of them.
        sizes: how large each of them was; the cost is that of a full one.
        asked: how often it asked.
    """

    budget: OverheadBudget
    cost: Callable[[int], float]
    batch: Callable[[int], float] = lambda _: BATCH_SECONDS
    candidate: Callable[[int], bool] = lambda _: True
    step: int = 0
    trained: float = 0.0
    spent: float = 0.0
    asked: int = 0
    fired: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    _ask_at: int = 0

    def go(self, steps: int) -> Run:
        for _ in range(steps):
            self.step += 1
            seconds = self.batch(self.step)
            self.trained += seconds
            self.budget.earn(seconds)
            self.budget.saw_batch(seconds)
            if self.candidate(self.step) and self.step >= self._ask_at:
                self._ask()
        return self

    def _ask(self) -> None:
        self.asked += 1
        decision = self.budget.decide(self.step)
        self._ask_at = decision.ask_at
        assert decision.ask_at > self.step
        if decision.fire:
            cost = decision.size * self.cost(self.step)
            self.budget.spend(cost, decision.size)
            self.sizes.append(decision.size)
            self.spent += cost
            self.fired.append(self.step)
            self.times.append(self.trained)
            self.shares.append(self.share)

    @property
    def share(self) -> float:
        return self.spent / (self.trained + self.spent)

    @property
    def intervals(self) -> list[int]:
        return [b - a for a, b in pairwise(self.fired)]


@pytest.mark.parametrize("max_overhead", [0.01, 0.05, 0.3, 0.8])
def test_a_steady_cost_uses_the_budget_and_never_more(max_overhead: float) -> None:
    run = Run(OverheadBudget(max_overhead, planned_steps=40), cost=lambda _: 2.0).go(60_000)
    assert max(run.shares) <= max_overhead * (1 + 1e-9)
    assert run.share >= 0.95 * max_overhead
    wanted = 2.0 / (max_overhead / (1 - max_overhead)) / BATCH_SECONDS
    late = run.intervals[2:]
    assert min(late) >= wanted - 2 and max(late) <= wanted + 2


@pytest.mark.parametrize("factor", [2.5, 0.4])
def test_a_cost_that_changes_by_two_and_a_half(factor: float) -> None:
    """Dearer: one firing makes a debt of one and a half old costs, which is paid before the next."""
    run = Run(OverheadBudget(0.05, PLANNED), cost=lambda step: 2.0 if step < 50_000 else 2.0 * factor).go(100_000)
    assert 0.95 * 0.05 <= run.share <= 0.05
    above = [share for share in run.shares if share > 0.05 * (1 + 1e-9)]
    assert len(above) == (1 if factor > 1 else 0)
    assert all(share < 0.051 for share in above)


@pytest.mark.parametrize("seed", range(5))
def test_costs_with_noise_stay_within_one_firing_of_the_bound(seed: int) -> None:
    """Chains take between the least and the most of their steps, a factor of 3.3, and training has hiccups."""
    rng = random.Random(seed)
    run = Run(
        OverheadBudget(0.05),
        cost=lambda _: rng.uniform(1.5, 5.0),
        batch=lambda _: rng.expovariate(1 / BATCH_SECONDS) + (30.0 if rng.random() < 1e-4 else 0.0),
    ).go(100_000)
    assert 0.8 * 0.05 <= run.share <= 0.05 + 5.0 / run.trained
    late = run.shares[10:]
    assert sum(share > 0.05 for share in late) < 0.3 * len(late)
    assert max(late) < 0.055


def test_a_cadence_with_gaps_below_the_cost_uses_the_budget_too() -> None:
    """Every hundredth step earns nine tenths of a firing."""
    cost = 100 * BATCH_SECONDS * (0.05 / 0.95) / 0.9
    run = Run(OverheadBudget(0.05, PLANNED), cost=lambda _: cost, candidate=lambda step: step % 100 == 0).go(50_000)
    assert all(step % 100 == 0 for step in run.fired)
    assert 0.85 * 0.05 <= run.share <= 0.05


def test_a_cadence_that_the_budget_covers_is_kept_as_it_is() -> None:
    run = Run(OverheadBudget(0.05, planned_steps=1), cost=lambda _: 0.1, candidate=lambda step: step % 100 == 0)
    assert run.go(2_000).fired == list(range(100, 2_001, 100))


@pytest.mark.parametrize("pause", [600.0, 1e6])
def test_a_quiet_stretch_is_not_followed_by_a_burst(pause: float) -> None:
    """A validation that earns fifteen firings, or a hundred thousand: one at once, and half a one is kept."""
    interval = round(2.0 * 19 / BATCH_SECONDS)
    run = Run(OverheadBudget(0.05, PLANNED), cost=lambda _: 2.0, batch=lambda s: pause if s == 5_000 else BATCH_SECONDS)
    run.go(4_999)
    assert run.budget.affordable_seconds <= CAP * 2.0
    run.go(5_001)
    after = [step for step in run.fired if step >= 5_000]
    assert after[1] - after[0] >= 0.45 * interval
    assert min(b - a for a, b in pairwise(after[1:])) >= 0.95 * interval


def test_a_first_firing_cheaper_than_feared_is_not_followed_by_a_burst() -> None:
    run = Run(OverheadBudget(0.05, planned_steps=200), cost=lambda _: 1.0).go(20_000)
    interval = 1.0 * 19 / BATCH_SECONDS
    assert run.fired[0] == pytest.approx(200 * 19, rel=0.01)
    assert min(run.intervals) >= 0.45 * interval


def test_before_the_first_firing_the_plan_is_priced_at_the_median_batch() -> None:
    budget = OverheadBudget(0.05, planned_steps=1000)
    assert budget.predicted_seconds == float("inf") and not budget.decide(0).fire
    for seconds in (60.0, 0.2, 0.1, 0.2, 0.3, 90.0, 0.2):  # the first batch compiles, one waits for a validation
        budget.saw_batch(seconds)
    assert budget.predicted_seconds == pytest.approx(200.0)
    budget.spend(7.0)
    assert budget.predicted_seconds == 7.0


def test_one_freak_firing_is_paid_and_forgotten() -> None:
    """Twenty times as dear as the others: a long wait, three firings that are expected to cost as much, no burst."""
    run = Run(OverheadBudget(0.05, PLANNED), cost=lambda step: 40.0 if 10_000 <= step < 11_000 else 2.0).go(100_000)
    assert 0.8 * 0.05 <= run.share <= 0.05
    assert run.intervals[-1] == pytest.approx(380, abs=2)
    assert min(run.intervals) >= 0.45 * 380


def test_a_long_wait_takes_few_questions() -> None:
    run = Run(OverheadBudget(0.05, PLANNED), cost=lambda _: 500.0).go(300_000)
    assert 2 <= len(run.fired) <= 4
    assert run.asked < 45 * len(run.fired)


def test_steps_that_become_slower_are_noticed_in_time() -> None:
    """Four times slower from a step in the middle of a wait: the firing comes not much later than it could."""
    interval = 2.0 * 19
    run = Run(OverheadBudget(0.05, PLANNED), lambda _: 2.0, batch=lambda s: BATCH_SECONDS * (1 if s < 2_000 else 4))
    run.go(10_000)
    assert 0.9 * 0.05 <= run.share <= 0.05
    assert max(b - a for a, b in pairwise(run.times)) <= 1.5 * interval


def test_a_failure_is_not_tried_again_at_once() -> None:
    budget = OverheadBudget(0.05)
    budget.earn(100.0)
    budget.saw_batch(2.0)
    assert budget.decide(1).fire
    budget.fail(0.01)
    assert not budget.decide(2).fire
    budget.earn(18.0)
    assert not budget.decide(3).fire  # half a firing's credit was kept, and a firing costs what was planned
    budget.earn(1.1)
    assert budget.decide(4).fire
    assert budget.predicted_seconds == 2.0


def test_what_a_firing_may_take() -> None:
    budget = OverheadBudget(0.05)
    budget.saw_batch(2.0)
    assert budget.affordable_seconds == 0.0
    budget.earn(19.0)
    assert budget.affordable_seconds == pytest.approx(1.0)
    budget.earn(1e6)
    assert budget.affordable_seconds == pytest.approx(2.0 * CAP)
    budget.spend(10.0)
    assert budget.affordable_seconds >= 0.0


@pytest.mark.parametrize("at", [1_000, 1_100, 5_003])
def test_a_resumed_run_goes_on_with_its_ledger(at: int) -> None:
    def begin(budget: Optional[OverheadBudget] = None) -> Run:
        return Run(budget or OverheadBudget(0.05, PLANNED), cost=lambda step: 2.0 + 0.5 * (step % 3))

    whole, first = begin().go(10_000), begin().go(at)
    state: dict[str, Any] = json.loads(json.dumps(first.budget.state_dict()))
    again = OverheadBudget(0.05)
    again.load_state_dict(state)
    assert again.predicted_seconds == first.budget.predicted_seconds
    assert again.affordable_seconds == first.budget.affordable_seconds
    assert again.trained_seconds == first.budget.trained_seconds
    resumed = begin(again)
    resumed.step, resumed.trained, resumed.spent = first.step, first.trained, first.spent
    resumed.go(10_000 - at)
    assert len([*first.fired, *resumed.fired]) == pytest.approx(len(whole.fired), abs=1)
    assert 0.9 * 0.05 <= resumed.share <= 0.05 * (1 + 1e-9) + 1.0 / resumed.trained


def test_forgetting_is_a_new_ledger() -> None:
    budget = OverheadBudget(0.05)
    Run(budget, cost=lambda _: 2.0).go(5_000)
    budget.forget()
    assert budget.state_dict() == OverheadBudget(0.05).state_dict()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_a_share_out_of_range_is_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match=r"max_overhead=.*between 0 and 1"):
        OverheadBudget(value)


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("max_overhead", [0.01, 0.05, 0.3])
def test_firings_start_small_double_and_stay_full(max_overhead: float) -> None:
    run = Run(OverheadBudget(max_overhead, PLANNED, least_size=0.1), cost=lambda _: 2.0).go(60_000)
    # a step that is asked a little late covers a little more
    assert run.sizes[0] == pytest.approx(0.1, rel=0.15)
    growing = [size for size in run.sizes if size < 1.0]
    assert len(growing) == 4 and run.sizes[4:] == [1.0] * (len(run.sizes) - 4)
    assert all(b >= 2 * a for a, b in pairwise(growing))
    assert max(run.shares) <= max_overhead * (1 + 1e-9) and run.share >= 0.9 * max_overhead


def test_a_run_that_earns_a_sixth_of_a_full_firing_measures_once() -> None:
    """190 steps earn one second at 5 %; a full firing takes six, the smallest a tenth of that."""
    short = Run(OverheadBudget(0.05, planned_steps=60, least_size=0.1), cost=lambda _: 6.0).go(190)
    assert len(short.fired) == 1 and short.sizes[0] == pytest.approx(0.1, rel=0.2) and short.share <= 0.05
    assert Run(OverheadBudget(0.05, planned_steps=60), cost=lambda _: 6.0).go(190).fired == []


def test_candidates_far_apart_are_as_large_as_the_credit_covers() -> None:
    """Every thousandth step: 100 s earn 5.26 s, more than a full firing of 5 s; of 10 s, half of one."""
    often = Run(OverheadBudget(0.05, 50, 0.1), cost=lambda _: 5.0, candidate=lambda step: step % 1000 == 0).go(5_000)
    assert often.sizes == [1.0] * 5
    dear = Run(OverheadBudget(0.05, 100, 0.1), cost=lambda _: 10.0, candidate=lambda step: step % 1000 == 0).go(9_000)
    assert dear.sizes[0] == pytest.approx(0.526, abs=0.01) and set(dear.sizes[1:]) == {1.0}
    assert max(dear.shares) <= 0.05 * (1 + 1e-9)


def test_a_small_firing_cheaper_than_feared_is_not_followed_by_a_burst() -> None:
    """Priced at ten times what it takes: what is left over covers half of the next at the most."""
    run = Run(OverheadBudget(0.05, planned_steps=200, least_size=0.1), cost=lambda _: 2.0).go(20_000)
    for size, interval in zip(run.sizes[1:], run.intervals, strict=True):
        assert interval >= 0.45 * size * 2.0 * 19 / BATCH_SECONDS


def test_sizes_go_on_after_a_resume() -> None:
    first = Run(OverheadBudget(0.05, PLANNED, 0.1), cost=lambda _: 2.0).go(200)
    assert len(first.fired) >= 2
    again = OverheadBudget(0.05, PLANNED, 0.1)
    again.load_state_dict(json.loads(json.dumps(first.budget.state_dict())))
    assert again.wanted_size == first.budget.wanted_size == pytest.approx(2 * first.sizes[-1])
    assert again.predicted_seconds == first.budget.predicted_seconds == pytest.approx(2.0)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, float("nan")])
def test_a_least_size_out_of_range_is_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match=r"least_size="):
        OverheadBudget(0.05, least_size=value)


@pytest.mark.parametrize(
    ("given", "least"),
    [
        ({}, (20, 1, 120)),  # the search of 100 steps, and one round of draws
        ({"sampler": SGLD(lr=1e-4)}, (20, 1, 40)),
        ({"num_steps_bw_draws": 3}, (20, 4, 160)),
        ({"num_burnin_steps": 50}, (20, 4, 220)),
        ({"num_draws": 15}, (15, 3, 115)),  # the full one is that small: the search is what it costs
    ],
    ids=["nothing", "step", "spacing", "burn-in", "few draws"],
)
def test_the_smallest_firing(given: dict[str, Any], least: tuple[int, int, int]) -> None:
    full = ChainSettings(**{"num_draws": 100, "max_steps_bw_draws": 4, **given})
    small = sized(full, least_size(full))
    assert (small.num_draws, small.max_steps_bw_draws, chain_steps(small)) == least
    assert (small.num_steps_bw_draws, small.num_burnin_steps) == (full.num_steps_bw_draws, full.num_burnin_steps)


def test_sizes_between_never_exceed_what_is_allowed_nor_stop_growing() -> None:
    full = ChainSettings(num_draws=100, max_steps_bw_draws=4)
    assert sized(full, 1.0) == full and chain_steps(full) == 800
    for percent in range(22, 101):
        assert size_of(sized(full, percent / 100), full) <= percent / 100 * (1 + 1e-9)
    size, seen = least_size(full), []
    while size < 1.0:
        seen.append(size)
        size = size_of(sized(full, min(2 * size, 1.0)), full)
        assert size > seen[-1]
    assert len(seen) <= 4


def test_a_size_that_some_firing_has_is_that_firing() -> None:
    """Sizes are quotients, and a rounding error must not make a firing smaller."""
    full = ChainSettings(num_draws=120, max_steps_bw_draws=4)
    sizes = [size_of(sized(full, 0.001 * k), full) for k in range(1001)]
    assert [size_of(sized(full, size), full) for size in sizes] == sizes and len(set(sizes)) > 50


def test_credit_that_nothing_was_due_for_is_that_of_a_firing_and_a_half() -> None:
    """And what is taken up beside a firing is debited from that."""
    run = Run(OverheadBudget(0.05, PLANNED), lambda step: 2.0, candidate=lambda step: step % 5000 == 0)
    run.go(4999)
    assert run.budget.decide(run.step).credit_seconds == pytest.approx(CAP * PLANNED * BATCH_SECONDS)
    run.budget.charge(2.5)
    assert run.budget.decide(run.step).credit_seconds == pytest.approx(CAP * PLANNED * BATCH_SECONDS - 2.5)


def test_the_first_firing_is_foretold_once_batches_have_shown_what_it_takes() -> None:
    """A second of chains, half of the full 2 s, is earned in 190 batches of a tenth of a second."""
    budget = OverheadBudget(0.05, PLANNED, least_size=0.5)
    run = Run(budget, lambda step: 2.0)
    assert not run.go(30).budget.awaits_first and run.go(1).budget.awaits_first
    assert budget.batches_to_first == pytest.approx(190 - 31)
    run.go(158)
    assert run.fired == [] and budget.awaits_first and budget.batches_to_first == pytest.approx(1)
    run.go(10)
    assert len(run.fired) == 1 and not budget.awaits_first


def test_a_decision_says_what_its_own_firing_is_expected_to_take() -> None:
    budget = OverheadBudget(0.05, PLANNED, least_size=0.25)
    for _ in range(95):
        budget.saw_batch(BATCH_SECONDS)
        budget.earn(BATCH_SECONDS)
    decision = budget.decide(95)
    assert decision.fire and decision.size == pytest.approx(0.25)
    assert decision.predicted_seconds == pytest.approx(0.5) == decision.credit_seconds


def test_another_run_is_asked_as_if_there_had_been_none_before() -> None:
    """At the pace of the last one its second question would come too late."""
    used, fresh = OverheadBudget(0.05, PLANNED), OverheadBudget(0.05, PLANNED)
    used.saw_batch(BATCH_SECONDS)
    used.decide(10)
    used.forget()
    for budget in (used, fresh):
        budget.saw_batch(BATCH_SECONDS)
        budget.earn(BATCH_SECONDS)
    assert used.decide(60) == fresh.decide(60)


def test_the_next_question_is_half_way_to_where_the_credit_will_do_and_at_most_twice_the_steps_ahead() -> None:
    """A second of training earns a half; ten steps of a second each had earned 5 of 40, and the 35 that are missing
    take 70 more."""
    budget = OverheadBudget(1 / 3, planned_steps=40)
    budget.saw_batch(1.0)
    assert budget.decide(0).ask_at == 1  # no pace is known yet
    budget.earn(10.0)
    assert budget.decide(10).ask_at == 10 + 20
    budget.earn(40.0)
    assert budget.decide(50).ask_at == 50 + 15  # 15 of 40 are missing: 30 steps
    budget.earn(28.0)
    assert budget.decide(78).ask_at == 78 + 1
