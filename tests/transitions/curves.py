"""Synthetic curves with known transitions, in the manner of recorded ones; fresh for every seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_slt import Transition, TransitionDetector, detect_transitions

KINDS = ("stair", "ramp", "fall", "mixed", "short")
NULLS = ("null_flat", "null_rise", "null_power", "null_miscalibrated", "null_autocorrelated", "null_burnin")


@dataclass(frozen=True)
class Curve:
    steps: np.ndarray
    llc: np.ndarray
    llc_se: np.ndarray
    loss: np.ndarray
    onset: np.ndarray  # in points
    end: np.ndarray
    sign: np.ndarray


def _grid(rng: np.random.Generator, n: int) -> np.ndarray:
    kind = rng.integers(4)
    if kind == 0:
        return np.arange(n) * float(rng.integers(5, 500))
    if kind == 1:
        return np.unique(np.round(np.geomspace(10, 10 ** rng.uniform(4, 5.3), n)))
    gaps = rng.uniform(0.3, 1.7, n) if kind == 2 else rng.exponential(1.0, n) + 0.05
    return np.cumsum(gaps * rng.integers(20, 500))


def make(kind: str, seed: int) -> Curve:
    """One curve; noise is Student's t with 5 degrees of freedom, 1 % of the points are spikes."""
    rng = np.random.default_rng([seed, (KINDS + NULLS).index(kind)])
    steps = _grid(rng, 20 if kind == "short" else int(rng.choice([40, 80, 150, 400])))
    n = steps.size
    x = np.arange(n)
    sigma, level = rng.uniform(0.5, 4.0), rng.uniform(10, 60)
    llc, loss, signs = np.full(n, level), np.full(n, 2.6), []
    centres: list[float] = []
    widths: list[float] = []
    time = (steps - steps[0]) / (steps[-1] - steps[0])
    if kind in KINDS:
        many = {"stair": 1 + seed % 4, "ramp": 1 + seed % 2, "fall": 1 + seed % 2, "mixed": 2 + seed % 3, "short": 1}[
            kind
        ]
        for j in range(many):
            share = (j + 1 + rng.uniform(-0.2, 0.2)) / (many + 1)
            room = n / (many + 1)
            width = rng.uniform(0.25, 0.45) * room if kind == "ramp" else max(1.0, rng.uniform(0.05, 0.22) * room)
            sign = {"fall": -1, "mixed": 1 - 2 * (j % 2), "short": 1 - 2 * (seed % 2)}.get(kind, 1)
            height = sigma * rng.choice([5.0, 8.0, 15.0, 30.0])
            shape = 1 / (1 + np.exp(-np.clip((x - share * (n - 1)) * 2 * np.log(9) / width, -40, 40)))
            llc = llc + sign * height * shape
            loss = loss - shape * (rng.uniform(0.08, 0.5) if sign > 0 else 0.01)
            centres.append(share * (n - 1))
            widths.append(width)
            signs.append(sign)
        loss = loss + 0.05 * (time + 0.01) ** -0.3 - 0.05
    elif kind == "null_rise":
        llc = llc + sigma * rng.uniform(3, 12) * (1 - np.exp(-3 * time))
        loss = loss - 0.6 * (1 - np.exp(-3 * time))
    elif kind == "null_power":
        llc = llc + sigma * rng.uniform(3, 15) * (x / n) ** rng.uniform(0.6, 1.5)
        loss = loss + 0.3 * ((time + 0.01) ** -0.3 - 1)
    elif kind == "null_burnin":
        llc = llc + sigma * rng.uniform(4, 12) * (1 - np.exp(-x / (0.12 * n)))
        loss = loss - 0.7 * (1 - np.exp(-5 * time))
    else:
        loss = loss + 0.02 * ((time + 0.01) ** -0.3 - 1)
    noise = rng.standard_t(5, n) * sigma * np.sqrt(3 / 5)
    if kind == "null_autocorrelated":
        phi = rng.uniform(0.3, 0.7)
        for i in range(1, n):
            noise[i] = phi * noise[i - 1] + np.sqrt(1 - phi**2) * noise[i]
    noise = noise + np.where(rng.random(n) < 0.01, 6 * sigma * rng.choice([-1.0, 1.0], n), 0.0)
    wrong = rng.uniform(0.2, 0.5) if kind == "null_miscalibrated" else rng.uniform(0.5, 1.0)
    loss = loss + rng.normal(size=n) * 0.003
    half = np.array(widths) / 2
    return Curve(
        steps, llc + noise, sigma * wrong * rng.uniform(0.7, 1.4, n), loss, np.array(centres) - half,
        np.array(centres) + half, np.array(signs),
    )  # fmt: skip


def matched(
    curve: Curve, found: list[tuple[float, int]], before: float, after: float
) -> list[tuple[tuple[float, int], int]]:
    """Each flag with the number of the transition it takes, of those whose ``onset - before .. end + after`` it lies in
    and that none has taken before; one that takes none is left out."""
    free, pairs = set(range(curve.onset.size)), []
    for place, sign in found:
        near = [j for j in free if curve.onset[j] - before <= place <= curve.end[j] + after]
        if near:
            best = min(near, key=lambda j: abs(curve.onset[j] + curve.end[j] - 2 * place))
            free.discard(best)
            pairs.append(((place, sign), best))
    return pairs


def hits(curve: Curve, found: list[tuple[float, int]], before: float, after: float) -> tuple[int, int, int]:
    """(hits, right signs, false): each flag at a point takes one transition of ``onset - before .. end + after``."""
    pairs = matched(curve, found, before, after)
    right = sum(int(curve.sign[number] == sign) for (_, sign), number in pairs)
    return len(pairs), right, len(found) - len(pairs)


def feed(detector: TransitionDetector, curve: Curve, first: int = 0, last: int | None = None) -> list[Transition]:
    found = []
    for i in range(first, curve.steps.size if last is None else last):
        found += detector.update(curve.steps[i], curve.llc[i], curve.llc_se[i], curve.loss[i])
    return found


def online(curve: Curve) -> list[tuple[float, int]]:
    """Point at which each flag is raised, and its sign."""
    index = np.arange(curve.steps.size)
    return [
        (float(np.interp(t.known_at, curve.steps, index)), int(np.sign(t.llc_change)))
        for t in feed(TransitionDetector(), curve)
    ]


def offline(curve: Curve) -> list[tuple[float, int]]:
    """Point at which each step is placed, and its sign."""
    index = np.arange(curve.steps.size)
    found = detect_transitions(curve.steps, curve.llc, curve.llc_se, curve.loss)
    return [(float(np.interp(t.step, curve.steps, index)), int(np.sign(t.llc_change))) for t in found]
