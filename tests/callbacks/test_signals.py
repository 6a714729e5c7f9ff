"""Signals of a scheduler wait while a firing lasts, and no others do."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from lightning_slt.callbacks.signals import BrokenOffError, SignalsHeld


@pytest.fixture
def answered() -> Iterator[list[int]]:
    """The signals that a handler for SIGUSR1 was told of."""
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    yield heard
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_is_answered_once_on_the_way_out(answered: list[int]) -> None:
    handler = signal.getsignal(signal.SIGUSR1)
    with SignalsHeld() as held:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert answered == []
        with pytest.raises(BrokenOffError, match="SIGUSR1 came"):
            held.check()
    assert answered == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_a_signal_is_answered_where_the_firing_fails(answered: list[int]) -> None:
    def fire() -> None:
        with SignalsHeld():
            signal.raise_signal(signal.SIGUSR1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fire()
    assert answered == [signal.SIGUSR1]


def test_ctrl_c_and_what_no_python_code_answers_are_left_alone() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR2)]
    assert handlers[1] == signal.SIG_DFL
    with SignalsHeld():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR2)] == handlers


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A job in the background begins with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_where_other_ranks_wait_for_the_chains(answered: list[int]) -> None:
    """It breaks off what else runs to its end, and comes last, since nothing is sent after what it raises."""

    def fire() -> None:
        with SignalsHeld(ranks=2) as held:
            held.check_interrupt()
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGUSR1)
            assert held.interrupted
            with pytest.raises(BrokenOffError, match="SIGINT came"):
                held.check_interrupt()

    with pytest.raises(KeyboardInterrupt):
        fire()
    assert answered == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_does_not_end_the_run_does_not_wait() -> None:
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        handler = signal.getsignal(signal.SIGINT)
        with SignalsHeld(ranks=2):
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_hold_nothing(answered: list[int]) -> None:
    """Python lets the main thread alone answer signals."""
    inside: list[bool] = []

    def work() -> None:
        with SignalsHeld() as held:
            held.check()
            inside.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [True] and answered == []
