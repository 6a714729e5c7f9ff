"""Monitors whose firings are beside training, their workers, and what is left of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from tests.integration.harness import SLTMonitor, steps_of, tiny_monitor


def children(of: Optional[int] = None) -> list[int]:
    """Process ids of the children that live, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it has ended since
        if int(parent) == (of or os.getpid()) and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = set(children())
    yield
    assert set(children()) <= before


def beside(**changes: Any) -> SLTMonitor:
    """A tiny monitor in the background that leaves no firing out."""
    settings: dict[str, Any] = {"devices": ["cpu"], "when_full": "wait", "max_wait": 120.0, **changes}
    return tiny_monitor(execution="background", **settings)


def workers_of(monitor: SLTMonitor) -> list[int]:
    assert monitor._late is not None and monitor._late._beside._pool is not None
    return monitor._late._beside._pool.processes


def assert_same_estimates(ours: SLTMonitor, theirs: SLTMonitor, atol: float = 0.0) -> None:
    """The same points, to the last bit where nothing else is said."""
    assert steps_of(ours) == steps_of(theirs)
    for a, b in zip(ours.estimates, theirs.estimates, strict=True):
        torch.testing.assert_close(a.trace, b.trace, rtol=0.0, atol=atol)
        assert a.mean == pytest.approx(b.mean, rel=0.0, abs=atol)
        assert (a.x, a.epoch, a.init_loss, a.step_size) == (b.x, b.epoch, b.init_loss, b.step_size)


class Stalled(Callback):
    """Stops the workers while training goes on; to stand before the monitor, so that its end of training comes first.

    Args:
        monitor: whose workers.
        go_on: at the end of training, before the monitor waits for its results.
    """

    def __init__(self, monitor: SLTMonitor, go_on: bool = True) -> None:
        self.monitor, self.go_on = monitor, go_on

    def _signal(self, which: signal.Signals) -> None:
        for pid in workers_of(self.monitor):
            os.kill(pid, which)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self._signal(signal.SIGSTOP)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.go_on:
            self._signal(signal.SIGCONT)
