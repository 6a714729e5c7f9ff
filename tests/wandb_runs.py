"""Offline runs of wandb, read back with wandb's own reader (``wandb leet inspect --json``)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def inspect(run_folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(run_folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def records(run_folder: Path) -> list[dict[str, Any]]:
    """Every record of a run that has ended; ``finish`` can return before its file says so."""
    for _ in range(20):
        found = [json.loads(line) for line in inspect(run_folder).splitlines()]
        if any(record["type"] == "exit" for record in found):
            return found
        time.sleep(0.5)
    raise AssertionError(f"no exit record in {run_folder}")
