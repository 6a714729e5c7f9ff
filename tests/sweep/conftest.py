from __future__ import annotations

from pathlib import Path

import pytest

from lightning_slt.config import load
from lightning_slt.publish import publisher
from lightning_slt.sweep import SweepConfig
from tests.integration.harness import FIGURES
from tests.sweep import runs


@pytest.fixture
def config(tmp_path: Path) -> SweepConfig:
    return load(runs.settings(folder=str(tmp_path / "sweep")), schema=SweepConfig)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the run that a sweep is held against take longer than the run; a sweep itself draws none."""
    for name in FIGURES:
        monkeypatch.setattr(publisher, name, lambda *_, **__: None)
