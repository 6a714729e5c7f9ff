"""Time to a given error: ``python benchmarks/accuracy.py`` prints one markdown table per case.

The truths are those of ``tests/cases/references.json``: long Metropolis-adjusted runs on the same weights, data, nbeta
and localisation. Every tool runs a small grid of step sizes and lengths over a few seeds; a setting counts as reaching
10 % (5 %) if the root mean square of its error over the seeds, bias and spread together, is within that share of the
truth. Reported is the cheapest such setting: the tool at its best, with a step size that its user would have to find
first. "Staying" asks that the same step size is as good at every greater length that was tried: else a step that heats
is credited for the moment at which heat and missing burn-in cancel. The tools take turns, setting by setting.
"ours-calibrated" finds its own and is given only the number of draws and the tolerance; "ours-warm" is the firing after
such a one on the same weights. Seeds share a process, and the time of a setting is the median over its seeds:
compilation counts for nothing here.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exports import ACCURACY_CASES, ROOT
from launch import TOOLS, RunFailedError, launch

REFERENCES = ROOT / "tests" / "cases" / "references.json"
REFERENCE_OF = {"digits": "digits-mlp-gamma100", "rrr": "rrr-8-4-8-r2", "transformer": "transformer"}
STEP_SIZES = {
    "digits": [3e-5, 1e-4, 2e-4, 4e-4],
    "rrr": [2e-4, 6e-4, 2e-3, 6e-3],
    "transformer": [3e-4, 1e-3, 2e-3, 4e-3],
}
LENGTHS = [(0, 100), (100, 100), (200, 200), (500, 500), (1000, 1000), (2000, 2000)]
"""(burn-in steps, draws) of each chain, shortest first."""
DRAWS_CALIBRATED = [25, 50, 100, 200]
TOLERANCES = ["10%", "5%", "3%"]
"""Standard errors at which a tool that stops by itself is asked to; in place of the step sizes of the others."""
SELF_TUNED = ("ours-calibrated", "ours-warm")
DEFAULT_TOOLS = ["ours-calibrated", "ours-warm", "canonical-eager", "canonical", "devinterp1", "devinterp2-plain"]


@dataclass(frozen=True)
class Setting:
    """One point of a tool's grid and how it did over the seeds."""

    lr: float | None
    burnin: int
    draws: int
    seconds: float
    bias: float
    spread: float
    rmse: float
    tolerance: str | None = None

    def __str__(self) -> str:
        if self.lr is None:
            return f"tolerance {self.tolerance}, {self.draws} draws"
        return f"lr {self.lr:g}, {self.burnin}+{self.draws}"


def judge(rows: list[dict[str, Any]], truth: float, clock: str, lr: float | None) -> Setting:
    """Bias, spread and root mean square error over the seeds; infinite where an estimate is not finite."""
    values = [row["llc"] for row in rows]
    finite = all(math.isfinite(value) for value in values)
    bias = statistics.fmean(values) - truth if finite else math.inf
    rmse = math.sqrt(statistics.fmean([(value - truth) ** 2 for value in values])) if finite else math.inf
    return Setting(
        lr=lr,
        burnin=rows[0]["burnin"],
        draws=rows[0]["draws"],
        seconds=statistics.median(row[clock] for row in rows),
        bias=bias,
        spread=statistics.stdev(values) if finite and len(values) > 1 else math.inf,
        rmse=rmse,
        tolerance=rows[0]["tolerance"],
    )


def cheapest(settings: list[Setting], error: float, lasting: bool) -> Setting | None:
    """The least time among the settings whose error is small enough.

    Args:
        lasting: only those that stay within the error at every greater length that was tried (one at least): a chain
            too hot and too short can be right for a moment, as its two errors have opposite signs.
    """

    def counts(setting: Setting) -> bool:
        same = [s for s in settings if (s.lr, s.tolerance) == (setting.lr, setting.tolerance)]
        longer = [s for s in same if s.burnin + s.draws > setting.burnin + setting.draws]
        held = bool(longer) and all(s.rmse <= error for s in longer)
        return setting.rmse <= error and (held or not lasting)

    return min(filter(counts, settings), key=lambda s: s.seconds, default=None)


