"""``lightning-slt calibrate``: one firing ahead of a run, what it shows and what it costs."""

from __future__ import annotations

import argparse
import sys

from lightning_slt.cli.given import add_settings, settings_of
from lightning_slt.cli.output import add_color, display

NAME = "calibrate"
HELP = (
    "Measure once as a monitor would, before a long run: how the chains run, whether the estimate is valid, what a "
    "firing costs, and settings to start from. Exits with 3 where the estimate is not valid."
)
NOT_VALID = 3
"""The exit status of an estimate that was made and may not be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The weights, the settings and the file."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", help="a file; left out, the module as it is initialised"
    )
    add_settings(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="write the settings of a monitor there, as YAML")
    parser.add_argument(
        "--pin",
        action="store_true",
        help="with the step size, nbeta, batch size and path that were found, for runs to be the same in these; by "
        "default they are found anew in each run",
    )
    add_color(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints, writes; 3 where the estimate is not valid."""
    from pathlib import Path

    from lightning_slt.calibrate import calibrate, settings_text
    from lightning_slt.calibrate.terminal import told
    from lightning_slt.durable import write_durably
    from lightning_slt.sweep.checkpoint import SUFFIX

    if arguments.output is not None and Path(arguments.output).is_dir():
        raise ValueError(f"--output {arguments.output}: is a folder. Give the path of a YAML file.")
    for item in arguments.config[1:]:
        if item.endswith(SUFFIX):
            raise ValueError(f"{item}: a checkpoint stands before --config; after its file are settings as key=value.")
    config = settings_of(arguments)
    checkpoint = Path(arguments.checkpoint) if arguments.checkpoint is not None else None
    found = calibrate(config, checkpoint, lambda line: print(line, file=sys.stderr, flush=True))
    text = settings_text(found, arguments.pin)
    display(told(found), arguments.no_color)
    print(f"\nSettings of a monitor\n\n{text}", end="")
    if arguments.output is not None:
        write_durably(Path(arguments.output), lambda temporary: temporary.write_text(text, encoding="utf-8"))
        print(f"\n{arguments.output}: SLTMonitor, by lightning_slt.config.load({arguments.output!r}).build()")
    return 0 if found.estimate.valid else NOT_VALID
