"""Influence beside the peers: does it predict what retraining shows? ``python benchmarks/influence.py``.

For each case some networks are trained on all the data, and every tool scores the influence of the training samples on
the queries at each of them. The linear datamodelling score (see ``retraining.py``) compares that with a thousand
networks that were trained on halves. A tool with settings to choose is shown at its best one for each case, chosen by
the score itself: better than its user could do. Printed: scores, and the processor time of a network in that of
EK-FAC.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from influence_harness import PREPARATION
from launch import INFLUENCE_TOOLS, RunFailedError, launch
from retraining import QUERIES, TRAIN, Retrained, load_digits, write_cases

CASES = {"clean": 0.0, "flipped": 0.1}
"""Share of the training labels that are wrong."""

Found = dict[str, dict[str, list[tuple[float, float]]]]
"""Score and seconds of each network, by tool and setting."""


def measure(
    case: str, paths: list[Path], retrained: Retrained, tools: list[str], scratch: Path, threads: int, timeout: float
) -> Found:
    """All tools on all networks of a case, the tools in turn."""
    found: Found = {tool: defaultdict(list) for tool in tools}
    for path in paths:
        for tool in tools:
            output = scratch / f"{tool}-{path.stem}.npz"
            try:
                lines = launch(
                    tool, path, scratch, threads=threads, timeout=timeout, tools=INFLUENCE_TOOLS, output=output
                )
            except RunFailedError as error:
                print(error, file=sys.stderr, flush=True)
                continue
            before = sum(line["seconds"] for line in lines if line["label"] == PREPARATION)
            with np.load(output) as scores:
                for line in lines:
                    if line["label"] != PREPARATION:
                        score = retrained.lds(scores[line["label"]])
                        found[tool][line["label"]].append((score, before + line["seconds"]))
            best = max(values[-1][0] for values in found[tool].values())
            print(f"{path.stem} {tool}: {best:.3f}", file=sys.stderr, flush=True)
    return found


def best(settings: dict[str, list[tuple[float, float]]]) -> tuple[str, float, float]:
    """The setting of the highest mean score, that score, and the median of its seconds."""
    means = {label: float(np.nanmean([score for score, _ in rows])) for label, rows in settings.items() if rows}
    label = max(means, key=lambda name: means[name])
    return label, means[label], statistics.median(seconds for _, seconds in settings[label])


def main() -> None:
    """Retrain, measure, and print one markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tools", nargs="+", choices=INFLUENCE_TOOLS, default=list(INFLUENCE_TOOLS))
    parser.add_argument("--models", type=int, default=3, help="networks to score")
    parser.add_argument("--subsets", type=int, default=100, help="random halves to retrain on")
    parser.add_argument("--seeds", type=int, default=10, help="retrained networks of each half")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    columns: dict[str, Found] = {}
    with tempfile.TemporaryDirectory(prefix="lightning-slt-bench-") as folder:
        scratch = Path(folder)
        for case in arguments.cases:
            data = load_digits(TRAIN, QUERIES, CASES[case])
            begin = time.perf_counter()
            retrained = Retrained.of(data, arguments.subsets, arguments.seeds)
            seconds = time.perf_counter() - begin
            print(f"{case}: retrained in {seconds:.0f} s, ceiling {retrained.ceiling():.3f}", file=sys.stderr)
            paths = write_cases(scratch, case, data, arguments.models)
            columns[case] = measure(
                case, paths, retrained, arguments.tools, scratch, arguments.threads, arguments.timeout
            )
    print(
        f"Linear datamodelling score, means over {arguments.models} networks, {arguments.subsets} halves x "
        f"{arguments.seeds} seeds, {arguments.threads} thread(s); in brackets processor time of a network in that of "
        "EK-FAC at its best setting, and the setting.\n"
    )
    print("| | " + " | ".join(arguments.cases) + " |\n|---|" + "---|" * len(arguments.cases))
    for tool in arguments.tools:
        cells = []
        for case in arguments.cases:
            if not columns[case][tool]:
                cells.append("failed")
                continue
            label, score, seconds = best(columns[case][tool])
            beside = columns[case].get("ekfac")
            ratio = f"{seconds / best(beside)[2]:.2f}" if beside else f"{seconds:.1f} s"
            cells.append(f"{score:.3f} ({ratio}{'; ' + label if label else ''})")
        print(f"| {tool} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
