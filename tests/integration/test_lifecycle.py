"""Beginnings and ends: resuming, crashing, failing, stopping, two monitors, and smoke runs."""

from __future__ import annotations

import copy
import json
import pickle
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

from lightning_slt import SGLD, TransitionMonitor
from lightning_slt.record import RunRecord
from tests.integration import models
from tests.integration.harness import (
    Scenario,
    SLTMonitor,
    assert_same,
    flatten,
    rng_state,
    steps_of,
    tiny_monitor,
)
from tests.integration.models import Net, loaders, with_validation
from tests.integration.resuming import Stops, saving


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


@pytest.mark.parametrize("sampler", [None, SGLD(lr=1e-4)], ids=["calibrated", "given"])
def test_warm_firings_without_a_burnin(sampler: Optional[SGLD], tmp_path: Path) -> None:
    """Every firing but the first had been left out with an IndexError."""
    monitor = tiny_monitor(sampler=sampler, num_burnin_steps=0)
    Scenario(Net, loaders).run(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    assert all(e.num_burnin_steps == 0 for e in monitor.estimates[1:])


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


@pytest.mark.parametrize("execution", ["inline", pytest.param("background", marks=pytest.mark.slow)])
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
