"""How a command prints what it tells: in colour in a terminal, plain where the output is a file."""

from __future__ import annotations

import argparse
import io
import sys
from typing import Any


def add_color(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-color", action="store_true", help="plain text, as where the output is a file")


def display(told: Any, no_color: bool) -> None:
    """Prints what rich can print.

    Args:
        told: a renderable.
        no_color: plain in a terminal too.
    """
    from rich.console import Console

    # a terminal without these letters shows question marks, and no traceback
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    Console(no_color=True if no_color else None, highlight=False).print(told)
