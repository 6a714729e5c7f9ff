"""Beginnings and ends: resuming, crashing, failing, stopping, two monitors, and smoke runs."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint

from lightning_slt import TransitionMonitor
from lightning_slt.record import RunRecord
from tests.integration import models
from tests.integration.harness import (
    Scenario,
    SLTMonitor,
    assert_same,
    flatten,
    nothing_said_of,
    rng_state,
    steps_of,
    tiny_monitor,
)
from tests.integration.models import Net, loaders, with_validation

# ---------------------------------------------------------------------------------------------------- resume and crash


class Stops(Callback):
    """Ends the run after so many batches, by raising where an exception is given."""

    def __init__(self, after: int, exception: Optional[BaseException] = None) -> None:
        self.after, self.exception = after, exception

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.after and self.exception is not None:
            raise self.exception

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.after and self.exception is None:
            trainer.should_stop = True


def saving(folder: Path, *others: Callback) -> Callable[[], dict[str, Any]]:
    """A trainer that keeps a checkpoint of every step."""

    def make() -> dict[str, Any]:
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
        return {"callbacks": [*others, saver], "enable_checkpointing": True}

    return make


def stopped_at_5(folder: Path, *callbacks: Callback) -> str:
    """Train 5 of the 6 batches of the first epoch; the checkpoint."""
    Scenario(Net, loaders, saving(folder, Stops(5))).run(folder, *callbacks)
    return str(folder / "step=5.ckpt")


def resume(folder: Path, checkpoint: str, *callbacks: Callback) -> Any:
    return Scenario(Net, loaders).run(folder, *callbacks, ckpt_path=checkpoint)


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


def test_a_monitor_that_has_a_number_for_its_name_keeps_it(tmp_path: Path) -> None:
    monitors = [tiny_monitor(every_n_train_steps=k, name=n) for k, n in ((4, None), (6, None), (12, "2"), (3, None))]
    watch = TransitionMonitor("slt_2/llc/mean")
    trace = Scenario(Net, loaders).run(tmp_path, watch, *monitors)
    assert [m.prefix for m in monitors] == ["slt", "slt_3", "slt_2", "slt_4"]
    assert [m.folder.name for m in monitors if m.folder] == ["slt", "slt_3", "slt_2", "slt_4"]
    metrics = trace.trainer.callback_metrics
    for monitor in monitors:
        assert metrics[f"{monitor.prefix}/llc/mean"].item() == pytest.approx(monitor.estimates[-1].mean)
    assert watch.state_dict()["fed"] == 12 and steps_of(monitors[2]) == [12]


def test_two_instances_leave_training_the_same(tmp_path: Path) -> None:
    scenario, pair = Scenario(Net, loaders), [tiny_monitor(every_n_train_steps=k) for k in (4, 6)]
    assert_same(scenario.run(tmp_path), scenario.run(tmp_path, *pair))
    assert [steps_of(m) for m in pair] == [[4, 8, 12], [6, 12]]


def test_second_fit_with_the_same_monitor(tmp_path: Path) -> None:
    """A second run, of another module, starts at its own first step, and is measured there."""
    monitor = tiny_monitor(every_n_train_steps=6)
    Scenario(Net, loaders).run(tmp_path / "first", monitor)
    Scenario(models.Plain, loaders).run(tmp_path / "second", monitor)
    assert [(e.step, e.num_weights) for e in monitor.estimates[-2:]] == [(6, 10), (12, 10)]


def test_a_run_from_a_checkpoint_that_knows_nothing_of_the_monitor_is_another_run(tmp_path: Path) -> None:
    """In another trainer: it had gone on with the curve of the run before, in its folder, from its last step on."""
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=6)
    Scenario(Net, loaders, lambda: {"callbacks": [saver], "enable_checkpointing": True}).run(tmp_path / "bare")
    monitor, watch = tiny_monitor(every_n_train_steps=3), TransitionMonitor()
    Scenario(Net, loaders).run(tmp_path / "first", monitor, watch)
    folder = monitor.folder
    Scenario(Net, loaders).run(tmp_path / "second", monitor, watch, ckpt_path=str(tmp_path / "step=6.ckpt"))
    assert steps_of(monitor) == [9, 12] and watch.state_dict()["fed"] == 12
    assert folder is not None and monitor.folder is not None and monitor.folder != folder
    recorded = [[e.step for e in RunRecord(place).read()] for place in (folder, monitor.folder)]
    assert recorded == [[3, 6, 9, 12], [9, 12]]


class Begins(Callback):
    """Begins another run before the first batch of this one, and sees it through."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.other = run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.other()


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "from one checkpoint"])
def test_runs_at_the_same_time_in_one_root_keep_apart(resumed: bool, tmp_path: Path) -> None:
    """Without a logger both found a folder without a record, and each line of the curve was there twice."""
    checkpoint = None
    if resumed:
        make = saving(tmp_path, Stops(5))
        Scenario(Net, loaders, lambda: {"logger": False, **make()}).run(tmp_path, tiny_monitor())
        checkpoint = str(tmp_path / "step=5.ckpt")
    scenario, monitor, beside = Scenario(Net, loaders, lambda: {"logger": False}), tiny_monitor(), tiny_monitor()
    other = Begins(lambda: scenario.run(tmp_path, beside, ckpt_path=checkpoint))
    scenario.run(tmp_path, monitor, other, ckpt_path=checkpoint)
    assert (monitor.folder, beside.folder) == (tmp_path / "slt", tmp_path / "slt_run1")
    for folder in ("slt", "slt_run1"):
        assert [e.step for e in RunRecord(tmp_path / folder).read()] == [4, 8, 12]
        assert json.loads((tmp_path / folder / "summary.json").read_text())["num_estimates"] == 3


