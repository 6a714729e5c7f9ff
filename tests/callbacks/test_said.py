"""What a callback says: under its own name, and once a run."""

from __future__ import annotations

import pytest

from lightning_slt.callbacks.said import Voice


def test_a_failure_is_told_whole_once() -> None:
    voice = Voice("slt_head")
    who = r"^SLTMonitor \(slt_head\): the measurement at step"
    with pytest.warns(UserWarning, match=who + r" 3 failed and is left out; training goes on\. no loss$"):
        voice.failed(3, "no loss")
    with pytest.warns(UserWarning, match=who + r" 6 failed and is left out, for the reason given at step 3; "):
        voice.failed(6, "no loss")
    with pytest.warns(UserWarning, match=who + r" 9 failed and is left out; training goes on\. no data$"):
        voice.failed(9, "no data")
    voice.forget()
    with pytest.warns(UserWarning, match=who + r" 12 failed and is left out; training goes on\. no data$"):
        voice.failed(12, "no data")


def test_another_run_is_told_again() -> None:
    voice = Voice()
    assert [voice.first("full"), voice.first("full"), voice.first("method")] == [True, False, True]
    voice.forget()
    assert voice.first("full")
