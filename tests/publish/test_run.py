"""Which folders are of one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_slt.publish.run import folders_of, load_run
from lightning_slt.record import RunRecord
from tests.publish.helpers import make_estimate


def record(folder: Path, component: str = "") -> None:
    RunRecord(folder).append(make_estimate(step=100, component=component, num_draws=4))


@pytest.mark.parametrize("name", ["run1", "long_run2"])
def test_a_monitor_may_be_called_like_a_later_run(name: str, tmp_path: Path) -> None:
    record(tmp_path / "slt")
    record(tmp_path / f"slt_{name}", component=name)
    for given in (tmp_path, tmp_path / "slt", tmp_path / f"slt_{name}"):
        assert [m.name for m in load_run(given).monitors] == ["slt", name]


def test_a_later_run_of_the_same_folder_is_another_run(tmp_path: Path) -> None:
    for place, component in (("slt", ""), ("slt_run1", ""), ("slt_head", "head"), ("slt_head_run1", "head")):
        record(tmp_path / place, component)
    assert [p.name for p in folders_of(tmp_path)] == ["slt", "slt_head"]
    assert [p.name for p in folders_of(tmp_path / "slt_run1")] == ["slt_run1"]
    assert [p.name for p in folders_of(tmp_path / "slt_head")] == ["slt", "slt_head"]


def test_a_folder_that_is_named_like_a_later_run_has_its_components(tmp_path: Path) -> None:
    """``SLTMonitor(dirpath="out/mnist_run2")`` and a monitor of a component with the same one."""
    folder = tmp_path / "mnist_run2"
    record(folder)
    record(folder / "slt_head", component="head")
    assert [m.name for m in load_run(folder).monitors] == ["mnist_run2", "head"]
