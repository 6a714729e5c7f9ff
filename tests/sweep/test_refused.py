"""What cannot be measured: it is said which setting is wrong, and what was measured before is left as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_slt.record import RunRecord
from lightning_slt.sweep import SweepConfig, sweep
from tests.sweep import runs
from tests.sweep.runs import assert_same_points, here

pytestmark = pytest.mark.timeout(240)


def test_averaged_weights_that_are_not_there(config: SweepConfig, tmp_path: Path) -> None:
    paths, _ = runs.train(tmp_path)
    config.weights = "averaged"
    with pytest.raises(ValueError, match=r"weights='averaged': .* has no averaged weights .* Set weights='raw'"):
        sweep(paths, config, here([]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": "tests.sweep.runs"}, r"module='tests\.sweep\.runs': write it as package\.module:Name"),
        (
            {"module": "tests.sweep.runs:Nobody"},
            r"module='tests\.sweep\.runs:Nobody': cannot be imported: AttributeErr",
        ),
        ({"module": "nowhere.py:Net"}, r"module='nowhere\.py:Net': cannot be imported: FileNotFoundError"),
        ({"module": "tests.sweep.runs:dataset"}, r"gave a TensorDataset, and no torch module"),
        ({"module": "tests.sweep.runs:Model"}, r"module_args={}: do not fit .*missing a required argument: 'lr'"),
        (
            {"data": "tests.sweep.runs:of_size", "localization": 1.0},
            r"data_args={}: do not fit .*missing a required argument: 'size'",
        ),
        (
            {"data_args": {"sise": 3}, "localization": 1.0},
            r"data_args={'sise': 3}: do not fit data=.*unexpected keyword argument 'sise'",
        ),
        ({"probe": 0}, r"probe=0: must be at least 1"),
        ({"query": 3}, r"given without probe"),
        ({"num_draws": 0}, r"num_draws=0: must be at least 1"),
        ({"false_alarms": -1.0}, r"false_alarms: expected a rate above 0 .*got -1\.0"),
    ],
)
def test_what_cannot_be_measured_is_said(
    changes: dict[str, Any], message: str, config: SweepConfig, tmp_path: Path
) -> None:
    torch.save({"state_dict": runs.Model(0.1).state_dict(), "step": 5}, tmp_path / "a.pt")
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        sweep([tmp_path / "a.pt"], config, here([]))


def test_arguments_that_do_not_fit_the_data_leave_the_curve_of_before(config: SweepConfig, tmp_path: Path) -> None:
    """Localization is kept in the folder, so that nothing else asks for the data before the points do."""
    paths, _ = runs.train(tmp_path / "run")
    before = sweep(paths[:2], config, here([]))
    with pytest.raises(ValueError, match=r"data_args={'size': 3}: do not fit"):
        sweep(paths[:2], dataclasses.replace(config, data_args={"size": 3}), here([]))
    assert_same_points(list(RunRecord(before.folder).read()), before.estimates)


def test_a_sweep_that_measures_nothing_leaves_the_curve_of_before(config: SweepConfig, tmp_path: Path) -> None:
    paths, _ = runs.train(tmp_path / "run")
    before = sweep(paths[:2], config, here([]))
    said: list[str] = []
    other = dataclasses.replace(config, num_draws=config.num_draws + 10)
    result = sweep(paths[:2], other, lambda tasks: ((task, "out of memory") for task in tasks), say=said.append)
    assert not result.estimates and len(result.failed) == 2
    assert_same_points(list(RunRecord(before.folder).read()), before.estimates)
    assert said[-1] == f"{before.folder}: the record of an earlier sweep is left as it was, since no point was measured"


def test_the_record_of_a_monitor_is_not_written_anew(config: SweepConfig, tmp_path: Path) -> None:
    torch.save({"state_dict": runs.Model(0.1).state_dict(), "step": 5}, tmp_path / "a.pt")
    record = Path(config.folder) / "estimates.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("kept\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"folder=.*holds the record of a run that a monitor measured.*another folder"):
        sweep([tmp_path / "a.pt"], config, here([]))
    assert record.read_text(encoding="utf-8") == "kept\n"


def test_what_is_of_another_kind_is_named(config: SweepConfig, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"checkpoints='last\.ckpt': expected a list of paths.*Give \['last\.ckpt'\]"):
        sweep("last.ckpt", config, here([]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"config=3: expected a SweepConfig, got int"):
        sweep([tmp_path / "a.pt"], 3, here([]))  # type: ignore[arg-type]
    config.probe = "a"  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"probe='a': expected a whole number, got str.*or left out"):
        sweep([tmp_path / "a.pt"], config, here([]))
