"""A rise that a run begins with, and a further fall of a negative coefficient, are no transitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lightning_slt import detect_transitions
from tests.transitions.curves import Curve, offline, online

NONE = np.empty(0)


def of(llc: np.ndarray, loss: np.ndarray, seed: int) -> Curve:
    """With scatter of one unit of the coefficient and 0.004 of the loss; nothing in it is to be flagged."""
    rng, n = np.random.default_rng(seed), llc.size
    noise = rng.normal(size=(2, n)) * np.array([[1.0], [0.004]])
    return Curve(100.0 * np.arange(n), llc + noise[0], np.ones(n), loss + noise[1], NONE, NONE, NONE)


@pytest.mark.parametrize("way", [offline, online])
@pytest.mark.parametrize("points", [1.5, 3.0, 5.0])
def test_a_run_may_be_long_beside_the_rise_that_it_begins_with(way: Callable[[Curve], list], points: float) -> None:
    """250 points, of which the first few (an e-fold of so many) rise by 15 scatters: a step in 12 of 12 before."""
    x = np.arange(250)
    for seed in range(2):
        risen = 1 - np.exp(-x / points)
        assert way(of(30 + 15 * risen, 2.5 - (1 - np.exp(-x / points / 1.3)), seed)) == []


@pytest.mark.parametrize("way", [offline, online])
@pytest.mark.parametrize(("before", "after", "width"), [(-20, -400, 2), (-20, -400, 9), (-50, -400, 0.5)])
def test_a_coefficient_that_is_negative_may_fall_far(
    way: Callable[[Curve], list], before: float, after: float, width: float
) -> None:
    """Beside a level loss. The ramp misses the plateau before the fall by more than its level is."""
    done = 1 / (1 + np.exp(-(np.arange(60) - 30) * 2 * np.log(9) / width))
    for seed in range(3):
        assert way(of(before + (after - before) * done, np.full(60, 2.0), seed)) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_coefficient_that_turns_negative_while_the_loss_falls_faster_and_faster_is_a_saddle_being_left(
    seed: int,
) -> None:
    """The same fall beside a loss that falls evenly is a transition."""
    rng, x = np.random.default_rng(seed), np.arange(40.0)
    llc, blur = 10 - 40 / (1 + np.exp(28 - x)) + rng.normal(size=40), 0.002 * rng.normal(size=40)
    assert detect_transitions(x, llc, np.ones(40), 3 - np.exp((x - 39) / 6) + blur) == []
    [found] = detect_transitions(x, llc, np.ones(40), 3 - x / 39 + blur)
    assert found.step == pytest.approx(28, abs=1) and found.llc_change == pytest.approx(-40, abs=3)
