"""What is said of the cost of measuring: before, meanwhile and at the end, by a clock that only steps move."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.integration.harness import tiny_monitor
from tests.integration.timed import Clock, budgeted, said, scenario


def test_a_run_that_never_earned_a_firing_says_so(clock: Clock, tmp_path: Path) -> None:
    monitor = budgeted(0.05)
    (text,) = said(lambda: scenario(100).run(tmp_path, monitor))
    assert monitor.estimates == []
    assert text.startswith("SLTMonitor(max_overhead=0.05): nothing was measured.")
    assert "about 12 s, which 228 s of training earn, and training lasted 100 s" in text


@pytest.mark.parametrize("steps", [100, 300])
def test_a_run_is_told_early_when_its_first_firing_comes(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    """12 s for a firing at 1 s in 19: it may be beyond the run's end, which nobody should wait for to learn it."""
    monitor = budgeted(0.05)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        scenario(steps).run(tmp_path, monitor)
    (text,) = [text for text in caplog.messages if "first firing" in text]
    assert text.startswith("SLTMonitor(max_overhead=0.05): the first firing comes at about step 228")
    assert f"(this run has {steps}); a larger max_overhead" in text
    assert [abs(estimate.step - 228) <= 1 for estimate in monitor.estimates[:1]] == [True] * (steps > 228)


def test_a_run_without_candidates_does_not_blame_the_budget(clock: Clock, tmp_path: Path) -> None:
    assert said(lambda: scenario(5).run(tmp_path, budgeted(0.05, at_steps=[50]))) == []


def test_a_cadence_that_takes_much_of_the_run_says_once_that_there_is_a_budget(clock: Clock, tmp_path: Path) -> None:
    (text,) = said(lambda: scenario(24).run(tmp_path, tiny_monitor(every_n_train_steps=4)))
    assert "of this run's wall-clock so far. Measure more seldom, or with fewer num_chains or num_draws." in text
    assert "max_overhead=0.05" in text and "10,000 batches" in text and "may measure nothing" in text


def test_what_is_said_ends_no_run_where_warnings_are_errors(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = tiny_monitor(every_n_train_steps=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SLTMonitor", category=UserWarning)
        trace = scenario(24).run(tmp_path, monitor)
    assert trace.num_batches == 24 and len(monitor.estimates) == 6
    (told,) = [record for record in caplog.records if "of this run's wall-clock so far" in record.message]
    assert told.levelname == "WARNING" and told.message.startswith("SLTMonitor: measuring has taken ")
    assert said(lambda: scenario(12).run(tmp_path, tiny_monitor(every_n_train_steps=4))) == []  # three prove nothing
    clock.chain_step = 0.01
    assert said(lambda: scenario(24).run(tmp_path, tiny_monitor(every_n_train_steps=4))) == []


@pytest.mark.parametrize(("steps", "large"), [(24, True), (400, False)])
def test_firings_close_together_at_first_prove_nothing_of_a_long_run(
    clock: Clock, tmp_path: Path, steps: int, large: bool
) -> None:
    """Four of some 24 s beside steps of 1 s are nearly all of the wall-clock after the fourth step."""
    monitor = tiny_monitor(every_n_train_steps=None, at_steps=[1, 2, 3, 4])
    texts = said(lambda: scenario(steps).run(tmp_path, monitor))
    seconds = monitor.state_dict()["seconds"]
    so_far, at_end = seconds / (seconds + 4), seconds / (seconds + steps)
    assert so_far > 0.9 and (at_end > 0.25) == large
    expected = (
        f"{so_far:.0%} of this run's wall-clock so far, and will have taken about {at_end:.0%} at its end. Measure"
    )
    assert [expected in text for text in texts] == [True] * large


@pytest.mark.parametrize(("steps", "said_first"), [(12, False), (24, True)])
def test_the_first_of_long_firings_says_how_many_are_due(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, said_first: bool
) -> None:
    """Of 26 s each; two more are less than a minute."""
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        scenario(steps).run(tmp_path, tiny_monitor(every_n_train_steps=4))
    due = "SLTMonitor: this firing took 26 s, and about 5 more are due in this run. "
    assert [text.startswith(due) for text in caplog.messages if " are due " in text] == [True] * said_first


@pytest.mark.parametrize(("steps", "took"), [(12, "1 min 10 s"), (24, "2 min 16 s")])
def test_it_is_said_at_the_end_what_measuring_took(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, took: str
) -> None:
    """Beside steps of 1 s, and also where too few firings came for a warning."""
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        scenario(steps).run(tmp_path, tiny_monitor(every_n_train_steps=4))
    assert f"SLTMonitor: measuring cost this run {took}, 85% of its wall-clock" in caplog.messages
