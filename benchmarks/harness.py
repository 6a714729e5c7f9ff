"""What the runners share: their arguments, the clock, the memory reading, and the one JSON line each prints.

Works in every environment (torch and numpy only). A runner's own imports lie at its top, so they are outside the
measured time; everything the estimate itself needs (loaders, copies, compilation, initial loss, files) is inside.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from models import Case, load_case


@dataclass(frozen=True)
class Settings:
    """The chain settings that every tool gets."""

    chains: int
    draws: int
    burnin: int
    lr: float
    seed: int
    variant: str
    tolerance: str | None = None
    """Of the tool that stops by itself: the standard error to reach, in per cent of the LLC."""

    @property
    def chain_steps(self) -> int:
        return self.chains * (self.draws + self.burnin)


@dataclass(frozen=True)
class Outcome:
    """What a tool says: its LLC and its standard error (spread of the chains over the square root of their number)."""

    llc: float
    se: float


@dataclass(frozen=True)
class Measurement:
    """One line of output."""

    tool: str
    version: str
    torch: str
    case: str
    seconds_total: float
    seconds_again: float | None
    """The same call a second time in the same process: what is left once everything is compiled and warm."""
    cpu_total: float
    """Processor time of the first call, all threads: what a busy machine distorts least."""
    cpu_again: float | None
    chain_steps: int
    peak_rss_delta_mb: float
    llc: float
    se: float
    threads: int
    lr: float
    burnin: int
    draws: int
    seed: int
    tolerance: str | None = None


Estimate = Callable[[Case, Settings], Outcome]


def _status_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found.group(1)) / 1024


def _start_peak() -> tuple[float, Callable[[], float]]:
    """Resident memory now, and a function that gives the peak since now (both in MB).

    Linux can reset the high-water mark, so that what the imports took does not hide what the estimate takes; elsewhere
    the mark of the whole process is read.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_mb("VmRSS"), lambda: _status_mb("VmHWM")
    except OSError:
        scale = 1024 if sys.platform != "darwin" else 1024**2

        def peak() -> float:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale

        return peak(), peak


def mean_and_se(per_chain: torch.Tensor) -> Outcome:
    """The estimate of a tool that reports one number per chain and their spread."""
    per_chain = per_chain.double()
    return Outcome(llc=per_chain.mean().item(), se=(per_chain.std() / len(per_chain) ** 0.5).item())


def run(tool: str, version: str, estimate: Estimate, prepare: Callable[[Case, Settings], None] | None = None) -> None:
    """Parse the arguments, measure ``estimate`` on the case, print one JSON line for each seed.

    Args:
        prepare: called before each measurement, outside of it.
    """
    parser = argparse.ArgumentParser(description=f"measure {tool} on one case")
    parser.add_argument("--case", type=Path, required=True, help="a .npz written by exports.py")
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--burnin", type=int, default=0)
    parser.add_argument("--lr", type=float, help="default: the case's own")
    parser.add_argument("--batch-size", type=int, help="default: the case's own")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="several: one call and one line each, in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", default="", help="a mode of the tool, where it has one")
    parser.add_argument("--tolerance", help="standard error to stop at, such as 5%% (the calibrated variants)")
    parser.add_argument("--again", action="store_true", help="measure the same call a second time as well")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    case = load_case(arguments.case)
    if arguments.batch_size is not None:
        case = Case(**{**vars(case), "batch_size": arguments.batch_size})
    for seed in arguments.seed:
        settings = Settings(
            chains=arguments.chains,
            draws=arguments.draws,
            burnin=arguments.burnin,
            lr=case.lr if arguments.lr is None else arguments.lr,
            seed=seed,
            variant=arguments.variant,
            tolerance=arguments.tolerance,
        )
        measurement = _measure(tool, version, estimate, case, settings, arguments.again, prepare)
        print(json.dumps(asdict(measurement)), flush=True)


def _measure(
    tool: str,
    version: str,
    estimate: Estimate,
    case: Case,
    settings: Settings,
    again: bool,
    prepare: Callable[[Case, Settings], None] | None = None,
) -> Measurement:
    if prepare is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(case, settings)
    before, peak = _start_peak()
    seconds: list[float] = []
    cpu: list[float] = []
    peak_mb = 0.0
    for _ in range(1 + again):
        start, cpu_start = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            outcome = estimate(case, settings)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
        peak_mb = peak_mb or peak() - before  # of the first call: a second one starts from what the first left
    return Measurement(
        tool=tool + (f"-{settings.variant}" if settings.variant else ""),
        version=version,
        torch=torch.__version__,
        case=case.name,
        seconds_total=seconds[0],
        seconds_again=seconds[1] if again else None,
        cpu_total=cpu[0],
        cpu_again=cpu[1] if again else None,
        chain_steps=settings.chain_steps,
        peak_rss_delta_mb=peak_mb,
        llc=outcome.llc,
        se=outcome.se,
        threads=torch.get_num_threads(),
        lr=settings.lr,
        burnin=settings.burnin,
        draws=settings.draws,
        seed=settings.seed,
        tolerance=settings.tolerance,
    )
