from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from lightning_slt.callbacks import clock as clock_module
from lightning_slt.publish import publisher
from tests.integration import models
from tests.integration.harness import FIGURES
from tests.integration.timed import Clock, Timed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ranks run while the other worker of xdist is busy elsewhere: one test of each file first, the rest last."""
    first, last, others = [], [], []
    for item in items:
        name = item.path.name
        if name not in ("test_ddp.py", "test_fsdp.py"):
            others.append(item)
        elif not any(name == other.path.name for other in first):
            first.append(item)
        else:
            last.append(item)
    items[:] = [*first, *others, *last]


@pytest.fixture(autouse=True)
def _one_quiet_process() -> Iterator[None]:
    """One thread (sums in one order), no chatter, nothing left over from another test, no process left behind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models.CHAIN_SAW.clear()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Lightning's advice on loaders and scheduler order, true of every small test
        warnings.filterwarnings("ignore", message=".*(does not have many workers|smaller than the logging interval).*")
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)
    for child in multiprocessing.active_children():
        child.join(timeout=5)
    assert multiprocessing.active_children() == []


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are made safe from a loss of power, which no test here has: 10 ms each."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes ten times as long as the smallest chains: left out where a test does not ask for ``pictures``."""
    if "pictures" not in request.fixturenames:
        for name in FIGURES:
            monkeypatch.setattr(publisher, name, lambda *_, **__: None)


@pytest.fixture
def pictures() -> None:
    """Asks for the pictures of each estimate to be drawn."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What the monitor and :class:`Timed` have for a clock."""
    clock = Clock()
    monkeypatch.setattr(clock_module, "time", clock)
    monkeypatch.setattr(Timed, "clock", clock)
    return clock
