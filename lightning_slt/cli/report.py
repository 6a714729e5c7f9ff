"""``lightning-slt report``: a run as one HTML file."""

from __future__ import annotations

import argparse

NAME = "report"
HELP = "Write the report of a run: one HTML file that needs no network, from the run's local record."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and the file."""
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="folder of the run or of its record (.../slt), or above the only run"
    )
    parser.add_argument("-o", "--output", help="the file to write (default: report.html in the run's slt folder)")
    parser.add_argument("--title", help="heading of the page (default: the names of the run's folders)")


def run(arguments: argparse.Namespace) -> int:
    """Writes the file and says where it is."""
    from lightning_slt.publish.html import write_report

    path = write_report(arguments.run_dir, arguments.output, arguments.title)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