def table(case: str, truth: float, truth_se: float, results: dict[str, list[Setting]]) -> str:
    """One case as markdown."""
    lines = [
        f"### {case}: {truth:.2f} +- {truth_se:.2f}",
        "",
        "| tool | s to 10 % | at | s to 5 % | at | s to 10 %, staying | at | s to 5 %, staying | at "
        "| least error | at |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for tool, settings in results.items():
        cells = [tool]
        for lasting, share in ((False, 0.10), (False, 0.05), (True, 0.10), (True, 0.05)):
            found = cheapest(settings, share * truth, lasting)
            cells += ["not reached", ""] if found is None else [f"{found.seconds:.2f}", str(found)]
        best = min(settings, key=lambda s: s.rmse, default=None)
        if best is None:
            cells += ["failed", ""]
        else:
            cells += [f"{best.rmse / truth:.1%} (bias {best.bias:+.2f}, spread {best.spread:.2f})", str(best)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(
    tool: str,
    case: str,
    truth: float,
    scratch: Path,
    seeds: list[int],
    chains: int,
    clock: str,
    limit: float,
    draws_calibrated: list[int],
    tolerances: list[str],
) -> Iterator[Setting]:
    """The grid of one tool, each step size from short to long until a run would take longer than ``limit`` seconds.

    One setting each time it is asked, so that the tools can take turns.
    """
    calibrated = tool in SELF_TUNED
    lengths = [(0, draws) for draws in draws_calibrated] if calibrated else LENGTHS
    rows_of: list[tuple[float | None, str | None]] = (
        [(None, tolerance) for tolerance in tolerances] if calibrated else [(lr, None) for lr in STEP_SIZES[case]]
    )
    for lr, tolerance in rows_of:
        per_step = 0.0
        for burnin, draws in lengths:
            if per_step * (burnin + draws) > limit and not calibrated:
                break
            try:
                rows = launch(
                    tool,
                    scratch / f"{case}.npz",
                    scratch,
                    chains=chains,
                    draws=draws,
                    burnin=burnin,
                    lr=lr,
                    seed=seeds,
                    tolerance=tolerance,
                )
            except RunFailedError as error:
                print(error, file=sys.stderr, flush=True)
                continue
            setting = judge(rows, truth, clock, lr)
            per_step = setting.seconds / (burnin + draws)
            print(
                f"{case} {tool} {setting}: {setting.seconds:.2f} s, bias {setting.bias:+.2f}, "
                f"spread {setting.spread:.2f}",
                file=sys.stderr,
                flush=True,
            )
            yield setting


def in_turns(grids: dict[str, Iterator[Setting]]) -> dict[str, list[Setting]]:
    """All settings of all tools, one setting of each tool after another: what disturbs the machine disturbs all."""
    results: dict[str, list[Setting]] = {tool: [] for tool in grids}
    while grids:
        for tool in list(grids):
            setting = next(grids[tool], None)
            if setting is None:
                del grids[tool]
            else:
                results[tool].append(setting)
    return results


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=ACCURACY_CASES, default=list(ACCURACY_CASES))
    parser.add_argument("--tools", nargs="+", choices=[t for t in TOOLS if t != "bare"], default=DEFAULT_TOOLS)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--max-seconds", type=float, default=30.0, help="longest single estimate that is tried")
    parser.add_argument(
        "--draws", type=int, nargs="+", default=DRAWS_CALIBRATED, help="of the tools that tune themselves"
    )
    parser.add_argument("--tolerances", nargs="+", default=TOLERANCES, help="the same, such as 5%%")
    parser.add_argument("--clock", choices=["seconds_total", "cpu_total"], default="seconds_total")
    arguments = parser.parse_args()
    references = json.loads(REFERENCES.read_text())

    print(f"{arguments.chains} chains, batch 64, {arguments.seeds} seeds, one thread; seconds are {arguments.clock}.\n")
    with tempfile.TemporaryDirectory(prefix="lightning-slt-bench-") as folder:
        scratch = Path(folder)
        for case in arguments.cases:
            reference = references.get(REFERENCE_OF[case])
            if reference is None:
                print(f"{case}: {REFERENCE_OF[case]} is not in {REFERENCES}; skipped", file=sys.stderr)
                continue
            ACCURACY_CASES[case](scratch)
            grids = {
                tool: measure(
                    tool,
                    case,
                    reference["mean"],
                    scratch,
                    list(range(arguments.seeds)),
                    arguments.chains,
                    arguments.clock,
                    arguments.max_seconds,
                    arguments.draws,
                    arguments.tolerances,
                )
                for tool in arguments.tools
            }
            print(table(case, reference["mean"], reference["se"], in_turns(grids)) + "\n", flush=True)


if __name__ == "__main__":
    main()
