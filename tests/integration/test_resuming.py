"""A checkpoint that comes before the firing at its step: the point is measured when training resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import Tensor

from lightning_slt.record import RunRecord
from tests.integration import models
from tests.integration.harness import Scenario, assert_same, nothing_said_of, steps_of, tiny_monitor
from tests.integration.models import Net, loaders


class SavesFirst(Callback):
    """Keeps a checkpoint at an end, of a batch or an epoch, before the callbacks that come after it have their turn."""

    def __init__(self, path: Path, step: int, hook: str = "on_train_batch_end") -> None:
        self.path, self.step = path, step
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("schedule", "step", "steps", "end"),
    [
        pytest.param({"every_n_train_steps": 2}, 4, [2, 4, 6, 8, 10, 12], "batch", id="steps"),
        pytest.param({"every_n_train_steps": 2}, 5, [2, 4, 6, 8, 10, 12], "batch", id="not due"),
        pytest.param({"at_steps": [3, 12]}, 12, [3, 12], "batch", id="the last step"),
        pytest.param({"every_n_epochs": 1}, 6, [6, 12], "batch", id="epochs"),
        pytest.param({"every_n_epochs": 1, "at_steps": [6]}, 6, [6, 12], "batch", id="both"),
        pytest.param({"every_n_epochs": 1}, 6, [6, 12], "epoch", id="at the end of an epoch"),
        pytest.param({"every_n_epochs": 2}, 6, [12], "epoch", id="at the end of an epoch that is not due"),
        pytest.param({"every_n_train_steps": 3}, 6, [3, 6, 9, 12], "epoch", id="measured before the end of the epoch"),
    ],
)
@pytest.mark.parametrize("kept", [True, False], ids=["record kept", "record lost"])
def test_the_point_of_a_checkpoint_written_before_its_firing_is_measured_on_resume(
    schedule: dict[str, Any], step: int, steps: list[int], end: str, kept: bool, tmp_path: Path
) -> None:
    """Its weights are those that are restored: the point is that of the run that was not broken off."""
    whole, again = tiny_monitor(**schedule), tiny_monitor(**schedule)
    saver = SavesFirst(tmp_path / "saved.ckpt", step, f"on_train_{end}_end")
    Scenario(Net, loaders, lambda: {"callbacks": [saver]}).run(tmp_path, whole)
    if not kept and whole.folder is not None:
        shutil.rmtree(whole.folder)
    plain, monitored = (
        Scenario(Net, loaders).run(tmp_path, *callbacks, ckpt_path=str(saver.path)) for callbacks in ([], [again])
    )
    assert_same(plain, monitored)
    assert steps_of(again) == steps_of(whole) == steps == [e.step for e in RunRecord(again.folder or "").read()]
    for before, after in zip(whole.estimates, again.estimates, strict=True):
        if before.step is not None and before.step <= step:
            assert torch.equal(before.trace, after.trace) and before.x == after.x


class Mended(Net):
    """Fails in the chains of the second firing until it is mended."""

    broken = True

    def loss(self, batch: Any) -> Tensor:
        if self.broken and not self.training and self.trainer.global_step == 4:
            raise RuntimeError("inside a chain")
        return super().loss(batch)


@pytest.mark.parametrize("schedule", [{"every_n_train_steps": 2}, {"at_steps": [2, 4, 12]}], ids=["steps", "named"])
def test_a_failure_that_ended_the_run_is_measured_on_resume(
    schedule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that is written then is of the weights that were to be measured."""
    first, again, whole = (tiny_monitor(**schedule, on_failure="raise") for _ in range(3))
    saver = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(RuntimeError, match="inside a chain"):
        Scenario(Mended, loaders, lambda: {"enable_checkpointing": True}).run(tmp_path / "a", first, saver)
    monkeypatch.setattr(Mended, "broken", False)
    Scenario(Mended, loaders).run(tmp_path / "a", again, ckpt_path=str(tmp_path / "failed.ckpt"))
    Scenario(Mended, loaders).run(tmp_path / "b", whole)
    assert steps_of(first) == [2] and steps_of(again) == steps_of(whole)
    assert torch.equal(again.estimates[1].trace, whole.estimates[1].trace)


def test_a_point_that_cannot_be_measured_on_resume_is_said_to_be_left_out(tmp_path: Path) -> None:
    """Chains replay what training has seen, and after a resume it has seen nothing yet."""
    saver = SavesFirst(tmp_path / "saved.ckpt", 4)
    first, again = (tiny_monitor(every_n_train_steps=2, num_samples=24) for _ in range(2))
    streamed = lambda: loaders(dataset=models.Stream())  # noqa: E731
    Scenario(Net, streamed, lambda: {"callbacks": [saver]}).run(tmp_path, first)
    with pytest.warns(UserWarning, match="SLTMonitor: the measurement at step 4 is left out: the checkpoint"):
        Scenario(Net, streamed).run(tmp_path, again, ckpt_path=str(saver.path))
    assert steps_of(again)[:3] == [2, 6, 8]


class FailsAtTheEnd(Callback):
    """At the end of the last epoch, before the monitor's turn."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == trainer.max_epochs - 1:  # type: ignore[operator]
            raise RuntimeError("at the end")


LEFT_OUT = "SLTMonitor: the measurement at step 12 is left out: the checkpoint was written before it, and nothing"


def test_a_point_is_said_to_be_left_out_where_nothing_is_left_to_train(tmp_path: Path) -> None:
    """Lightning does not start to train then; with more epochs it does, and the point is made up for."""
    first, again, longer = (tiny_monitor(every_n_epochs=1) for _ in range(3))
    saver = OnExceptionCheckpoint(tmp_path, "failed")
    failing = Scenario(Net, loaders, lambda: {"callbacks": [FailsAtTheEnd()], "enable_checkpointing": True})
    with pytest.raises(RuntimeError, match="at the end"):
        failing.run(tmp_path, first, saver)
    with pytest.warns(UserWarning, match=LEFT_OUT):
        Scenario(Net, loaders).run(tmp_path, again, ckpt_path=str(tmp_path / "failed.ckpt"))
    assert steps_of(first) == steps_of(again) == [6] and again.folder == first.folder is not None
    more = Scenario(Net, loaders, lambda: {"max_epochs": 3})
    more.run(tmp_path, longer, ckpt_path=str(tmp_path / "failed.ckpt"))
    assert steps_of(longer) == [6, 12, 18]


@pytest.mark.parametrize("is_kept", [True, False], ids=["from its end", "from before its last point"])
def test_nothing_is_said_where_a_finished_run_is_resumed(is_kept: bool, tmp_path: Path) -> None:
    """Also where the record alone has the last point."""
    saver = SavesFirst(tmp_path / "saved.ckpt", 12, "on_train_end" if is_kept else "on_train_epoch_end")
    first, again = (tiny_monitor(every_n_epochs=1) for _ in range(2))
    Scenario(Net, loaders, lambda: {"callbacks": [saver]}).run(tmp_path, first)
    with nothing_said_of(".*is left out"):
        Scenario(Net, loaders).run(tmp_path, again, ckpt_path=str(saver.path))
    assert steps_of(first) == [6, 12] and steps_of(again) == ([6, 12] if is_kept else [6])
    assert again.folder == first.folder is not None