HOLDS = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_free_again_when_the_process_that_had_it_is_gone(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    scenario, folders = Scenario(Net, loaders, lambda: {"logger": False}), []
    (tmp_path / "slt").mkdir()
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "slt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        for _ in range(2):
            monitor = tiny_monitor()
            scenario.run(tmp_path, monitor)
            folders.append(monitor.folder.name if monitor.folder else None)
            holder.kill()
            holder.wait()
    assert folders == ["slt_run1", "slt"]


class CutOff(Net):
    """Ctrl-C in the middle of its fifth batch."""

    def on_after_backward(self) -> None:
        if self.global_step == 4:
            raise KeyboardInterrupt


def test_after_a_batch_that_was_cut_off_steps_are_one_ahead_of_the_global_step(tmp_path: Path) -> None:
    """Lightning's checkpoint has the batch among those that stepped, and not among the optimizer's steps."""
    saver = OnExceptionCheckpoint(tmp_path)
    settings: dict[str, Any] = {"every_n_train_steps": 1, "dirpath": str(tmp_path / "slt")}
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # which of them is up to Lightning's version
        Scenario(CutOff, loaders, lambda: {"enable_checkpointing": True}).run(tmp_path, tiny_monitor(**settings), saver)
    resumed = tiny_monitor(**settings)
    trace = Scenario(Net, loaders, lambda: {"max_steps": 8}).run(
        tmp_path / "b", resumed, ckpt_path=str(tmp_path / "on_exception.ckpt")
    )
    assert trace.trainer.global_step == 8 and steps_of(resumed) == [1, 2, 3, 4, 6, 7, 8, 9]


def test_fit_that_goes_on(tmp_path: Path) -> None:
    """The same trainer, told to train further."""
    monitor = tiny_monitor(every_n_train_steps=4)
    trace = Scenario(Net, loaders, lambda: {"max_epochs": 1}).run(tmp_path, monitor)
    assert steps_of(monitor) == [4]
    trace.trainer.fit_loop.max_epochs = 2
    trace.trainer.fit(trace.module, **loaders())
    assert steps_of(monitor) == [4, 8, 12]


# -------------------------------------------------------------------------------------------- smoke runs, sanity check


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("batches", [True, 3])
def test_fast_dev_run_is_one_minimal_chain_and_no_files(batches: Any, tmp_path: Path) -> None:
    monitor = SLTMonitor(every_n_train_steps=500)
    scenario = Scenario(Net, with_validation, lambda: {"fast_dev_run": batches})
    trace = scenario.assert_undisturbed(tmp_path, monitor)
    assert trace.num_batches == int(batches)
    assert [(e.num_chains, e.num_draws, e.num_steps_bw_draws) for e in monitor.estimates] == [(1, 4, 1)]
    assert monitor.estimates[0].seconds < 5
    assert files_under(tmp_path) == []


def test_fast_dev_run_makes_a_failure_a_failure(tmp_path: Path) -> None:
    monitor = SLTMonitor(every_n_train_steps=500, on_failure="warn")
    with pytest.raises(RuntimeError, match="inside a chain"):
        Scenario(models.RaisesInChain, loaders, lambda: {"fast_dev_run": True}).run(tmp_path, monitor)


class CountsAtSanityCheck(Callback):
    def __init__(self, monitor: SLTMonitor) -> None:
        self.monitor, self.count = monitor, -1

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.count = len(self.monitor.estimates)


@pytest.mark.parametrize("schedule", [{"every_n_train_steps": 1}, {"at_steps": [0, 1]}, {"every_n_epochs": 1}])
def test_sanity_check_does_not_fire(schedule: dict[str, Any], tmp_path: Path) -> None:
    monitor = tiny_monitor(**schedule)
    counts = CountsAtSanityCheck(monitor)
    Scenario(Net, with_validation, lambda: {"num_sanity_val_steps": 2, "max_steps": 6}).run(tmp_path, monitor, counts)
    assert counts.count == 0
    assert monitor.estimates


# --------------------------------------------------------------------------------------------------- failing in a chain


def test_exception_in_a_chain_warns_and_training_goes_on(tmp_path: Path) -> None:
    monitor = tiny_monitor(on_failure="warn")
    with pytest.warns(UserWarning, match=r"step 4 failed.*RuntimeError: the step failed inside a chain") as caught:
        Scenario(models.RaisesInChain, loaders).assert_undisturbed(tmp_path, monitor)
    assert monitor.estimates == []
    assert len([w for w in caught if "training goes on" in str(w.message)]) == 3


class NotFinite(Callback):
    """The weights are lost in the first steps, and taken back from a copy, as guards against a spike of the loss do."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            pl_module.load_state_dict(self.kept)
        if trainer.global_step == 0:
            self.kept = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 3:
            for parameter in pl_module.parameters():
                parameter.data.fill_(float("nan"))


@pytest.mark.parametrize("execution", ["inline", "background"])
def test_localization_is_that_of_the_first_weights_that_are_finite(execution: str, tmp_path: Path) -> None:
    beside = {"execution": "background", "devices": ["cpu"], "when_full": "wait"} if execution == "background" else {}
    monitor = tiny_monitor(on_failure="warn", at_steps=[3, 4, 8], **beside)
    kept = NotFinite()
    with pytest.warns(UserWarning, match=r"step 3 failed.*not finite"):
        Scenario(Net, loaders).run(tmp_path, kept, monitor)
    flat = torch.cat([kept.kept[name].flatten() for name, _ in Net().named_parameters()])
    gamma = len(flat) / float(flat.square().sum())
    assert [e.step for e in monitor.estimates] == [4, 8] and 1 < gamma < 100
    assert [e.localization for e in monitor.estimates] == pytest.approx([gamma] * 2, rel=0.05)


def test_exception_in_a_chain_raises_with_random_numbers_restored(tmp_path: Path) -> None:
    reference = Scenario(models.RaisesInChain, loaders).run(tmp_path)
    with pytest.raises(RuntimeError, match="inside a chain"):
        Scenario(models.RaisesInChain, loaders).run(tmp_path, tiny_monitor(on_failure="raise"))
    after = flatten({"rng": rng_state()})
    fourth = [state for moment, state in reference.snapshots if moment.startswith("after batch")][3]
    assert after["rng/python"] == fourth["rng/python"]
    assert torch.equal(after["rng/numpy/1"], fourth["rng/numpy/1"]) and after["rng/numpy/2"] == fourth["rng/numpy/2"]
    assert torch.equal(after["rng/torch"], fourth["rng/torch"])


# ------------------------------------------------------------------------------------------- stopping and saving on it


@pytest.mark.parametrize("stopper_first", [True, False])
@pytest.mark.parametrize("schedule", [{"every_n_train_steps": 4}, {"every_n_epochs": 1}])
def test_early_stopping_on_the_coefficient(stopper_first: bool, schedule: dict[str, Any], tmp_path: Path) -> None:
    """Below a threshold that any value is below: the run ends with its first epoch."""
    monitor = tiny_monitor(**schedule)
    stopper = EarlyStopping(
        "slt/llc/mean", mode="min", stopping_threshold=1e9, strict=True, check_on_train_epoch_end=True
    )
    callbacks = [stopper, monitor] if stopper_first else [monitor, stopper]
    trace = Scenario(Net, loaders).run(tmp_path, *callbacks)
    assert trace.trainer.global_step == 6
    assert len(monitor.estimates) == 1
    assert stopper.stopped_epoch == 0 and "Stopping threshold" in (stopper.stopping_reason_message or "")


def test_checkpoint_on_the_coefficient(tmp_path: Path) -> None:
    """The step of the largest value is the one that is kept."""
    monitor = tiny_monitor(every_n_train_steps=3)
    saver = ModelCheckpoint(
        tmp_path, "{step}", monitor="slt/llc/mean", mode="max", every_n_train_steps=3, save_on_train_epoch_end=False
    )
    trainer = lambda: {"callbacks": [saver], "enable_checkpointing": True}  # noqa: E731
    Scenario(Net, loaders, trainer).run(tmp_path, monitor)
    assert steps_of(monitor) == [3, 6, 9, 12]
    best = max(monitor.estimates, key=lambda e: e.mean)
    assert saver.best_model_score.item() == pytest.approx(best.mean)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [f"step={best.step}.ckpt"]


def test_monitored_key_is_there_before_the_first_firing(tmp_path: Path) -> None:
    """A strict saver that looks at every step must not end the run."""
    monitor = tiny_monitor(every_n_train_steps=4)
    saver = ModelCheckpoint(tmp_path, monitor="slt/diag/valid", mode="max", every_n_train_steps=1)
    trainer = lambda: {"callbacks": [saver], "enable_checkpointing": True}  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trace = Scenario(Net, loaders, trainer).run(tmp_path, monitor)
    assert trace.trainer.global_step == 12
    assert steps_of(monitor) == [4, 8, 12]


@pytest.mark.parametrize("validation", [False, True])
def test_a_monitored_coefficient_is_there_from_the_start_of_a_resumed_run(validation: bool, tmp_path: Path) -> None:
    """The first epoch after the resume has no firing: strict callbacks, which look at its end, have the last one."""
    data = with_validation if validation else loaders
    first, resumed = tiny_monitor(at_steps=[3, 20]), tiny_monitor(at_steps=[3, 20])
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    made = Scenario(Net, data, lambda: {"callbacks": [saver], "enable_checkpointing": True, "max_epochs": 1})
    made.run(tmp_path / "first", first)
    watchers = [
        EarlyStopping("slt/llc/mean", patience=50, strict=True, check_on_train_epoch_end=True),
        ModelCheckpoint(tmp_path / "best", "{step}", monitor="slt/llc/mean", save_top_k=-1),
    ]
    again = Scenario(Net, data, lambda: {"callbacks": watchers, "enable_checkpointing": True, "max_epochs": 4})
    again.run(tmp_path / "again", resumed, ckpt_path=str(tmp_path / "step=6.ckpt"))
    assert steps_of(resumed) == [3, 20]
    means = [torch.tensor(e.mean) for e in resumed.estimates]
    saved = {int(Path(path).stem[5:]): score for path, score in watchers[1].best_k_models.items()}  # type: ignore[attr-defined]
    assert saved == {12: means[0], 18: means[0], 24: means[1]}


def test_a_callback_goes_without_the_module_that_it_has_watched(tmp_path: Path) -> None:
    """Lightning leaves the module's ``log`` on every callback; this one's module is nothing that can be pickled."""

    class Local(Net):
        pass

    monitor, watch = tiny_monitor(), TransitionMonitor()
    Scenario(Local, loaders).run(tmp_path, monitor, watch)
    again, _ = pickle.loads(pickle.dumps((monitor, watch)))
    assert steps_of(again) == steps_of(copy.deepcopy(monitor)) == [4, 8, 12]
    assert "log" not in vars(again) and "log" in vars(monitor)
