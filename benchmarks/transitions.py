"""How well are transitions found? ``python benchmarks/transitions.py [--seeds 10] [--curves dev.npz] [--runs FOLDER]``.

Fresh synthetic curves, the recorded deep linear networks of the tests and, where a file is given, its curves (fields
``steps, llc, llc_se, loss, true_on, true_off, true_kind, kind``). A hit is an offline step within three points of the
10 % to 90 % stretch, or an online flag from one point before its onset to max(6, 10 % of the points) after its end.
With ``--runs`` those of folders that ``record_runs.py`` filled, and nothing else: as they are, and with boundaries in
the same direction whose middles are closer than six points counted as one; ``--peer`` puts PELT of ruptures beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_slt import Transition, TransitionDetector, detect_transitions
from lightning_slt.transitions.evidence import scatter
from tests.transitions.curves import KINDS, NULLS, Curve, hits, make, matched
from tests.transitions.stages import recorded


def from_file(path: str) -> dict[str, list[Curve]]:
    """The curves of a file, by kind."""
    out: dict[str, list[Curve]] = defaultdict(list)
    for c in np.load(path, allow_pickle=True)["curves"]:
        index = np.arange(len(c["steps"]))
        onset, end = (np.interp(c[name], c["steps"], index) for name in ("true_on", "true_off"))
        sign = np.array([1 if kind in "AD" else -1 for kind in c["true_kind"]])
        out[str(c["kind"])].append(Curve(c["steps"], c["llc"], c["llc_se"], c["loss"], onset, end, sign))
    return out


def from_folder(folder: Path, apart: float) -> dict[str, list[Curve]]:
    """The runs of a folder, by family; boundaries whose middles are less than ``apart`` points apart are one."""
    out: dict[str, list[Curve]] = defaultdict(list)
    for path in sorted(folder.glob("*_s*.npz")):
        c = np.load(path)
        index = np.arange(len(c["steps"]))
        places = (np.interp(c[name], c["steps"], index) for name in ("true_step", "true_on", "true_off"))
        merged: list[list[float]] = []  # middle of the newest, onset, end, sign
        for middle, onset, end, kind in sorted(zip(*places, c["true_kind"], strict=False), key=lambda each: each[0]):
            sign = 1.0 if kind in ("A", "D") else -1.0
            if merged and middle - merged[-1][0] < apart and merged[-1][3] == sign:
                merged[-1][:3] = middle, min(merged[-1][1], onset), max(merged[-1][2], end)
            else:
                merged.append([middle, onset, end, sign])
        _, onsets, ends, signs = np.array(merged).reshape(-1, 4).T
        out[path.name.rsplit("_s", 1)[0]].append(
            Curve(*(c[k] for k in ("steps", "llc", "llc_se", "loss")), onsets, ends, signs)
        )
    return out


def pelt(curves: list[Curve], penalty: float) -> float:
    """F1 of PELT (l2) on the coefficient in units of its scatter; steps in one direction within 8 points are one."""
    import ruptures

    taken = wrong = missed = 0
    for curve in curves:
        sigma = max(scatter(curve.llc), 0.3 * float(np.nanmedian(curve.llc_se)), 1e-9)
        values = np.clip(curve.llc, *np.percentile(curve.llc, [1, 99])) / sigma
        ends = ruptures.Pelt("l2", min_size=3, jump=1).fit(values[:, None]).predict(pen=penalty)
        means = [values[a:b].mean() for a, b in pairwise([0, *ends])]
        changes: list[list[float]] = []  # first and last place, sign
        for place, (before, after) in zip(ends, pairwise(means), strict=False):
            sign = float(np.sign(after - before))
            if changes and changes[-1][2] == sign and place - changes[-1][1] <= 8:
                changes[-1][1] = place
            else:
                changes.append([place, place, sign])
        some, _, others = hits(curve, [((a + b) / 2, int(sign)) for a, b, sign in changes], 3.0, 3.0)
        taken, wrong, missed = taken + some, wrong + others, missed + curve.onset.size - some
    return 2 * taken / max(1, 2 * taken + wrong + missed)


def found_in(curve: Curve, online: bool) -> list[Transition]:
    """What one detector finds."""
    if not online:
        return detect_transitions(curve.steps, curve.llc, curve.llc_se, curve.loss)
    detector, found = TransitionDetector(), []
    for point in zip(curve.steps, curve.llc, curve.llc_se, curve.loss, strict=True):
        found += detector.update(*map(float, point))
    return found


def flags_in(curve: Curve, online: bool) -> tuple[list[Transition], list[tuple[float, int]], tuple[float, float]]:
    """What one detector finds; the point at which each is raised or placed, and its sign; and how far from a boundary
    counts, in points before its onset and after its end."""
    found, n = found_in(curve, online), curve.steps.size
    at = [float(np.interp(t.known_at if online else t.step, curve.steps, np.arange(n))) for t in found]
    flags = [(place, int(np.sign(t.llc_change))) for place, t in zip(at, found, strict=True)]
    return found, flags, (1.0, max(6.0, 0.1 * n)) if online else (3.0, 3.0)


def report(name: str, kinds: dict[str, list[Curve]]) -> None:
    """Prints a table of both ways, by kind and in all."""
    for online in (False, True):
        totals, null_points, null_false, null_hit, nulls, delays = np.zeros(4), 0, 0, 0, 0, []
        seconds, points = 0.0, 0
        print(f"{name}, {'online' if online else 'offline'}")
        for kind, curves in kinds.items():
            row = np.zeros(4)
            for curve in curves:
                n, start = curve.steps.size, time.perf_counter()
                found, flags, (before, after) = flags_in(curve, online)
                seconds, points = seconds + time.perf_counter() - start, points + n
                taken, right, wrong = hits(curve, flags, before, after)
                row += taken, right, wrong, curve.onset.size - taken
                delays += [place - curve.onset[j] for (place, _), j in matched(curve, flags, before, after)]
                if curve.onset.size == 0:
                    nulls, null_points, null_hit = nulls + 1, null_points + n, null_hit + bool(found)
                    null_false += len(found)
            totals += row
            print(f"  {kind:22s} hits {row[0]:.0f} of {row[0] + row[3]:.0f}, false {row[2]:.0f}")
        taken, right, wrong, missed = totals
        print(
            f"  F1 {2 * taken / max(1, 2 * taken + wrong + missed):.3f}, direction {right / max(1, taken):.2f}", end=""
        )
        print(f", median delay {np.median(delays) if delays else np.nan:.1f} points", end="")
        print(f", {1e3 * seconds / points:.2f} ms a point", end="")
        if nulls:
            print(f"; null: {100 * null_false / null_points:.3f} in 100 points, {null_hit} of {nulls} curves", end="")
        print(flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--curves")
    parser.add_argument(
        "--runs", type=Path, nargs="+", help="folders that record_runs.py filled; nothing else is scored"
    )
    parser.add_argument("--peer", action="store_true", help="PELT of ruptures on those runs")
    arguments = parser.parse_args()
    for apart in (0.0, 6.0) if arguments.runs else ():
        runs: dict[str, list[Curve]] = defaultdict(list)
        for folder in arguments.runs:
            for family, curves in from_folder(folder, apart).items():
                runs[family] += curves
        report(f"recorded runs, boundaries closer than {apart:.0f} points are one" if apart else "recorded runs", runs)
        if arguments.peer:
            every = [curve for curves in runs.values() for curve in curves]
            print("PELT, penalty: F1", {each: round(pelt(every, each), 2) for each in (50, 300, 1000, 5000, 30000)})
    if arguments.runs:
        sys.exit()
    seeds = range(1000, 1000 + arguments.seeds)
    report("recorded deep linear networks", {"deep_linear": recorded()})
    report("fresh curves", {kind: [make(kind, seed) for seed in seeds] for kind in KINDS + NULLS})
    if arguments.curves:
        report(arguments.curves, from_file(arguments.curves))
