"""The three files of docs/configuration.md build the callbacks that they name, by the libraries that they are for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Callback
from lightning.pytorch.cli import LightningCLI

from lightning_slt import RMSpropSGLD, SLTMonitor, TransitionMonitor
from lightning_slt.config import RunConfig, load
from tests.docs.names import TinyModule
from tests.docs.test_code_blocks import ROOT

PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
FILES = {name: text for text, name in re.findall(r"```yaml\n(# (\S+)\n.*?)```", PAGE, re.DOTALL)}


def check(monitor: Callback, transitions: Callback) -> None:
    assert isinstance(monitor, SLTMonitor) and isinstance(transitions, TransitionMonitor)
    assert isinstance(monitor._asked.settings.sampler, RMSpropSGLD)
    assert transitions._settings["min_change"] == 2.0


def test_a_whole_run() -> None:
    built = load(yaml.safe_load(FILES["run.yaml"]), schema=RunConfig).build()
    assert [type(c) for c in built] == [SLTMonitor] * 3 + [TransitionMonitor] * 3


def test_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.yaml").write_text(FILES["lightning_cli.yaml"])
    arguments = ["--config", "file.yaml", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    keep = {"save_config_callback": None, "seed_everything_default": False}
    cli = LightningCLI(TinyModule, args=arguments, run=False, **keep)
    callbacks: list[Any] = [c for c in cli.trainer.callbacks if isinstance(c, (SLTMonitor, TransitionMonitor))]  # type: ignore[attr-defined]
    check(*callbacks)


def test_hydra() -> None:
    hydra = pytest.importorskip("hydra")
    described = yaml.safe_load(FILES["hydra_target.yaml"])["callbacks"]
    check(*(hydra.utils.instantiate(one) for one in described.values()))
