"""Calls that may wait for a server, made beside the run: one thread, in order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Optional

Call = Callable[[], object]


class Later:
    """A queue of calls and the thread that makes them.

    The thread is a daemon: a call that a server never answers does not keep the process. What a call raised is raised
    by :meth:`check`, in the thread that asks.
    """

    def __init__(self) -> None:
        self._calls: queue.Queue[Call] = queue.Queue()
        self._thread: Optional[threading.Thread] = None
        self._errors: list[Exception] = []

    def __call__(self, call: Call) -> None:
        """Make it when those before it are done; returns at once."""
        self._calls.put(call)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="lightning_slt publishes", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Raise what a call has raised since the last look; the first one where there are several."""
        if self._errors:
            first, self._errors = self._errors[0], []
            raise first

    def wait(self, seconds: float) -> bool:
        """Whether all calls were made within that time."""
        end = time.monotonic() + seconds
        while self._calls.unfinished_tasks:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call()
            except Exception as error:  # of a logger: it is told where somebody asks
                self._errors.append(error)
            finally:
                self._calls.task_done()
