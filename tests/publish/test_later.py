"""Calls that may wait for a server do not make training wait."""

from __future__ import annotations

import threading

import pytest

from lightning_slt.publish.later import Later


def test_calls_are_made_in_order_beside_the_caller() -> None:
    later, gate, made = Later(), threading.Event(), []
    later(gate.wait)
    for k in range(3):
        later(lambda k=k: made.append((k, threading.current_thread() is threading.main_thread())))
    assert made == [] and not later.wait(0.05)
    gate.set()
    assert later.wait(10.0)
    assert made == [(0, False), (1, False), (2, False)]


def test_what_a_call_raised_is_raised_once_where_somebody_asks() -> None:
    later = Later()

    def fails() -> None:
        raise ConnectionError("no answer")

    later(fails)
    later(fails)
    assert later.wait(10.0)
    with pytest.raises(ConnectionError, match="no answer"):
        later.check()
    later.check()
