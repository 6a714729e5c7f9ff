"""The command line itself."""

from __future__ import annotations

import importlib

import pytest

from lightning_slt.cli import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_called_as_its_module(name: str) -> None:
    assert name == importlib.import_module(f"lightning_slt.cli.{name}").NAME


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["measure"])
    assert stop.value.code == 2
    assert "measure" in capsys.readouterr().err
