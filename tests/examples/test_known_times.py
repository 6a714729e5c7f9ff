"""What the examples say of known and found boundaries: who is matched with whom, and what the picture shows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_slt import Estimate
from lightning_slt.reasons import NEGATIVE
from lightning_slt.transitions import Transition


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module beside the examples."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "examples"), *sys.path])
    return importlib.import_module("known_times")


def found(step: float, state: Any = "confirmed", number: int = 0) -> Transition:
    return Transition(number, step - 10, step, step + 10, "A", state, 20.0, 5.0, 0.5, -1.0, 0.1, step + 80)


def estimate(step: int, mean: float, loss: float) -> Estimate:
    return Estimate(
        mean, 0.2, torch.zeros(2), torch.zeros(2, 4), 1.0, 8.0, mean > 0, () if mean > 0 else (NEGATIVE,), 10.0, 1.0,
        loss, loss, 100, 10, 1e-3, step=step,
    )  # fmt: skip


def two_steps() -> list[Estimate]:
    """Eighty points: a saddle to step 250, a plateau to step 550, another."""
    noise = np.random.default_rng(0).normal(size=80) * 0.1
    levels = [(-3.0, 2.0)] * 25 + [(4.0, 1.0)] * 30 + [(9.0, 0.5)] * 25
    return [estimate(10 * i + 10, levels[i][0] + noise[i], levels[i][1] + 0.002 * noise[i]) for i in range(80)]


def test_matches_the_nearest_once_and_the_retracted_last(known_times: Any) -> None:
    known = [known_times.Known("a", 90, 100, 110), known_times.Known("b", 140, 160, 180)]
    near, far, other = found(118), found(500), found(150)
    assert known_times.match(known, [near, far, other], cadence=10) == [near, other]
    assert known_times.match(known, [near], cadence=10) == [near, None]  # not given away twice
    retracted = found(100, "retracted")
    assert known_times.match(known, [retracted, found(109)], cadence=10) == [found(109), None]
    assert known_times.match(known, [retracted], cadence=10) == [retracted, None]
    assert "online 0 of 2 known boundaries found, 0 others, 1 retracted" in known_times.count(
        known, [retracted], [], cadence=10
    )
    assert known_times.match(known, [found(141)], cadence=10)[0] is None  # more than three firings after the end


def test_the_table_names_what_was_missed_and_what_nobody_knows(known_times: Any) -> None:
    known = [known_times.Known("a", 90, 100, 110, predicted=97.0), known_times.Known("b", 240, 260, 280)]
    online, offline = [found(120, "provisional"), found(400, "retracted")], [found(110), found(500)]
    lines = known_times.table(known, online, offline, cadence=10).splitlines()
    assert "theory" in lines[0]
    row = "a 100 (90 to 110) 97 120 A provisional, 200 110 A (+1.0 firings)"
    assert lines[1].split() == row.split()
    assert lines[2].split()[-4:] == ["not", "found", "not", "found"]
    assert lines[3] == "  found online at 400 (A, retracted): none of the known ones"
    assert lines[4] == "  found afterwards at 500 (A): none of the known ones"
    assert known_times.count(known, online, offline, cadence=10) == (
        "online 1 of 2 known boundaries found, 0 others, 1 retracted; "
        "afterwards 1 of 2 known boundaries found, 1 other."
    )
    assert "theory" not in known_times.table([known_times.Known("a", 90, 100, 110)], [], [], 10)


def test_saddles_are_a_part_of_the_curve_and_lost_points_are_not(known_times: Any) -> None:
    curve = two_steps()
    assert not curve[0].valid
    curve[40] = estimate(410, float("nan"), 1.0)
    assert curve[0].comparable and not curve[40].comparable
    transitions = known_times.refined(curve)
    assert [t.kind for t in transitions] == ["A", "A"]
    assert np.allclose([t.step for t in transitions], [255, 555], atol=20)
    assert known_times.refined([]) == []


@pytest.mark.parametrize("row", [0, 3])
def test_the_picture_has_a_rule_for_each_time(known_times: Any, row: int, tmp_path: Path) -> None:
    known = [known_times.Known("a", 240, 255, 270), known_times.Known("b", 540, 555, 570)]
    curve, path = two_steps(), tmp_path / "picture.png"
    online = [found(260), found(560), found(700, "retracted")]
    figure, rest = known_times.draw("Two", known, online, [found(250)], curve, path, linear=5.0, row=row)
    top, bottom = figure.axes[:2]
    for axes in (top, bottom):
        rules = [line for line in axes.lines if list(line.get_ydata()) == [0, 1]]
        assert [line.get_xdata()[0] for line in rules if line.get_linestyle() == "-"] == [255, 555]
        assert [line.get_xdata()[0] for line in rules if line.get_linestyle() != "-"] == [250]
    flags = [line for line in top.lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert [(line.get_xdata()[0], line.get_markerfacecolor() == "white") for line in flags] == [
        (340, False), (640, False), (780, True)
    ]  # fmt: skip
    assert [text.get_text() for text in top.texts] == ["a\nknown 255", "b\nknown 555"]
    assert [text.get_text() for text in bottom.texts] == ["found 250 (A)"]
    assert len(rest) == row and path.exists() == (row == 0)
