"""Runs that are resumed: the history goes on, or another curve is said to begin."""

from __future__ import annotations

import json
import multiprocessing
import re
import warnings
from pathlib import Path
from typing import Optional

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slt import TransitionMonitor
from lightning_slt.record import RunRecord
from tests.integration import models
from tests.integration.harness import (
    Scenario,
    SLTMonitor,
    assert_same,
    nothing_said_of,
    steps_of,
    tiny_monitor,
)
from tests.integration.models import Net, loaders
from tests.integration.resuming import Stops, resume, saving, stopped_at_5


def test_resume_mid_epoch_is_the_same_and_goes_on_with_the_history(tmp_path: Path) -> None:
    first = tiny_monitor(every_n_train_steps=2)
    plain = stopped_at_5(tmp_path / "plain")
    monitored = stopped_at_5(tmp_path / "monitored", first)
    again = tiny_monitor(every_n_train_steps=2)
    without = resume(tmp_path / "plain", plain)
    with_monitor = resume(tmp_path / "monitored", monitored, again)
    assert without.num_batches == 7
    assert_same(without, with_monitor)
    assert steps_of(first) == [2, 4]
    assert steps_of(again) == [2, 4, 6, 8, 10, 12]
    assert [e.x for e in again.estimates] == [1, 3, 5, 7, 9, 11]
    for before, after in zip(first.estimates, again.estimates, strict=False):
        assert torch.equal(before.trace, after.trace) and before.mean == after.mean


def test_a_resume_with_another_restriction_is_said_to_measure_something_else(tmp_path: Path) -> None:
    """Without a name the restriction tells monitors apart, and nothing is gone on with."""
    checkpoint = stopped_at_5(tmp_path, tiny_monitor(every_n_train_steps=2, name="part", restrict="net.*"))
    part = tiny_monitor(every_n_train_steps=2, name="part", restrict="net.0.*")
    with pytest.warns(UserWarning, match=r"from step 6 on \d+ weights move, before it \d+ did.*name=") as caught:
        resume(tmp_path, checkpoint, part)
    assert sum("weights move" in str(w.message) for w in caught) == 1
    assert steps_of(part) == [2, 4, 6, 8, 10, 12]
    assert part.estimates[1].num_weights > part.estimates[2].num_weights > 0


def test_resumed_estimates_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """Data without an order to lose: the chains after a resume start from the same weights with the same settings."""
    scenario = Scenario(models.Plain, lambda: loaders(dataset=models.zeros(4), shuffle=False), saving(tmp_path))
    whole, resumed = tiny_monitor(every_n_train_steps=1), tiny_monitor(every_n_train_steps=1)
    scenario.run(tmp_path, whole)
    Scenario(scenario.module, scenario.data).run(tmp_path, resumed, ckpt_path=str(tmp_path / "step=1.ckpt"))
    assert steps_of(resumed) == steps_of(whole) == [1, 2]
    assert torch.equal(resumed.estimates[1].trace, whole.estimates[1].trace)


