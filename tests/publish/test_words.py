"""What the report and the terminal say of a run."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch

from lightning_slt.publish import RunPublisher
from lightning_slt.publish.diagnoses import (
    diagnostics,
    invalid_sentence,
    kind_of_reason,
    outcome_of,
    reason_words,
    verdict_sentence,
)
from lightning_slt.publish.phrases import with_error
from lightning_slt.publish.run import load_run
from lightning_slt.publish.sink import RunCost
from lightning_slt.publish.words import cost_of, headline, seconds_of, suspects_sentence, transitions_sentence
from lightning_slt.record import Estimate, RunRecord
from lightning_slt.susceptibility_record import SusceptibilityEstimate, SusceptibilityRecord
from lightning_slt.transition_record import TransitionLog
from lightning_slt.transitions.evidence import MIN_POINTS
from tests.publish.helpers import make_estimate, make_influence

NOT_MIXED = "chains have not mixed: R-hat 1.38 > 1.1, error 5.9"
DOWNHILL = "negative beyond its error: the weights are not at a minimum (chains run downhill)"
SHORT = "the chains have not reached their width in 200 steps (virial ratio 0.40): more draws"


def test_estimates_that_suffer_from_the_same_are_one_remark_however_many_reasons_each_has():
    estimates = [make_estimate(step=step, reasons=(NOT_MIXED, NOT_MIXED) * (step != 30)) for step in (10, 20, 30, 40)]
    [remark] = diagnostics(estimates)
    assert remark.steps == (10, 20, 40)
    assert remark.text.startswith("Chains disagree with each other (3 estimates: steps 10 to 20 and 40).")


def test_valid_estimates_of_weights_beside_a_minimum_are_one_note():
    """Of those that are not valid the reason is said."""
    beside = {"slope": 4.25, "slope_se": 0.6}
    estimates = [
        make_estimate(step=10, reasons=(DOWNHILL,), **beside),
        make_estimate(step=20, **beside),
        make_estimate(step=30, slope=2.0, slope_se=0.1),
        make_estimate(step=40),
    ]
    downhill, note = diagnostics(estimates)
    assert downhill.level == "bad" and downhill.steps == (10,)
    assert (note.level, note.steps) == ("note", (20, 30))
    assert note.text == (
        "The weights were beside a minimum (2 estimates: steps 20 to 30), at which the LLC is higher: by about 4.2 at "
        "the most. Usual early in training, while the learning rate is large, under weight decay and under dropout."
    )
    [alone] = diagnostics(estimates[2:])
    assert "(step 30), at which the LLC is higher: by about 2.0. Usual" in alone.text
    said = verdict_sentence(estimates[1])
    assert said.endswith("; the weights were beside a minimum, at which the LLC is about 4.2 higher.")


def test_the_diagnostics_of_a_long_run_take_time_in_proportion_to_it():
    estimate = make_estimate(reasons=(NOT_MIXED,), num_draws=1)
    seconds = []
    for count in (2_000, 16_000):
        begin = time.process_time()
        [remark] = diagnostics([estimate] * count)
        seconds.append(time.process_time() - begin)
        assert f"({count:,} estimates: " in remark.text
    assert seconds[1] < 25 * seconds[0]  # 8 times as many; 64 times as long where each is compared with all


def test_what_measuring_took_is_that_of_all_monitors(tmp_path: Path):
    for name, seconds, share in (("", 20.0, 0.25), ("attn", 10.0, 0.125)):
        record = RunRecord(tmp_path / (f"slt_{name}" if name else "slt"))
        for step in (10, 20):
            record.append(make_estimate(step=step, component=name, seconds=seconds, overhead=share))
    assert "Measuring took 1 min 0 s in all; training itself" in headline(load_run(tmp_path))[-2]


def test_what_measuring_cost_is_what_the_monitors_said_at_the_end(tmp_path: Path):
    """Shares at the last firings are of two moments, and lack what a clock counts beside the chains."""
    for name, share, cost in (("", 0.9, RunCost(14.0, 39.5)), ("attn", 0.8, RunCost(6.0, 40.0))):
        estimate = make_estimate(step=10, component=name, seconds=2.0, overhead=share)
        publisher = RunPublisher([], tmp_path / (f"slt_{name}" if name else "slt"))
        publisher.estimate(estimate)
        publisher.finish([estimate], "finished", cost=cost)
    both = "Measuring cost this run 20 s, 50% of its wall-clock; training itself was left as it was."
    run = load_run(tmp_path)
    assert (headline(run)[-1], cost_of(run)) == (both, both) and seconds_of(run) == 20.0
    (tmp_path / "slt_attn" / "summary.json").unlink()
    assert cost_of(load_run(tmp_path)) == "Measuring took 16 s in all; training itself was left as it was."
    shutil.rmtree(tmp_path / "slt_attn")
    alone = "Measuring cost this run 14 s, 35% of its wall-clock; training itself was left as it was."
    assert cost_of(load_run(tmp_path)) == alone


@pytest.mark.parametrize("cost", [None, 3, {"seconds": 3.0}, {"seconds": "3", "run_seconds": None}, {"seconds": []}])
def test_of_a_run_that_was_killed_the_share_is_that_up_to_its_last_firing(cost: object, tmp_path: Path):
    RunRecord(tmp_path).append(make_estimate(step=10, seconds=10.0, overhead=0.25))
    (tmp_path / "summary.json").write_text(json.dumps({"status": "running", "cost": cost}))
    told = "Measuring took 10 s in all, 25% of the run's wall-clock up to its last firing; training itself was left"
    assert cost_of(load_run(tmp_path)).startswith(told)


def test_what_measuring_took_has_that_of_susceptibility_in_it(tmp_path: Path):
    """Its chains are others than those of the learning coefficient: 20 s of two firings, and 100 s beside them."""
    one, none = torch.ones(1).double(), torch.empty(1, 0).double()
    for step in (10, 20):
        RunRecord(tmp_path / "slt").append(make_estimate(step=step, seconds=10.0, overhead=0.25))
        found = SusceptibilityEstimate(
            ("head",), one, one, one[None], none, none, none.long(), (), none, none, one,
            1.0, (1.0,), (3,), 100, 4, 100, True, step=step, seconds=50.0,
        )  # fmt: skip
        SusceptibilityRecord(tmp_path / "slt").save(found)
    told = "Measuring took 2 min 0 s in all, 25% of the run's wall-clock up to its last firing"
    assert told in headline(load_run(tmp_path))[-2]


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [
        (2.0987e7, 3400.0, "2.0987e+07 ± 3e+03"),
        (-2.09876e7, 9600.0, "−2.099e+07 ± 1e+04"),  # rounded, the error is one power of ten larger
        (2.0987e7, 2e6, "2.10e+07 ± 2e+06"),
        (2.0987e7, 5e8, "2.10e+07 ± 5e+08"),
        (2.0987654321e9, 3.0, "2.09877e+09 ± 3e+00"),
        (12.0, 3e7, "12.0 ± 3e+07"),
        (9.87654e6, 1234.5, "9,876,500 ± 1,200"),
        (149.2, 96.0, "150 ± 100"),
        (3.14159, 0.149, "3.14 ± 0.15"),
        (3.14159, 0.196, "3.1 ± 0.2"),
        (-0.0003, 0.008, "0.000 ± 0.008"),
    ],
)
def test_a_number_has_the_digits_that_its_error_leaves(value: float, error: float, told: str):
    assert with_error(value, error) == told


def test_suspects_that_are_ranked_over_a_run_are_said_to_be():
    estimate = make_influence(n=30)
    over = estimate.replace(suspicion=torch.arange(30).double())
    assert suspects_sentence(estimate).endswith(
        "are numbers 0, 10, 20, 30 and 40, by their mean loss over the posterior."
    )
    said = "are numbers 290, 280, 270, 260 and 250, by their mean loss over the posterior at all firings so far."
    assert suspects_sentence(over).endswith(said)


# ---------------------------------------------------------------------------------------------------- lines of the log


@pytest.mark.parametrize(
    ("estimates", "said"),
    [
        ([make_estimate(step=4)], "1 estimate, valid; step 4: LLC 12.0 ± 0.5"),
        ([make_estimate(step=4), make_estimate(step=8)], "2 estimates, all valid; step 8: LLC 12.0 ± 0.5"),
        (
            [make_estimate(step=4), make_estimate(step=8, reasons=(NOT_MIXED,))],
            "2 estimates, 1 valid; step 4: LLC 12.0 ± 0.5",
        ),
        (
            [make_estimate(step=step, reasons=(NOT_MIXED,)) for step in (4, 8)],
            "2 estimates, none valid (step 8: chains disagree with each other (R-hat 1.38 > 1.1, error 5.9))",
        ),
        (
            [make_estimate(step=4, reasons=(DOWNHILL,))],
            "1 estimate, not valid (step 4: chains ran downhill: the weights were at no minimum)",
        ),
    ],
)
def test_the_outcome_of_a_run_is_its_last_valid_number_or_why_there_is_none(estimates: list[Estimate], said: str):
    assert outcome_of(estimates) == said


def test_an_estimate_that_is_not_valid_is_told_with_its_reason_and_what_helps():
    estimate = make_estimate(mean=-16.0, se=2.0, step=100, reasons=(DOWNHILL,))
    assert invalid_sentence(estimate, estimate.reasons) == (
        f"step 100: LLC −16 ± 2 is not valid: {DOWNHILL}. Usual early in training, at a "
        "saddle, while the learning rate is large, and under strong weight decay."
    )
    both = make_estimate(reasons=(NOT_MIXED, DOWNHILL))
    assert invalid_sentence(both, both.reasons).endswith(
        "downhill). Usual early in training, at a saddle, while the learning rate is large, and under strong weight "
        "decay."
    )
    lost = make_estimate(mean=math.nan, step=100, bad_chains=4, reasons=("no chain stayed finite",))
    assert invalid_sentence(lost, lost.reasons).startswith("step 100: no LLC: no chain stayed finite. A smaller step")
    short = make_estimate(reasons=(SHORT,))
    assert invalid_sentence(short, short.reasons).endswith("(virial ratio 0.40): more draws."), "it says so itself"


def test_reasons_are_of_one_kind_whatever_their_numbers():
    pairs = [
        (NOT_MIXED, "chains have not mixed: R-hat 2.1 > 1.1, error 1e+02"),
        (SHORT, "the chains have not reached their width in 90 steps (virial ratio 0.1): more draws"),
        ("1 of 4 chains diverged or became non-finite (chains [3]): left out",) * 2,
        ("losses of 0.25 are too coarse in float32", "losses of 1e-05 are too coarse in float32"),
    ]
    assert all(kind_of_reason(one) == kind_of_reason(other) for one, other in pairs)
    assert len({kind_of_reason(one) for one, _ in pairs}) == len(pairs)


# ----------------------------------------------------------------------------------------------------------- the story


def test_below_the_fewest_points_the_story_says_that_no_transition_was_looked_for():
    log, estimate = TransitionLog("slt/llc/mean", 20.0), make_estimate(num_draws=2)
    few = transitions_sentence(log, [estimate] * (MIN_POINTS - 1) + [make_estimate(bad_chains=1)])
    assert few == f"Too few estimates to look for transitions ({MIN_POINTS - 1}; at least {MIN_POINTS} are needed)."
    assert transitions_sentence(log, [estimate] * MIN_POINTS) == "No structural transition was flagged."


def test_the_story_begins_at_a_number_that_is_positive_or_about_0(tmp_path: Path):
    for name, mean, begin in (("a", 12.0, "12.0 ± 0.5 (step 10)"), ("b", -0.3, "about 0 (−0.3 ± 0.5, step 10)")):
        record = RunRecord(tmp_path / name)
        for estimate in (make_estimate(mean=mean, step=10), make_estimate(mean=20.0, step=20)):
            record.append(estimate)
        assert f"it went from {begin} to 20.0 ± 0.5 (step 20)" in " ".join(headline(load_run(tmp_path / name)))


def test_no_advice_gives_a_fixed_burn_in_which_switches_calibration_off():
    said = [invalid_sentence(make_estimate(reasons=(r,)), (r,)) for r in (NOT_MIXED, "step size 0.1 is too large")]
    [remark] = diagnostics([make_estimate(reasons=(SHORT,))])
    assert reason_words(SHORT) == "chains had not spread to their full width (virial ratio 0.40)"
    assert all("burn-in" not in text for text in [*said, remark.text])
    assert remark.text.endswith("More draws (num_draws) help; leave num_burnin_steps to calibration.")


def test_the_advice_on_a_step_that_is_too_large_is_for_those_who_left_it_to_calibration_too():
    """Near zero the heat is much of an LLC at any step: nothing is to be done there."""
    reason = "step size 0.00017 is too large: 59% of the estimate is heat of the step"
    said = invalid_sentence(make_estimate(reasons=(reason,)), (reason,))
    assert "Where lr or num_burnin_steps is given, leave both to calibration, or give a smaller lr" in said
    assert said.endswith(
        "where neither is, an LLC near zero is usual early in training, and at any other a smaller lr helps."
    )


def test_where_it_is_known_whether_a_step_was_given_only_that_is_advised(tmp_path: Path):
    estimate = make_estimate(step=10, reasons=("step size 0.1 is too large: 59% of the estimate is heat of the step",))
    given = "Leave both lr and num_burnin_steps to calibration, or give a smaller lr."
    found = "An LLC near zero is usual early in training, and at any other a smaller lr helps."
    assert invalid_sentence(estimate, estimate.reasons, step_given=True).endswith(f"of the step. {given}")
    assert invalid_sentence(estimate, estimate.reasons, step_given=False).endswith(f"of the step. {found}")
    for sampler, burnin, advice in (
        ("SGLD, calibrated", None, found),
        ("SGNHT(lr=None, diffusion_factor=0.01)", None, found),
        ("SGNHT(lr=1e-05, diffusion_factor=0.01)", None, given),
        ("SGLD, calibrated", 200, given),
        ("mine", None, "Where lr or num_burnin_steps is given, leave both to calibration, or give a smaller lr; where"),
    ):
        record = tmp_path / f"{sampler}{burnin}"
        RunRecord(record).append(estimate)
        settings = {"sampler": sampler, "num_burnin_steps": burnin}
        (record / "summary.json").write_text(json.dumps({"status": "finished", "config": settings}))
        monitor = load_run(record).main
        [remark] = diagnostics(monitor.estimates, monitor.step_given)
        assert f"(step 10). {advice}" in remark.text


def test_a_firing_that_a_budget_made_short_is_not_told_to_take_more_draws():
    """A larger num_draws is cut down to the same."""
    short = make_estimate(step=10, reasons=(NOT_MIXED,), firing_size=0.25)
    full = make_estimate(step=20, reasons=(NOT_MIXED,), firing_size=1.0)
    budget = "max_overhead keeps firings short: a larger one gives them more draws, num_draws does not."
    assert invalid_sentence(short, short.reasons).endswith(f", error 5.9. {budget}")
    assert diagnostics([short])[0].text == f"Chains disagree with each other (step 10). {budget}"
    some = budget.replace("firings", "some firings")
    assert diagnostics([short, full])[0].text == (
        "Chains disagree with each other (2 estimates: steps 10 to 20). More draws (num_draws) or chains (num_chains) "
        f"help. {some}"
    )
    slow = make_estimate(reasons=(SHORT,), firing_size=0.25)
    assert invalid_sentence(slow, slow.reasons).endswith(f"(virial ratio 0.40): more draws. {budget}")


def test_of_chains_that_run_downhill_more_draws_are_not_advised():
    downhill = "negative beyond its error: the weights are not at a minimum (chains run downhill)"
    both, mixing = make_estimate(step=10, reasons=(NOT_MIXED, downhill)), make_estimate(step=20, reasons=(NOT_MIXED,))
    assert [remark.text for remark in diagnostics([both])] == [
        "Chains disagree with each other (step 10).",
        "Chains ran downhill: the weights were at no minimum (step 10). Usual early in training, at a saddle, "
        "while the learning rate is large, and under strong weight decay.",
    ]
    assert "More draws (num_draws)" in diagnostics([both, mixing])[0].text
