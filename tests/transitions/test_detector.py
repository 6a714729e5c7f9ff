"""The online detector: a flag and what becomes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lightning_slt import TransitionDetector, detect_transitions
from tests.transitions.curves import feed
from tests.transitions.stages import stage


def test_the_rest_of_a_flagged_ramp_is_no_second_transition() -> None:
    """The flag sees the beginning of the ramp only; what follows makes the same transition larger."""
    x = np.arange(120)
    noise, blur = np.random.default_rng(16).normal(size=(2, x.size))
    shape = 1 / (1 + np.exp(-(x - 60) * 2 * np.log(9) / 15))
    llc, loss = 20 + 50 * shape + noise, 2 - 0.5 * shape + 0.01 * blur
    detector, flags = TransitionDetector(), []
    for i in range(x.size):
        flags += detector.update(100.0 * i, llc[i], 1.0, loss[i])
    [flag], [now] = flags, detector.transitions
    assert flag.llc_change < 25
    assert (now.id, now.state, now.known_at) == (0, "confirmed", flag.known_at)
    assert abs(now.llc_change - 50) <= 10


def test_a_stage_is_flagged_once_and_then_confirmed() -> None:
    curve = stage()
    detector = TransitionDetector()
    [flag] = feed(detector, curve)
    assert (flag.state, flag.kind, flag.id) == ("provisional", "A", 0)
    assert flag.onset <= 3000
    assert flag.known_at <= 3300
    [now] = detector.transitions
    assert (now.state, now.id) == ("confirmed", 0)
    assert abs(now.step - 3000) <= 100
    assert abs(now.llc_change - 15) <= 4 * now.llc_change_se
    assert abs(now.loss_change + 0.5) <= 0.1


def test_a_change_of_state_is_shown_once() -> None:
    curve, detector, changes = stage(), TransitionDetector(), []
    for i in range(curve.steps.size):
        detector.update(curve.steps[i], curve.llc[i], curve.llc_se[i], curve.loss[i])
        changes += detector.changes
    assert [(t.id, t.state) for t in changes] == [(0, "confirmed")]


def test_a_level_that_goes_back_is_retracted() -> None:
    curve, detector = stage(), TransitionDetector()
    first, flags = 0, []
    while not flags:
        flags = feed(detector, curve, first, first + 1)
        first += 1
    [flag] = flags
    for i in range(first, first + 8):
        assert detector.update(curve.steps[i], 20.0 + 0.5 * (-1) ** i, 1.0, curve.loss[i]) == []
    assert [t.state for t in detector.transitions] == ["retracted"]
    assert detector.transitions[0].id == flag.id


def test_invalid_points_neither_flag_nor_hide() -> None:
    curve = stage()
    detector, found = TransitionDetector(), []
    for i in range(curve.steps.size):
        step = curve.steps[i]
        assert detector.update(step, 1e30, 1.0, 1.0, valid=False) == []
        assert detector.update(step, np.nan, np.nan, curve.loss[i]) == []
        assert detector.update(step, np.inf, 1.0, np.nan) == []
        found += detector.update(step, curve.llc[i], curve.llc_se[i], curve.loss[i])
    assert found == feed(TransitionDetector(), curve)
    llc = curve.llc.copy()
    llc[::7] = 1e30
    valid = np.ones(60, bool)
    valid[::7] = False
    assert len(detect_transitions(curve.steps, llc, curve.llc_se, curve.loss, valid)) == 1


def test_a_boundary_annotates_or_suppresses() -> None:
    curve = stage()
    for way, expected in (("annotate", [3000.0]), ("suppress", [])):
        detector = TransitionDetector(at_boundary=way)
        detector.boundary(3000.0)
        assert [t.boundary for t in feed(detector, curve)] == expected
        found = detect_transitions(
            curve.steps, curve.llc, curve.llc_se, curve.loss, boundaries=[3000.0], at_boundary=way
        )  # fmt: skip
        assert [t.boundary for t in found] == expected


def test_a_smallest_change_is_a_floor() -> None:
    curve = stage()
    assert feed(TransitionDetector(min_change=40.0), curve) == []
    assert len(feed(TransitionDetector(min_change=5.0), curve)) == 1


@pytest.mark.parametrize("cut", [10, 33, 38, 50])
def test_a_resumed_detector_goes_on_as_if_never_stopped(cut: int) -> None:
    curve = stage()
    whole, before, after = TransitionDetector(), TransitionDetector(), TransitionDetector()
    expected = feed(whole, curve)
    found = feed(before, curve, last=cut)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert found + feed(after, curve, first=cut) == expected
    assert after.state_dict() == whole.state_dict()


@pytest.mark.parametrize("width", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_a_wide_stage_that_is_flagged_at_its_beginning_is_one_transition(width: int) -> None:
    """Ten of each, noise a hundredth of the height; without a look at what lies between, twice as many flags."""
    flags, heights = 0, []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        at = np.arange(60 + 2 * width)
        centre = 40 + width / 2 + rng.uniform(0, 5)
        done = 1.0 / (1.0 + np.exp(-(at - centre) * 2 * np.log(9) / width))
        llc = 10 + 20 * done + 0.2 * rng.normal(size=at.size)
        loss = 3 - done + 0.005 * rng.normal(size=at.size)
        detector = TransitionDetector()
        for i in at:
            flags += len(detector.update(float(i), llc[i], 0.2, loss[i]))
        [last] = detector.transitions[-1:]
        assert last.state == "confirmed"
        heights.append(last.llc_change)
    assert flags <= 11
    assert abs(float(np.median(heights)) - 20) < 2


@pytest.mark.parametrize("seed", range(3))
def test_the_rest_of_a_ramp_is_counted_from_the_level_before_its_beginning(seed: int) -> None:
    """At no point of the run is the change larger than the ramp is high, which begins from a level of 200."""
    x, rng = np.arange(90), np.random.default_rng(seed)
    done = 1 / (1 + np.exp(-(x - 47.5) * 2 * np.log(9) / 15))
    llc, loss = 200 + 20 * done + 0.2 * rng.normal(size=90), 3 - done + 0.005 * rng.normal(size=90)
    detector, heights = TransitionDetector(), []
    for i in x:
        detector.update(float(i), llc[i], 0.2, loss[i])
        heights += [t.llc_change for t in detector.transitions]
    assert min(heights) > 0 and max(heights) < 23


@pytest.mark.parametrize("width", [20, 30, 40])
def test_a_wide_fall_is_judged_when_it_has_ended(width: int) -> None:
    x, rng = np.arange(60 + 2 * width), np.random.default_rng(0)
    done = 1 / (1 + np.exp(-(x - 40 - width / 2) * 2 * np.log(9) / width))
    llc, loss = 60 - 40 * done + 0.5 * rng.normal(size=x.size), 2 + 0.005 * rng.normal(size=x.size)
    detector, changes = TransitionDetector(), []
    for i in x:
        detector.update(float(i), llc[i], 0.5, loss[i])
        changes += detector.changes
    [now] = detector.transitions
    assert now.state == "confirmed" and now.llc_change == pytest.approx(-40, abs=2)
    assert changes[0].state == "confirmed" and changes[0].llc_change < -35