@pytest.mark.parametrize("exception", [RuntimeError("crash"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_crash_and_resume(exception: BaseException, tmp_path: Path) -> None:
    """Measured at 2, 4 and 6, dead at 7; from the checkpoint of step 4 on, 6 is measured again and recorded once."""
    crashed, again = (tiny_monitor(every_n_train_steps=2, dirpath=str(tmp_path / "slt")) for _ in range(2))
    persistent = lambda: loaders(num_workers=1, persistent_workers=True)  # noqa: E731
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        Scenario(Net, persistent, saving(tmp_path, Stops(7, exception))).run(tmp_path, crashed)
    assert steps_of(crashed) == [2, 4, 6]
    assert json.loads((tmp_path / "slt" / "summary.json").read_text())["status"] == "failed"
    for child in multiprocessing.active_children():  # the loader's own worker ends with its loader
        child.join(timeout=10)
    assert multiprocessing.active_children() == []

    resume(tmp_path, str(tmp_path / "step=4.ckpt"), again)
    assert steps_of(again) == [2, 4, 6, 8, 10, 12]
    recorded = [json.loads(line)["step"] for line in (tmp_path / "slt" / "estimates.jsonl").read_text().splitlines()]
    assert recorded == [2, 4, 6, 8, 10, 12]
    assert json.loads((tmp_path / "slt" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("others", [[], [4]], ids=["its first point", "a point before"])
def test_a_point_measured_after_the_checkpoint_of_its_step_is_in_the_resumed_history(
    others: list[int], tmp_path: Path
) -> None:
    """The checkpoint of the last batch is written before the end of the epoch, where the record gets the point."""
    first, again = (
        tiny_monitor(every_n_epochs=1, at_steps=others, probe=7, num_draws=20, measures=["influence", "susceptibility"])
        for _ in range(2)
    )
    watch = TransitionMonitor()
    Scenario(Net, loaders, lambda: {**saving(tmp_path)(), "max_epochs": 1}).run(tmp_path, first)
    resume(tmp_path, str(tmp_path / "step=6.ckpt"), again, watch)
    assert again.folder == first.folder
    assert steps_of(again) == [e.step for e in RunRecord(again.folder or "").read()] == [*others, 6, 12]
    assert [e.step for e in again.influences] == [e.step for e in again.susceptibilities] == [*others, 6, 12]
    assert [len(e.matrix) for e in again.influences] == [*(0 for _ in others), 0, 7]
    assert torch.equal(again.estimates[-2].trace, first.estimates[-1].trace)
    assert {e.localization for e in again.estimates} == {first.estimates[0].localization}
    assert watch.state_dict()["fed"] == 12


def test_callback_removed_on_resume_is_a_warning(tmp_path: Path) -> None:
    checkpoint = stopped_at_5(tmp_path, tiny_monitor(every_n_train_steps=2))
    with pytest.warns(UserWarning, match="SLTMonitor"):
        trace = resume(tmp_path, checkpoint)
    assert trace.trainer.global_step == 12


def test_callback_added_on_resume(tmp_path: Path) -> None:
    checkpoint = stopped_at_5(tmp_path)
    monitor = tiny_monitor(every_n_train_steps=2)
    resume(tmp_path, checkpoint, monitor)
    assert steps_of(monitor) == [6, 8, 10, 12]


def test_another_cadence_on_resume_is_said_to_begin_another_curve(tmp_path: Path) -> None:
    before = tiny_monitor(every_n_train_steps=2)
    checkpoint = stopped_at_5(tmp_path, before)
    again = tiny_monitor(every_n_train_steps=3)
    gamma = f"{before.estimates[0].localization:.4g}"
    with pytest.warns(UserWarning, match=rf"does not go on with.*name=.*localization={re.escape(gamma)} keeps"):
        resume(tmp_path, checkpoint, again)
    assert steps_of(again) == [6, 9, 12]


def test_with_a_name_another_cadence_goes_on(tmp_path: Path) -> None:
    checkpoint = stopped_at_5(tmp_path, tiny_monitor(every_n_train_steps=2, name="a"))
    again = tiny_monitor(every_n_train_steps=3, name="a")
    with nothing_said_of("SLTMonitor: the checkpoint"):
        resume(tmp_path, checkpoint, again)
    assert steps_of(again) == [2, 4, 6, 9, 12]
    assert len({e.localization for e in again.estimates}) == 1


def test_a_callback_added_on_resume_keeps_its_cadence(tmp_path: Path) -> None:
    """Also where the checkpoint is of a step of it: the step after had been measured."""
    Scenario(Net, loaders, saving(tmp_path)).run(tmp_path)
    monitor = tiny_monitor(every_n_train_steps=4)
    resume(tmp_path, str(tmp_path / "step=4.ckpt"), monitor)
    assert steps_of(monitor) == [8, 12]


@pytest.mark.parametrize("restrict", [None, ["net.4.*"], ["net.0.*"]])
def test_checkpoint_loads_with_weights_only(restrict: Optional[list[str]], tmp_path: Path) -> None:
    monitor = tiny_monitor(every_n_train_steps=2, restrict=restrict)
    checkpoint = torch.load(stopped_at_5(tmp_path, monitor), weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "SLTMonitor" in k]
    assert [e["step"] for e in state["estimates"]] == [2, 4]
    again = tiny_monitor(every_n_train_steps=2)
    again.load_state_dict(state)
    assert torch.equal(again.estimates[1].trace, monitor.estimates[1].trace)
    assert torch.equal(again.estimates[1].per_chain, monitor.estimates[1].per_chain)


@pytest.mark.parametrize("names", [("head", "body"), (None, None)], ids=["named", "numbered"])
def test_two_instances_keep_apart(names: tuple[Optional[str], Optional[str]], tmp_path: Path) -> None:
    def pair() -> list[SLTMonitor]:
        parts = ("net.4.*", "net.0.*")
        return [tiny_monitor(every_n_train_steps=2, restrict=r, name=n) for r, n in zip(parts, names, strict=True)]

    first, again = pair(), pair()
    checkpoint = stopped_at_5(tmp_path, *first)
    trace = resume(tmp_path, checkpoint, *again)
    assert [steps_of(m) for m in again] == [[2, 4, 6, 8, 10, 12]] * 2
    assert [{e.num_weights for e in m.estimates} for m in again] == [{18}, {40}]
    for before, after in zip(first, again, strict=True):
        assert torch.equal(before.estimates[1].trace, after.estimates[1].trace)
    prefixes = [f"slt_{n}" for n in names] if names[0] else ["slt", "slt_2"]
    for prefix, monitor in zip(prefixes, again, strict=True):
        assert trace.trainer.callback_metrics[f"{prefix}/llc/mean"].item() == pytest.approx(monitor.estimates[-1].mean)
    assert len({m.folder for m in again}) == 2


@pytest.mark.parametrize("names", [(None, None), ("a", "b")], ids=["numbered", "named"])
def test_monitors_in_another_order_on_resume_are_said_to_have_other_keys(
    names: tuple[Optional[str], Optional[str]], tmp_path: Path
) -> None:
    """Curves go on in their folders, and where only numbers tell the keys apart these have changed hands."""
    make = lambda: [tiny_monitor(every_n_train_steps=n, name=name) for n, name in zip((2, 3), names, strict=True)]  # noqa: E731
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1, save_on_train_epoch_end=False)
    first, again = make(), make()
    Scenario(Net, loaders, lambda: {"enable_checkpointing": True}).run(tmp_path, *first, saver)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(Net, loaders).run(tmp_path, *again[::-1], ckpt_path=str(tmp_path / "step=6.ckpt"))
    said = [text.split(" in the run")[0] for text in (str(w.message) for w in caught) if "keys of this" in text]
    began = "the keys of this monitor began with"
    swapped = [f"SLTMonitor: {began} 'slt_2/'", f"SLTMonitor (slt_2): {began} 'slt/'"]
    assert said == ([] if names[0] else swapped)
    assert [m.folder for m in again] == [m.folder for m in first]
