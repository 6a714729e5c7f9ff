"""Where a filter makes errors of warnings, what is said while results are published ends no training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_slt import TransitionMonitor
from lightning_slt.publish import render
from tests.integration.harness import Scenario, steps_of, tiny_monitor
from tests.integration.models import Net, Plain, loaders
from tests.integration.probing import probing, refuses
from tests.integration.scripted import Scripted
from tests.integration.test_logging import BrokenLogger

STEPS = [4, 8, 12]


@pytest.fixture(autouse=True)
def as_errors() -> Iterator[None]:
    """Errors of all that is warned of in this package's name; Lightning has warnings of its own."""
    with warnings.catch_warnings():
        for of_ours in ("lightning_slt", "SLTMonitor", "TransitionMonitor", "render failed", "slt: transition"):
            warnings.filterwarnings("error", message=of_ours)
        yield


def logged(caplog: pytest.LogCaptureFixture, start: str) -> list[str]:
    return [r.levelname for r in caplog.records if r.getMessage().startswith(start)]


def test_a_logger_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = tiny_monitor()
    trace = Scenario(Net, loaders, lambda: {"logger": BrokenLogger()}).run(tmp_path, monitor)
    assert trace.trainer.global_step == 12 and steps_of(monitor) == STEPS
    assert logged(caplog, "lightning_slt could not publish to BrokenLogger: ConnectionError") == ["WARNING"]


def test_an_alert_of_a_transition(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    watch, logger = TransitionMonitor(), TensorBoardLogger(tmp_path / "tb")
    trace = Scenario(Plain, loaders, lambda: {"max_epochs": 10, "logger": logger}).run(tmp_path, Scripted(), watch)
    assert trace.trainer.global_step == 60 and len(watch.transitions) == 1
    assert logged(caplog, "slt: transition 0 at step 30, kind A: ") == ["WARNING"]
    assert logged(caplog, "lightning_slt could not publish") == []


def test_a_hook_that_shows_samples_and_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "_warned", set())
    monitor = probing(render=refuses)
    trace = Scenario(Net, loaders).run(tmp_path, monitor)
    assert trace.trainer.global_step == 12 and [i.step for i in monitor.influences] == STEPS
    assert logged(caplog, "render failed (") == ["WARNING"]
    assert monitor.folder is not None and list((monitor.folder / "samples").glob("*.txt"))


def test_settings_whose_place_is_taken(offline: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger: Any = WandbLogger(save_dir=offline, project="p")
    logger.experiment.config.update({"slt": "mine"})
    monitor = tiny_monitor()
    trace = Scenario(Net, loaders, lambda: {"logger": logger}).run(offline, monitor)
    assert trace.trainer.global_step == 12 and steps_of(monitor) == STEPS
    assert logged(caplog, "lightning_slt: 'slt' in the wandb run's config is not the monitor's") == ["WARNING"]
    assert logger.experiment.config["slt_settings"]["num_chains"] == monitor.estimates[0].num_chains
