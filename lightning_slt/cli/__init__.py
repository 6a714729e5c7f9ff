"""``lightning-slt``: what is done with a run that is measured, beside its training.

Each command is a module of this room with ``NAME``, ``HELP``, ``add_arguments(parser)`` and
``run(arguments) -> int``, listed in
:data:`COMMANDS`; it imports what is slow to import inside ``run``, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Optional

from lightning_slt import __version__

ABOUT = (
    "Tools for runs measured by lightning_slt: report, terminal view, wandb workspace, default settings, sweeps over "
    "checkpoints, one firing ahead of a run."
)
COMMANDS: tuple[str, ...] = ("calibrate", "config", "publish", "report", "show", "sweep")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    whole = argparse.ArgumentParser(prog="lightning-slt", description=ABOUT)
    whole.add_argument("--version", action="version", version=f"lightning_slt {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(module.NAME, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return whole


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0 where it went well, 1 where what was asked for could not be done (one line on stderr says
        why), 2 for a command line that cannot be understood, 3 for an estimate that is not valid (``calibrate``).
    """
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (OSError, ValueError) as error:
        print(f"lightning-slt {arguments.command}: {error}", file=sys.stderr)
        return 1
