"""What a callback says: under its own name, and once a run."""

from __future__ import annotations

import warnings

import pytest

from lightning_slt import SLTMonitor
from lightning_slt.callbacks.remarks import say_how, say_what_is_due
from lightning_slt.callbacks.said import Voice
from lightning_slt.callbacks.turns import Ahead
from lightning_slt.record import Estimate
from tests.publish.helpers import make_estimate


def test_a_failure_is_told_whole_once() -> None:
    voice = Voice("slt_head")
    who = r"^SLTMonitor \(slt_head\): the measurement at step"
    with pytest.warns(UserWarning, match=who + r" 3 failed and is left out; training goes on\. no loss$"):
        voice.failed(3, "no loss")
    with pytest.warns(UserWarning, match=who + r" 6 failed and is left out, for the reason given at step 3; "):
        voice.failed(6, "no loss")
    with pytest.warns(UserWarning, match=who + r" 9 failed and is left out; training goes on\. no data$"):
        voice.failed(9, "no data")
    for step, said in (
        (11, r" 11 failed and is left out\. SIGTERM came$"),
        (12, r", for the reason given at step 11\.$"),
    ):
        with pytest.warns(UserWarning, match=said):
            voice.failed(step, "SIGTERM came", goes_on=False)
    assert voice.failures == [3, 6, 9, 11, 12]
    voice.forget()
    assert voice.failures == []
    with pytest.warns(UserWarning, match=who + r" 12 failed and is left out; training goes on\. no data$"):
        voice.failed(12, "no data")


def test_all_that_a_broken_background_leaves_out_has_failed() -> None:
    """Said once, and counted each time."""
    monitor = SLTMonitor(every_n_train_steps=4, execution="background", devices=["cpu"])
    late, voice = monitor._late, monitor._voice
    assert late is not None
    with pytest.warns(UserWarning, match="step 4 failed and is left out; training goes on. So are all"):
        late._say_broken(4, "the worker died.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (8, 12):
            late._say_broken(step, "the worker died.")
    assert voice.failures == [4, 8, 12]


@pytest.mark.parametrize(("firings", "due"), [(1, "1 more is due"), (1_000, "1,000 more are due")])
def test_what_is_due_is_counted(firings: int, due: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        say_what_is_due(Voice(), 70.0, Ahead(firings, 0.5))
    assert f"SLTMonitor: this firing took 1 min 10 s, and about {due} in this run. Later" in caplog.text


def test_another_run_is_told_again() -> None:
    voice = Voice()
    assert [voice.first("full"), voice.first("full"), voice.first("method")] == [True, False, True]
    voice.forget()
    assert voice.first("full")


@pytest.mark.parametrize(
    ("estimate", "said"),
    [
        (
            make_estimate(num_chains=1, num_weights=1, num_samples=None, method="sequential"),
            "1 sequential chain over 1 weight (there is one chain), n = not known, nbeta = 100.0, localization",
        ),
        (
            make_estimate(num_weights=124_439_808, num_samples=1_000_000, method="batched", nbeta=72382.4),
            "4 batched chains over 124,439,808 weights (there is one chain), n = 1,000,000, nbeta = 72,380,",
        ),
    ],
    ids=["one", "many"],
)
def test_how_it_measures_is_said_in_numbers_that_can_be_read(
    estimate: Estimate, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        say_how(Voice(), 4, estimate.replace(method_reason="there is one chain"), None)
    assert f"SLTMonitor: {said}" in caplog.text
