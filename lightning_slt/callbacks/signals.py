"""Signals of a scheduler, and Ctrl-C where ranks measure together, held back while a firing lasts: what answers them
may write a checkpoint there and then."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Optional

NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
"""Those by which a scheduler says that a job has to go."""


class BrokenOffError(Exception):
    """A signal came in the middle of a firing, which ends so that it can be answered."""


class SignalsHeld:
    """Inside, signals that Python code answers wait; they are sent anew on the way out.

    Lightning answers the one by which SLURM announces the end of a job with a checkpoint, in the middle of whatever
    runs. In the middle of a firing the weights may be those of a chain (shards, a module that is called in place), and
    a rank that writes a checkpoint with the others would wait for one that waits for its chains.

    SIGINT is not held back in a single process, nor is what is answered by other means than a function in Python, nor
    anything outside of the main thread, which alone is told of signals.

    Args:
        ranks: that measure together. One that Ctrl-C takes out of its chains alone may wait for the others to write a
            checkpoint, while they wait for its chains: of several, Ctrl-C is held back as well where it ends the run.

    Example:
        >>> with SignalsHeld() as held:
        ...     held.check()
    """

    def __init__(self, ranks: int = 1) -> None:
        self._several = ranks > 1
        self._handlers: dict[signal.Signals, Any] = {}
        self._came: list[signal.Signals] = []

    @property
    def waits(self) -> bool:
        """Whether a signal has come that is to be answered."""
        return bool(self._came)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C waits, a KeyboardInterrupt on the way out."""
        return signal.SIGINT in self._came

    def check(self) -> None:
        """To be called now and then by what can be broken off.

        Raises:
            BrokenOffError: where a signal waits.
        """
        if self._came:
            raise BrokenOffError(f"{self._came[0].name} came, and is answered now and not when the chains have ended.")

    def check_interrupt(self) -> None:
        """The same for what must run to its end unless the run ends with it.

        Raises:
            BrokenOffError: where Ctrl-C waits.
        """
        if self.interrupted:
            self.check()

    def __enter__(self) -> SignalsHeld:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
            if self._several and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._handlers[signal.SIGINT] = signal.default_int_handler
            for number in self._handlers:
                signal.signal(number, self._hold)
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        # Ctrl-C last: nothing is sent after what it raises
        for number in sorted(dict.fromkeys(self._came), key=lambda number: number == signal.SIGINT):
            signal.raise_signal(number)

    def _hold(self, number: int, frame: Optional[FrameType]) -> None:
        self._came.append(signal.Signals(number))


__all__ = ["NAMES", "BrokenOffError", "SignalsHeld"]
