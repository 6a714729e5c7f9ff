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


def test_the_only_run_below_a_folder_is_taken(tmp_path: Path) -> None:
    """Whatever its record is called, and with its monitors beside it and inside it; of two runs both are named."""
    inner = tmp_path / "lightning_logs" / "version_0"
    record(inner / "slt")
    record(inner / "slt_head", component="head")
    for given in (tmp_path, tmp_path / "lightning_logs", inner):
        assert [m.name for m in load_run(given).monitors] == ["slt", "head"]
    mine = tmp_path / "other" / "mine"
    record(mine)
    record(mine / "slt_head", component="head")
    assert [m.name for m in load_run(tmp_path / "other").monitors] == ["mine", "head"]
    with pytest.raises(FileNotFoundError) as raised:
        load_run(tmp_path)
    assert str(raised.value).endswith(f"Name one of: {inner / 'slt'}, {inner / 'slt_head'}, {mine}.")


def test_a_later_run_below_a_folder_is_a_second_one(tmp_path: Path) -> None:
    for place in ("slt_run1", "slt_run2"):
        record(tmp_path / "run" / place)
    with pytest.raises(FileNotFoundError, match=r"no estimates in it\. Name one of: .*slt_run1, .*slt_run2\.$"):
        load_run(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="Give the folder that the monitor names at its end"):
        load_run(tmp_path / "empty")
