"""Curves of one stage, and recorded ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.transitions.curves import Curve

DATA = Path(__file__).parent / "data" / "deep_linear.npz"


def recorded() -> list[Curve]:
    data = np.load(DATA)
    curves = []
    for i in range(sum(name.endswith("_steps") for name in data.files)):
        part = {name: data[f"{i}_{name}"].astype(float) for name in ("steps", "llc", "llc_se", "loss")}
        index = np.arange(part["steps"].size)
        onset, end = (np.interp(data[f"{i}_{name}"], part["steps"], index) for name in ("true_on", "true_off"))
        curves.append(Curve(**part, onset=onset, end=end, sign=np.ones(onset.size)))
    return curves


def stage(seed: int = 0, height: float = 15.0, n: int = 60, at: int = 30) -> Curve:
    rng = np.random.default_rng(seed)
    x = np.arange(n)
    shape = 1 / (1 + np.exp(-(x - at)))
    llc = 20 + height * shape + rng.normal(size=n)
    return Curve(x * 100.0, llc, np.ones(n), 2 - 0.5 * shape, np.array([at - 2]), np.array([at + 2]), np.array([1]))
