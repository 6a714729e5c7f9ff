"""What detection is given: validity as a table holds it, and mistakes by their names."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_slt import TransitionDetector, TransitionMonitor, detect_transitions
from tests.transitions.stages import stage


def test_validity_is_read_as_a_table_holds_it() -> None:
    """A column with gaps is one of numbers or of objects; text is no boolean."""
    curve = stage()
    valid = np.ones(60, bool)
    valid[::7] = False
    curve_of = (curve.steps, np.where(valid, curve.llc, -1e30), curve.llc_se, curve.loss)
    expected = detect_transitions(*curve_of, valid)
    assert len(expected) == 1
    for column in (np.where(valid, 1.0, np.nan), [True if ok else None for ok in valid], valid.astype(int).tolist()):
        assert detect_transitions(*curve_of, column) == expected
    for column in ([str(ok) for ok in valid], [math.nan, *map(str, valid[1:])], valid * 2):
        with pytest.raises(ValueError, match="valid: expected booleans, got"):
            detect_transitions(*curve_of, column)


def test_mistakes_are_named() -> None:
    detector = TransitionDetector()
    detector.update(10.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="order of step"):
        detector.update(9.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="false_alarms"):
        TransitionDetector(false_alarms=0.0)
    with pytest.raises(ValueError, match="min_change"):
        detect_transitions([1, 2], [1, 2], [1, 1], [1, 1], min_change=-1)
    with pytest.raises(ValueError, match="at_boundary"):
        TransitionDetector(at_boundary="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss: expected one value for each of the 2"):
        detect_transitions([1, 2], [1, 2], [1, 1], [1])
    with pytest.raises(ValueError, match="version 1"):
        detector.load_state_dict({"version": 7})


@pytest.mark.parametrize("value", ["a", None, [1.0], True], ids=repr)
@pytest.mark.parametrize("name", ["step", "llc", "llc_se", "loss"])
def test_a_point_of_another_kind_is_named(name: str, value: object) -> None:
    point: dict[str, object] = {"step": 1.0, "llc": 1.0, "llc_se": 1.0, "loss": 1.0, name: value}
    with pytest.raises(TypeError, match=rf"{name}=.*: expected a number, got {type(value).__name__}"):
        TransitionDetector().update(**point)  # type: ignore[arg-type]


def test_arguments_of_another_kind_are_named() -> None:
    detector = TransitionDetector()
    with pytest.raises(TypeError, match="valid='False': expected True or False, got str"):
        detector.update(1.0, 1.0, 1.0, 1.0, valid="False")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step='a': expected a number"):
        detector.boundary("a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step=nan: expected a finite"):
        detector.boundary(math.nan)
    with pytest.raises(ValueError, match=r"false_alarms.*True"):
        TransitionDetector(false_alarms=True)
    with pytest.raises(ValueError, match=r"min_change.*True"):
        TransitionDetector(min_change=True)
    for name in ("steps", "llc", "llc_se", "loss"):
        curve: dict[str, object] = {"steps": [1], "llc": [1], "llc_se": [1], "loss": [1], name: ["a"]}
        with pytest.raises(TypeError, match=f"{name}: expected an array of numbers, got list"):
            detect_transitions(**curve)  # type: ignore[arg-type]
    assert detector.transitions == [] and detector.update(1, 1, 1, 1, valid=np.True_) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"boundaries": 20}, r"boundaries: expected a list of training steps.*got 20; give \[20\]"),
        ({"boundaries": None}, r"boundaries: expected a list of training steps, \[\] for none, got None"),
        ({"boundaries": ["20"]}, r"boundaries: expected a list of training steps.*got '20' in it"),
        ({"false_alarms": None}, r"false_alarms: expected a rate.*got None; 0\.05 is usual"),
        ({"false_alarms": "5%"}, r"false_alarms: expected a rate.*got '5%'"),
        ({"min_change": None}, r"min_change: expected a height.*got None; 0\.0"),
    ],
)
def test_settings_of_another_kind_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect_transitions([0, 1], [1, 1], [1, 1], [1, 1], **settings)  # type: ignore[arg-type]
    if "boundaries" not in settings:
        with pytest.raises(ValueError, match=message):
            TransitionDetector(**settings)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            TransitionMonitor(**settings)  # type: ignore[arg-type]
