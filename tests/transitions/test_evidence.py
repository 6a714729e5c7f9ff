"""The evidence for a ramp, number by number: fits, scatter, spikes, and the noise that is allowed for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lightning_slt.transitions.curve import Curve, newest_as_seen
from lightning_slt.transitions.evidence import SIZES, autocorrelation, bank, fits, persistence, scatter, without_spikes
from lightning_slt.transitions.newest import newest_step
from lightning_slt.transitions.search import best_step


def left_by(values: np.ndarray, *columns: np.ndarray) -> float:
    """Sum of squares that a constant and these columns leave, by least squares."""
    basis = np.stack([np.ones(values.size), *columns], axis=1)
    return float(np.sum((values - basis @ np.linalg.lstsq(basis, values, rcond=None)[0]) ** 2))


@pytest.mark.parametrize(("height", "sigma"), [(2.0, 0.1), (2.0, 2.0), (100.0, 0.1)])
def test_evidence_is_what_the_ramp_leaves_less_than_any_smooth_course_in_units_of_the_noise(
    height: float, sigma: float
) -> None:
    """The noise is the scatter, what the ramp leaves, or 3 % of the step: the largest of them."""
    size, ramp = 16, 20
    b, x = bank(16), np.arange(16.0)
    shape = b.ramps[ramp] / np.ptp(b.ramps[ramp])
    values = height * shape + 0.7 * np.random.default_rng(0).normal(size=size)
    found = fits(values[None], np.array([sigma]), b)
    unit = x / (size - 1)
    courses = [unit**2, *(np.exp(-rate * u) for rate in (2, 4, 8, 16) for u in (unit, 1 - unit))]
    smooth = min(left_by(values, unit, course) for course in courses)
    rest = left_by(values, b.ramps[ramp])
    fitted = float(found.height[0, ramp])
    noise = max(sigma**2, rest / (size - 4), (0.03 * fitted) ** 2)
    assert found.evidence[0, ramp] == pytest.approx((smooth - rest) / noise)
    assert found.contrast[0, ramp] == pytest.approx((left_by(values) - rest) / noise)


def test_what_a_ramp_leaves_has_its_autocorrelation_and_two_in_the_size_for_so_few_points() -> None:
    b = bank(16)
    noise = np.random.default_rng(3).normal(size=16)
    noise += np.roll(noise, 1)
    values = 5.0 * b.ramps[20] + noise
    left = values - np.mean(values)
    left -= (left @ b.ramps[20]) * b.ramps[20]
    expected = float(left[1:] @ left[:-1] / (left @ left)) + 2 / 16
    assert 0.2 < expected < 0.9 and autocorrelation(values, b, 20) == pytest.approx(expected)


def test_scatter_is_that_of_a_point_whatever_the_trend() -> None:
    x = np.arange(20_001.0)
    noise = np.random.default_rng(0).normal(size=x.size)
    assert scatter(0.3 * noise + 5.0 * x) == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize("phi", [0.5, 0.8])
def test_persistence_is_the_autocorrelation_less_what_chance_makes(phi: float) -> None:
    """Two over the root of 400 points; of white noise hardly anything is left."""
    found, white = [], []
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(size=400)
        values = noise.copy()
        for k in range(1, 400):
            values[k] = phi * values[k - 1] + noise[k]
        found.append(persistence(values))
        white.append(persistence(noise))
    assert float(np.mean(found)) == pytest.approx(phi - 0.1, abs=0.04)
    assert float(np.mean(white)) < 0.02


def test_spikes_are_brought_to_three_and_a_half_sigma_and_edges_are_seen_with_the_last_five() -> None:
    """Two points beyond the newest edge make no step yet, three do; the first ones alike."""
    flat = np.zeros(12)
    for places, kept in (((5,), 3.5), ((11,), 3.5), ((10, 11), 3.5), ((9, 10, 11), 10.0), ((0, 1), 3.5)):
        values = flat.copy()
        values[list(places)] = 10.0
        seen = without_spikes(values, 1.0)
        assert seen[list(places)].tolist() == [kept] * len(places)
        assert np.delete(seen, places).tolist() == pytest.approx(np.clip(flat, *sorted((0, 0)))[len(places) :])


def test_a_rise_at_the_newest_edge_is_let_through_beside_a_loss_that_falls_faster() -> None:
    """No higher than three and a half sigma above the median of the last three."""
    values, fall = np.zeros(12), np.zeros(12)
    values[-2:] = (10.0, 40.0)
    assert newest_as_seen(values, 1.0, fall, 0.1)[-2:].tolist() == [3.5, 3.5]
    fall[-2:] = (-0.3, -0.6)  # beyond 3 sqrt(6) 0.1 = 0.73 in two points it would be
    assert newest_as_seen(values, 1.0, fall, 0.1)[-2:].tolist() == [3.5, 3.5]
    fall[-2:] = (-0.4, -0.8)
    assert newest_as_seen(values, 1.0, fall, 0.1)[-2:].tolist() == [10.0, 13.5]


@pytest.fixture
def curve() -> Curve:
    """A clean step of the coefficient alone, at noise whose persistence is as large as it may be."""
    noise = 0.1 * np.random.default_rng(0).normal(size=(2, 30))
    level, ones = np.where(np.arange(30) < 15, 0.0, 10.0) + noise[0], np.ones(30)
    return Curve(100.0 * np.arange(30), level, 0.1 * ones, noise[1], 0.1 * ones, noise[1], 0.1 * ones, 0.9)


def test_the_noise_of_the_whole_curve_counts_where_the_coefficient_speaks_alone(curve: Curve) -> None:
    """Evidence in units of ``(1 + phi) / (1 - phi)``, which is 19 at 0.9 and 39 at 0.95."""
    later = replace(curve, persistence=0.95)
    for search in (newest_step, lambda c, lo, hi, least: best_step(c, lo, hi, SIZES, threshold=0.0, min_change=least)):
        one, other = (search(c, 0, 30, 0.0) for c in (curve, later))
        assert one is not None and other is not None and one.score / other.score == pytest.approx(39 / 19)


def test_evidence_counts_for_less_online_where_it_is_asked_for_at_every_point(
    curve: Curve, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = newest_step(curve, 0, 30, 0.0)
    monkeypatch.setattr("lightning_slt.transitions.newest._ALONE", 1.0)
    whole = newest_step(curve, 0, 30, 0.0)
    assert alone is not None and whole is not None and alone.score == pytest.approx(0.65 * whole.score)
    assert alone.height_se == pytest.approx(whole.height_se) and math.isfinite(alone.height_se)
