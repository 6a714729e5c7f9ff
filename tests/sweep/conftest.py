from __future__ import annotations

from pathlib import Path

import pytest

from lightning_slt.config import load
from lightning_slt.sweep import SweepConfig
from tests.sweep import runs


@pytest.fixture
def config(tmp_path: Path) -> SweepConfig:
    return load(runs.settings(folder=str(tmp_path / "sweep")), schema=SweepConfig)
