"""The loss in proportion: late stages are found, and a loss that comes near zero, or is noise there, is no stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from lightning_slt import detect_transitions
from lightning_slt.transitions.curve import newest_as_seen
from tests.transitions.curves import Curve, hits, matched, offline, online


def late_stages(seed: int) -> Curve:
    """Three stages, each of which takes the loss down to a tenth of what it was."""
    rng, x = np.random.default_rng(seed), np.arange(90.0)
    centres, half = np.array([15.0, 40.0, 65.0]), 8.0
    done = (1 / (1 + np.exp((centres[:, None] - x) * np.log(9) / half))).sum(axis=0)
    loss = 10 ** (1 - done) * np.exp(0.003 * rng.normal(size=90))
    return Curve(
        100 * x, 10 + 3 * done + rng.normal(size=90), np.ones(90), loss, centres - half, centres + half, np.ones(3)
    )


def test_a_late_stage_is_found_beside_those_before_it() -> None:
    """What a stage takes of the loss is a share of what is left.

    Where differences of the loss count, 16 of the 24 are found online: the others lie on the tails of larger ones.
    """
    curves = [late_stages(seed) for seed in range(8)]
    now, then = (np.sum([hits(c, way(c), 1.0, 9.0) for c in curves], axis=0) for way in (online, offline))
    assert now[0] >= 22 and now[2] <= 1
    assert then[0] >= 22 and then[2] == 0


def test_the_units_of_the_loss_and_its_sign_do_not_matter() -> None:
    """Of a loss that is not positive throughout no share can be told: differences count, as of any with a large
    constant in it."""
    curve = late_stages(0)
    places = [at for at, _ in offline(curve)]
    for factor in (1e-12, 1e12):
        same = Curve(curve.steps, curve.llc, curve.llc_se, factor * curve.loss, curve.onset, curve.end, curve.sign)
        assert [at for at, _ in offline(same)] == pytest.approx(places)
    one = np.array([1])
    raised, below = (
        Curve(curve.steps, curve.llc, curve.llc_se, curve.loss + constant, one, one, one) for constant in (1e6, -3.0)
    )
    assert offline(raised) == offline(below) != []


def decays(*times: float) -> list[Curve]:
    """Losses that decay smoothly, down to floors over decades, beside a coefficient that rises smoothly; even and
    logarithmic grids. ``times``: in which a decay is down to a share 1/e, of the whole run."""
    grids = np.linspace(10, 1e4, 100), np.unique(np.round(np.geomspace(10, 1e4, 100)))
    curves, none = [], np.empty(0)
    for number, (grid, floor, tau, power) in enumerate(
        itertools.product(grids, (0.0, 1e-4, 1e-2, 0.1), times, (False, True))
    ):
        rng, t = np.random.default_rng(number), grid / 1e4
        falls = (1 + t / tau) ** -2.0 if power else np.exp(-t / tau)
        loss = (falls + floor + 1e-8) * np.exp(0.003 * rng.normal(size=t.size))
        llc = 10 + 12 * (1 - np.exp(-t / (2 * tau))) + rng.normal(size=t.size)
        curves.append(Curve(grid, llc, np.ones(t.size), loss, none, none, none))
    return curves


@pytest.mark.slow
def test_a_smooth_decay_over_decades_is_no_transition() -> None:
    curves = decays(0.1, 0.2, 0.3)
    assert len(curves) == 48
    assert sum(len(offline(curve)) for curve in curves) == 0
    assert sum(len(online(curve)) for curve in curves) <= 1  # in 4,800 points: 0.05 in 100 are tolerated
    # over within a few points, some are: 8 of 16 where differences of the loss count
    assert sum(bool(offline(curve)) for curve in decays(0.05)) <= 2


@pytest.mark.parametrize(
    ("course", "most"),
    [
        (lambda t: 3 * np.exp(-2 * t) - 1, 0),
        (lambda t: -np.log(0.3 + t), 0),
        (lambda t: 1 - t + 1e-3, 0),
        (lambda t: (1 - t) ** 2 + 1e-4, 0),
        (lambda t: np.exp(-t / 0.3) - 0.5, 1),
    ],
)
def test_a_smooth_loss_that_comes_near_zero_is_no_transition(
    course: Callable[[np.ndarray], np.ndarray], most: int
) -> None:
    """Its logarithm falls faster and faster there: by it alone nearly all of these are flagged online, half offline."""
    t, none, flagged = np.linspace(0.001, 1, 100), np.empty(0), 0
    for seed in range(8):
        noise = np.random.default_rng(seed).normal(size=(2, 100))
        llc, loss = 10 + 12 * (1 - np.exp(-2 * t)) + noise[0], course(t) + 0.003 * np.abs(noise[1])
        curve = Curve(1e4 * t, llc, np.ones(100), loss, none, none, none)
        assert offline(curve) == []
        flagged += bool(online(curve))
    assert flagged <= most


def test_a_constant_loss_that_rounding_changes_says_nothing() -> None:
    x, none = np.arange(60.0), np.empty(0)
    llc = 10 + 0.5 * x + np.random.default_rng(0).normal(size=60)
    curve = Curve(x, llc, np.ones(60), 0.3 - 5.6e-17 * (x > 30), none, none, none)
    assert np.ptp(curve.loss) > 0
    assert offline(curve) == online(curve) == []


def test_stages_are_found_where_the_loss_is_noise_about_zero_later_on() -> None:
    found = 0
    for seed in range(8):
        rng, x = np.random.default_rng(seed), np.arange(60.0)
        done = [1 / (1 + np.exp(-2 * (x - centre))) for centre in (13, 28)]
        loss = np.abs(1 - 0.4 * done[0] - 0.6 * done[1] + 0.01 * rng.normal(size=60))
        llc, both = 10 + 4 * (done[0] + done[1]) + rng.normal(size=60), np.array([13.0, 28.0])
        curve = Curve(x, llc, np.ones(60), loss, both - 2, both + 2, np.ones(2))
        found += len(matched(curve, offline(curve), 3.0, 3.0))
    assert found >= 15  # of 16; 11 where shares of the noise count


def test_a_late_stage_is_seen_to_lower_the_loss() -> None:
    """Its change is small beside the scatter of the loss at the beginning, which goes with the level."""
    x = np.arange(90.0)
    done = (1 / (1 + np.exp(np.array([15.0, 45.0, 75.0])[:, None] - x))).sum(axis=0)
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=(2, 90))
        llc, loss = 10 + 6 * done + noise[0], 100 ** (1 - done) * np.exp(0.05 * noise[1])
        found = detect_transitions(x, llc, np.ones(90), loss)
        assert [t.kind for t in found] == ["A", "A", "A"]


def test_a_rise_is_seen_sooner_where_the_loss_falls_faster_beside_it() -> None:
    steady, faster = np.linspace(0.0, -9.0, 10), -(np.arange(10.0) ** 2)

    def newest(llc: list[float], fall: np.ndarray) -> list[float]:
        return [float(v) for v in newest_as_seen(np.array([0.0] * 7 + llc), 1.0, fall, 0.1)[-3:]]

    assert newest([0.0, 20.0, 20.0], steady) == [0.0, 3.5, 3.5]
    assert newest([0.0, 20.0, 20.0], faster) == [0.0, 20.0, 20.0]
    # one point is a spike all the same, and a drop has no such witness
    assert newest([0.0, 0.0, 20.0], faster) == [0.0, 0.0, 3.5]
    assert newest([0.0, -20.0, -20.0], faster) == [0.0, -3.5, -3.5]
