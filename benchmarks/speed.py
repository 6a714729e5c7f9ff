"""Speed and memory beside the peers: ``python benchmarks/speed.py`` prints one markdown table per case.

Every tool runs the same number of chain-steps at the same step size in a fresh process, the tools in turn (a noisy
machine then hurts all of them alike); the table gives medians over the repeats, as ratios to the bare
forward+backward loop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from exports import SPEED_CASES
from launch import TOOLS, RunFailedError, launch

DEFAULT_TOOLS = [tool for tool in TOOLS if not tool.startswith("ours-")]


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.median(values) if values else None


def _times(seconds: float | None, bare: float | None) -> str:
    return "-" if seconds is None or bare is None else f"{seconds / bare:.2f}"


COLUMNS = [
    "tool",
    "one estimate, x bare",
    "the very first, x bare",
    "warm, x bare",
    "warm, processor time, x bare",
    "chain-steps/s, warm, of bare",
    "min-max s",
    "peak memory MB",
    "LLC +- se",
]
LEGEND = """'One estimate': the first call of a fresh process, set-up and compilation included, imports not. 'The very
first': the same in repeat 0, where nothing is in the compiler's cache on disk. 'Warm': the same call once more in it.
'min-max': fastest to slowest first call. 'Peak memory': growth of the resident set in the first call. Medians."""


def table(case: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """One case as markdown: time and memory of every tool beside the bare loop."""
    bare = results.get("bare", [])
    bare_total = _median(bare, "seconds_total")
    bare_warm = _median(bare, "seconds_again") or bare_total
    bare_cpu = _median(bare, "cpu_again") or _median(bare, "cpu_total")
    lines = [f"### {case}", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for tool, rows in results.items():
        if not rows:
            lines.append(f"| {tool} | failed |" + " |" * (len(COLUMNS) - 2))
            continue
        again = _median(rows, "seconds_again")
        warm = _median(rows, "seconds_total") if again is None else again
        seconds = [row["seconds_total"] for row in rows]
        cells = [
            f"{tool} {rows[0]['version']}",
            _times(_median(rows, "seconds_total"), bare_total),
            _times(seconds[0], bare_total),
            _times(again, bare_warm),
            _times(_median(rows, "cpu_again"), bare_cpu),
            f"{bare_warm / warm:.2f}" if bare_warm and warm else "-",
            f"{min(seconds):.2f}-{max(seconds):.2f}",
            f"{_median(rows, 'peak_rss_delta_mb'):.0f}",
            "-" if tool == "bare" else f"{_median(rows, 'llc'):.2f} +- {_median(rows, 'se'):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, and keep every line where ``--output`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=SPEED_CASES, default=list(SPEED_CASES))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=DEFAULT_TOOLS)
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--again",
        choices=["all", "compiled", "none"],
        default="all",
        help="whose estimate to time a second time in the same process (warm): doubles the time of those runs",
    )
    parser.add_argument("--output", type=Path, help="append every measurement to this file, one JSON object a line")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="lightning-slt-bench-") as folder:
        scratch = Path(folder)
        results: dict[str, dict[str, list[dict[str, Any]]]] = {
            case: {tool: [] for tool in arguments.tools} for case in arguments.cases
        }
        for case in arguments.cases:
            SPEED_CASES[case](scratch)
        for repeat in range(arguments.repeats):
            for case in arguments.cases:
                for tool in arguments.tools:
                    again = arguments.again == "all" or (arguments.again == "compiled" and tool == "canonical")
                    try:
                        [row] = launch(
                            tool,
                            scratch / f"{case}.npz",
                            scratch,
                            threads=arguments.threads,
                            chains=arguments.chains,
                            draws=arguments.draws,
                            seed=repeat,
                            again=again,
                        )
                    except RunFailedError as error:
                        print(error, file=sys.stderr, flush=True)
                        continue
                    results[case][tool].append(row)
                    print(f"{repeat} {case} {tool}: {row['seconds_total']:.2f} s", file=sys.stderr, flush=True)
                    if arguments.output is not None:
                        with arguments.output.open("a") as lines:
                            lines.write(json.dumps(row) + "\n")
    print(
        f"{arguments.chains} chains x {arguments.draws} draws, {arguments.threads} thread(s), "
        f"{arguments.repeats} repeats, the tools in turn.\n{LEGEND}\n"
    )
    for case in arguments.cases:
        print(table(case, results[case]) + "\n")


if __name__ == "__main__":
    main()
