"""Starts one runner in its tool's environment, in a process of its own, and reads the line it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Tool:
    """A row of the tables: a runner, its environment (None: the one that runs the driver), and a mode of it."""

    runner: str
    environment: str | None = None
    variant: str = ""

    def command(self) -> list[str]:
        python = sys.executable
        if self.environment is not None:
            python = str(HERE / ".envs" / self.environment / "bin" / "python")
        command = [python, str(HERE / "runners" / f"{self.runner}.py")]
        return [*command, "--variant", self.variant] if self.variant else command


TOOLS: dict[str, Tool] = {
    "bare": Tool("bare"),
    "ours": Tool("ours"),
    "ours-calibrated": Tool("ours", variant="calibrated"),
    "ours-warm": Tool("ours", variant="warm"),
    "ours-sequential": Tool("ours", variant="sequential"),
    "ours-batched": Tool("ours", variant="batched"),
    "canonical": Tool("canonical", "canonical"),
    "canonical-eager": Tool("canonical", "canonical", "eager"),
    "devinterp1": Tool("devinterp1", "devinterp1"),
    "devinterp2": Tool("devinterp2", "devinterp2"),
    "devinterp2-plain": Tool("devinterp2", "devinterp2", "plain"),
}
INFLUENCE_TOOLS: dict[str, Tool] = {
    "ours": Tool("influence_ours"),
    "ours-plain": Tool("influence_ours", variant="1"),
    "ekfac": Tool("influence_ekfac", "kronfluence"),
    "devinterp2-bif": Tool("influence_bif", "devinterp2"),
    "exact": Tool("influence_ggn"),
}


class RunFailedError(RuntimeError):
    """A runner ended without a measurement; the message is the end of what it said."""


def launch(
    tool: str,
    case: Path,
    scratch: Path,
    *,
    threads: int = 1,
    timeout: float = 1800,
    tools: dict[str, Tool] = TOOLS,
    **options: Any,
) -> list[dict[str, Any]]:
    """Run one of the tools on one case; one measurement for each line that it prints.

    ``options`` become ``--name value`` (True: a bare ``--name``; None or False: left out; a list: several values). Each
    tool has an inductor cache of its own in ``scratch``, empty at the start of a driver's run: its first run of a shape
    compiles, the later ones find the kernels (and still pay for the tracing).
    """
    chosen = tools[tool]
    command = [*chosen.command(), "--case", str(case), "--threads", str(threads)]
    for name, value in options.items():
        if value is True:
            command.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            values = value if isinstance(value, (list, tuple)) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent) if chosen.environment is None else "",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / f"inductor-{tool}"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TMPDIR": str(scratch),
        "PYTHONWARNINGS": "ignore",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
    }
    if chosen.environment is not None and not Path(command[0]).exists():
        raise RunFailedError(
            f"{tool}: no environment at {command[0]}; make it with benchmarks/make_envs.sh {chosen.environment}"
        )
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=HERE, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RunFailedError(f"{tool} on {case.stem}: still running after {timeout:g} s") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        raise RunFailedError(f"{tool} on {case.stem}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in lines]
