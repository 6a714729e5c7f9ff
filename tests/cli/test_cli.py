"""The command line itself."""

from __future__ import annotations

import argparse
import importlib

import pytest

from lightning_slt import __version__
from lightning_slt.cli import COMMANDS, main, parser


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_called_as_its_module(name: str) -> None:
    assert name == importlib.import_module(f"lightning_slt.cli.{name}").NAME


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["measure"])
    assert stop.value.code == 2
    assert "measure" in capsys.readouterr().err


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lightning_slt {__version__}\n"


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda command: "".join(command) or "all")
def test_help_is_plain_text_that_names_defaults_as_such(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "`" not in said
    for action in (action for action in parser()._actions if command and isinstance(action.choices, dict)):
        assert isinstance(action.choices, dict)
        for of_command in action.choices[command[0]]._actions:
            if "%(default)" in (of_command.help or ""):
                assert "(default: %(default)s)" in str(of_command.help)
            if isinstance(of_command, argparse._AppendAction):
                assert "repeatable" in str(of_command.help)
