"""How the defaults do over seeds, against what is known: `python -m benchmarks.defaults [case=seeds ...]`.

The first table of docs/choosing.md: `estimate_llc` with nothing given but the seed, or `--sampler NAME` besides, on
the cases of `tests/cases`, whose answers are closed forms or long exact chains (`tests/cases/references.json`). gamma
is the default one of a network, and that of the reference of the others. Where an error bar is true the distances
from the truth, in errors (the estimate's and the truth's together), have a root mean square of 1. One thread.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch

from lightning_slt import Estimate, estimate_llc
from tests.cases.make_references import load_references
from tests.cases.problems import CASES

SEEDS = {
    "digits-mlp-default": 40,
    "transformer-default": 8,
    "linear-6-6-6-6-r2-default": 40,
    "lstm": 20,
    "convnet-default": 8,
    "convnet-gamma100": 4,
    "rrr-8-4-8-r2": 40,
    "regular-10": 40,
}
BY_DEFAULT = {"digits-mlp-default", "transformer-default", "linear-6-6-6-6-r2-default", "lstm", "convnet-default"}
"""Cases whose reference is at the default gamma."""


def row(name: str, found: list[Estimate], truth: float, truth_se: float) -> str:
    """A line of the table."""
    means = [e.mean for e in found]
    errors = [math.hypot(e.se, truth_se) for e in found]
    distances = [(mean - truth) / error for mean, error in zip(means, errors, strict=True)]
    spread = statistics.stdev(means) if len(means) > 1 else math.nan
    cells = [
        name,
        f"{truth:.4g}" + (f" ± {truth_se:.2g}" if truth_se else " (exact)"),
        f"{statistics.fmean(means):.4g} ± {spread / math.sqrt(len(means)):.2g}",
        f"{statistics.fmean(e.se for e in found):.2g}",
        f"{spread:.2g}",
        f"{math.sqrt(statistics.fmean(z * z for z in distances)):.2f}",
        f"{sum(abs(z) <= 2 for z in distances)} of {len(found)}",
        f"{sum(e.valid for e in found)}",
        f"{statistics.median(e.num_burnin_steps + e.num_draws * e.num_steps_bw_draws for e in found):.0f}",
        f"{statistics.median(e.seconds for e in found):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Every case over its seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case=seeds", default=[f"{k}={v}" for k, v in SEEDS.items()])
    parser.add_argument("--sampler", help="name of one in place of the default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    references = load_references()
    sampler = {"name": arguments.sampler} if arguments.sampler else None
    columns = "case|truth|mean of the seeds|mean error|spread|rms of the distances|within two errors|valid|steps|s"
    print("| " + columns.replace("|", " | ") + " |\n|" + "---|" * 10)
    for text in arguments.cases:
        name, _, seeds = text.partition("=")
        case = CASES[name]()
        known = references.get(name, {})
        truth, truth_se = (known["mean"], known["se"]) if known else (case.truth, 0.0)
        localization = None if name in BY_DEFAULT else case.gamma
        found = [
            estimate_llc(case.module, case.dataset, case.loss_fn, localization=localization, sampler=sampler, seed=seed)
            for seed in range(int(seeds or SEEDS[name]))
        ]
        print(row(name, found, truth, truth_se), flush=True)


if __name__ == "__main__":
    main()
