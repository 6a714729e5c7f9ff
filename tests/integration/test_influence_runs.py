"""Influence over runs: resumed ones, two monitors, smoke runs, a second fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_slt.influence_record import InfluenceRecord
from lightning_slt.record import RunRecord
from tests.integration import models
from tests.integration.harness import (
    RecordingLogger,
    Scenario,
    SLTMonitor,
    assert_same,
)
from tests.integration.models import BATCH, Net, Plain, loaders, tensors, with_validation
from tests.integration.probing import Counts, probing, same, saving, still


def test_resume_goes_on_with_the_history_and_its_samples(tmp_path: Path) -> None:
    first, again = (probing(7, query=3, every_n_train_steps=2) for _ in range(2))
    Scenario(Net, with_validation, saving(tmp_path, max_epochs=1)).run(tmp_path, first)
    without = Scenario(Net, with_validation).run(tmp_path / "other", ckpt_path=str(tmp_path / "step=5.ckpt"))
    resumed = Scenario(Net, with_validation).run(tmp_path / "other", again, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert_same(without, resumed)
    assert [e.step for e in first.influences] == [2, 4, 6]
    assert [e.step for e in again.influences] == [2, 4, 6, 8, 10, 12]
    for before, after in zip(first.influences[:2], again.influences, strict=False):
        same(before, after)
    assert len({tuple(e.train_index.tolist()) for e in again.influences}) == 1
    assert [len(e.matrix) for e in again.influences] == [0, 0, 0, 0, 0, 3]
    # complete in its folder, each step once, although that of the first run may be gone
    assert again.folder is not None
    assert [e.step for e in InfluenceRecord(again.folder).read()] == [2, 4, 6, 8, 10, 12]
    assert [e.step for e in RunRecord(again.folder).read()] == [2, 4, 6, 8, 10, 12]


def test_resume_in_a_new_folder_has_the_whole_history_there(tmp_path: Path) -> None:
    first = probing(7, every_n_train_steps=2, dirpath=str(tmp_path / "first"))
    again = probing(7, every_n_train_steps=2, dirpath=str(tmp_path / "again"))
    Scenario(Net, loaders, saving(tmp_path, max_epochs=1)).run(tmp_path, first)
    (tmp_path / "first").rename(tmp_path / "moved")
    Scenario(Net, loaders).run(tmp_path, again, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert again.folder == tmp_path / "again"
    assert [e.step for e in InfluenceRecord(tmp_path / "again").read()] == [2, 4, 6, 8, 10, 12]


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """Step 6 was measured by the run that died; the one that goes on from step 5 does not measure there."""
    folder = str(tmp_path / "slt")
    first = probing(7, every_n_train_steps=2, name="m", dirpath=folder)
    again = probing(7, every_n_train_steps=4, name="m", dirpath=folder)
    Scenario(Net, loaders, saving(tmp_path, max_epochs=1)).run(tmp_path, first)
    assert first.folder is not None
    assert [e.step for e in InfluenceRecord(first.folder).read()] == [2, 4, 6]
    Scenario(Net, loaders).run(tmp_path, again, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert again.folder == first.folder
    assert [e.step for e in InfluenceRecord(first.folder).read()] == [2, 4, 8, 12]
    assert [e.step for e in again.influences] == [2, 4, 8, 12]


def test_a_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    monitor, again = probing(every_n_train_steps=2), probing(every_n_train_steps=2)
    Scenario(Net, loaders, saving(tmp_path, max_epochs=1)).run(tmp_path, monitor)
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "SLTMonitor" in k]
    again.load_state_dict(state)
    assert [e.step for e in again.influences] == [2, 4, 6]
    for kept, loaded in zip(monitor.influences, again.influences, strict=True):
        same(kept.without_pairs(), loaded)
    del state["influences"]  # written before there were any
    again.load_state_dict(state)
    assert again.influences == [] and len(again.estimates) == 3


def test_two_monitors_keep_apart(tmp_path: Path) -> None:
    logger = RecordingLogger()
    pair = [probing(5, name="head", restrict="net.4.*"), probing(9, query=3, name="body", restrict="net.0.*")]
    scenario = Scenario(Net, with_validation, lambda: {"logger": logger})
    without = Scenario(Net, with_validation).run(tmp_path / "without")
    trace = scenario.run(tmp_path, *pair)
    without.rows, trace.rows = [], []
    assert_same(without, trace)
    assert [tuple(m.influences[-1].matrix.shape) for m in pair] == [(5, 5), (3, 9)]
    assert [m.influences[-1].component for m in pair] == ["head", "body"]
    for m, name in zip(pair, ("slt_head", "slt_body"), strict=True):
        rows = [row for row, _ in logger.rows if f"{name}/influence/max_abs" in row]
        assert [row[f"{name}/influence/max_abs"] for row in rows] == [e.max_abs for e in m.influences]
        assert m.folder is not None and len(list(InfluenceRecord(m.folder).read())) == 3
    assert pair[0].folder != pair[1].folder


@pytest.mark.parametrize(
    "settings",
    [{"probe": True}, {"probe": 5, "query": 3}, {"probe": tensors(9)}],
    ids=["training data", "numbers of samples", "a dataset"],
)
def test_fast_dev_run_is_quick_and_writes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    monitor = SLTMonitor(every_n_train_steps=500, **settings)
    scenario = Scenario(Net, with_validation, lambda: {"fast_dev_run": True})
    scenario.assert_undisturbed(tmp_path, monitor)
    (e,) = monitor.influences
    assert not e.valid and any("too few" in reason for reason in e.reasons)
    assert monitor.estimates[0].seconds < 5
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_second_fit_looks_at_its_own_data(tmp_path: Path) -> None:
    monitor = probing(every_n_train_steps=2)
    Scenario(Net, lambda: loaders(8), lambda: {"max_epochs": 1}).run(tmp_path / "first", monitor)
    assert [len(e.train_index) for e in monitor.influences] == [8]
    Scenario(Plain, lambda: loaders(16), lambda: {"max_epochs": 1}).run(tmp_path / "second", monitor)
    assert [(e.step, len(e.train_index)) for e in monitor.influences] == [(2, 16), (4, 16)]


def test_samples_that_change_are_looked_at_as_they_were_read_once(tmp_path: Path) -> None:
    """The weights stand still, and the dataset gives other noise at every read."""
    monitor = probing(6, query=Counts(8))
    still(dataset=Counts()).run(tmp_path, monitor)
    first, *others = monitor.influences
    assert len(others) == 2
    for e in others:
        assert torch.equal(e.init_loss, first.init_loss) and torch.equal(e.query_init_loss, first.query_init_loss)


def test_training_data_that_is_given_anew_keeps_the_samples(tmp_path: Path) -> None:
    """Loaders that are made again for every epoch, over other datasets."""

    class Anew(Net):
        def __init__(self) -> None:
            super().__init__()
            self.num_loaders = 0

        def train_dataloader(self) -> DataLoader[Any]:
            self.num_loaders += 1
            return DataLoader(tensors(models.SAMPLES * self.num_loaders), BATCH)

    monitor = probing(7, every_n_epochs=1)
    trainer = lambda: {"reload_dataloaders_every_n_epochs": 1}  # noqa: E731
    Scenario(Anew, dict, trainer).run(tmp_path, monitor)
    first, second = monitor.influences
    assert torch.equal(first.train_index, second.train_index)


def test_a_monitor_can_be_pickled_before_and_after_a_run(tmp_path: Path) -> None:
    """As strategies that spawn do."""
    import pickle

    monitor = probing(5, query=tensors(3))
    assert pickle.loads(pickle.dumps(monitor)).influences == []
    Scenario(Net, loaders).run(tmp_path, monitor)
    again = pickle.loads(pickle.dumps(monitor))
    assert [e.step for e in again.influences] == [4, 8, 12]


def test_the_key_of_a_state_says_what_was_asked_for_alone() -> None:
    """A setting that a later version adds is not in it: the checkpoints of this one are found."""
    key = SLTMonitor(every_n_train_steps=5, num_draws=50, nbeta=3.0).state_key
    assert "'num_draws': 50" in key and "'nbeta': 3.0" in key
    assert not {"num_burnin_steps", "second_moment", "tolerance_llc", "method"} & set(re.findall(r"'(\w+)'", key))


def test_monitors_that_look_at_other_samples_have_states_of_their_own() -> None:
    keys = [
        SLTMonitor(every_n_epochs=1, **probes).state_key
        for probes in ({}, {"probe": 8}, {"probe": 9}, {"probe": 9, "query": 2})
    ]  # type: ignore[arg-type]
    assert len(set(keys)) == 4
    assert "samples" not in keys[0]  # as it was before there were any: older checkpoints are found
