"""``lightning-slt show``: the story of a run in a terminal."""

from __future__ import annotations

import argparse

from lightning_slt.cli.output import add_color, display

NAME = "show"
HELP = (
    "Show what a run showed, in the terminal: estimates, transitions, suspects, susceptibility, diagnostics and cost."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and how much of it."""
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="folder of the run or of its record (.../slt), or above the only run"
    )
    parser.add_argument(
        "--rows", type=int, default=20, metavar="N", help="estimates in the table (default: %(default)s)"
    )
    add_color(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the story."""
    if arguments.rows < 1:
        raise ValueError(f"--rows={arguments.rows}: must be at least 1.")
    from lightning_slt.publish.run import load_run
    from lightning_slt.publish.terminal import story

    display(story(load_run(arguments.run_dir), arguments.rows), arguments.no_color)
    return 0
