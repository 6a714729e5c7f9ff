"""How far do the detector's two weights depend on the curves they are judged on?

``python benchmarks/cross_validate.py --runs FOLDER... [--curves dev.npz] [--folds 5] [--workers 2]``

Each fold's curves are scored with the weights of the evidence (``LARGEST``, ``HIDDEN`` of
``lightning_slt/transitions/search.py``) that are best on the other folds: those with the highest mean of the F1 scores,
offline and online, of the runs and of the curves. Hits are those of ``transitions.py``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from multiprocessing import Pool
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.transitions import flags_in, from_file, from_folder
from lightning_slt.transitions import newest, search
from tests.transitions.curves import Curve, hits

WEIGHTS = tuple(itertools.product((0.7, 0.85, 1.0), (0.25, 0.4, 0.6)))
"""Pairs of LARGEST and HIDDEN."""
MODES = ("offline", "online")


def scored(curve: Curve) -> np.ndarray:
    """Hits, false flags and missed transitions of a curve, ``[len(WEIGHTS), 2 modes, 3]``."""
    out = np.zeros((len(WEIGHTS), len(MODES), 3))
    for row, (largest, hidden) in zip(out, WEIGHTS, strict=True):
        for module in (search, newest):
            module.LARGEST, module.HIDDEN = largest, hidden
        for mode, online in enumerate((False, True)):
            _, flags, reach = flags_in(curve, online)
            taken, _, wrong = hits(curve, flags, *reach)
            row[mode] = taken, wrong, curve.onset.size - taken
    return out


def f1(counts: np.ndarray) -> np.ndarray:
    """F1 of hits, false flags and missed, ``[..., 3]``."""
    return 2 * counts[..., 0] / np.maximum(1, 2 * counts[..., 0] + counts[..., 1] + counts[..., 2])


def main(suites: dict[str, list[Curve]], folds: int, workers: int) -> None:
    """Prints the held-out scores, and the weights that each fold took.

    Args:
        suites: curves by suite, the curves of a kind one after another: each fold has some of each kind.
        folds: parts.
        workers: processes.
    """
    with Pool(workers) as pool:
        counts = {name: np.stack(pool.map(scored, curves, chunksize=4)) for name, curves in suites.items()}
    held_out = {name: np.zeros((len(MODES), 3)) for name in suites}
    for fold in range(folds):
        inside = {name: np.arange(len(each)) % folds == fold for name, each in counts.items()}
        others = np.stack([f1(each[~inside[name]].sum(axis=0)) for name, each in counts.items()])
        best = int(np.argmax(others.mean(axis=(0, 2))))
        print(f"fold {fold}: LARGEST, HIDDEN = {WEIGHTS[best]}")
        for name, each in counts.items():
            held_out[name] += each[inside[name], best].sum(axis=0)
    for name, each in counts.items():
        in_sample = f1(each.sum(axis=0))
        for mode, what in enumerate(MODES):
            print(
                f"{name}, {what}: held out {f1(held_out[name])[mode]:.3f}, in sample "
                f"{in_sample[:, mode].min():.3f} to {in_sample[:, mode].max():.3f} over the {len(WEIGHTS)} pairs"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="folders that record_runs.py filled")
    parser.add_argument("--curves", help="a file of curves, as transitions.py takes it")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    given: dict[str, list[Curve]] = {}
    if arguments.runs:
        families = [from_folder(folder, 0.0) for folder in arguments.runs]
        given["recorded runs"] = [curve for each in families for kind in each.values() for curve in kind]
    if arguments.curves:
        given["curves"] = [curve for kind in from_file(arguments.curves).values() for curve in kind]
    main(given, arguments.folds, arguments.workers)
