"""Transitions across a crash, a resume and a second run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slt import TransitionMonitor
from tests.integration.harness import RecordingLogger, Scenario
from tests.integration.models import Plain, loaders
from tests.integration.scripted import Scripted
from tests.integration.watching import EPOCHS, Stepped, train


class Dies(Callback):
    """Raises at the start of the batch after so many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.after:
            raise RuntimeError("the power is gone")


def watched(folder: Path) -> tuple[Scripted, TransitionMonitor]:
    return Scripted(dirpath=str(folder / "slt")), TransitionMonitor()


def known(watch: TransitionMonitor) -> list[dict[str, Any]]:
    """All that is known, with the pinned files by their names."""
    plain = [report.as_dict() for report in watch.reports]
    return [{**r, "checkpoints": {k: Path(v).name for k, v in r["checkpoints"].items()}} for r in plain]


@pytest.mark.parametrize(
    ("saved", "dead"),
    [
        pytest.param(30, 33, marks=pytest.mark.slow),
        (31, 40),
        pytest.param(33, 45, marks=pytest.mark.slow),
        pytest.param(20, 21, marks=pytest.mark.slow),
    ],
)
def test_crash_and_resume_gives_the_transitions_of_an_uninterrupted_run(saved: int, dead: int, tmp_path: Path) -> None:
    """The checkpoint is from before the flag, or after it; the crash before the verdict, or after it."""
    reference = watched(tmp_path / "whole")
    Scenario(Stepped, loaders, lambda: dict(EPOCHS)).run(tmp_path / "whole", *reference)
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="the power is gone"):
        Scenario(Stepped, loaders, lambda: {**EPOCHS, "enable_checkpointing": True}).run(
            tmp_path, *watched(tmp_path), saver, Dies(dead)
        )
    (tmp_path / "slt" / "snapshots" / "step_000000099.pt.tmp").write_bytes(b"half a file")
    checkpoint = str(tmp_path / f"step={saved}.ckpt")
    state = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert [key for key in state if key.startswith("TransitionMonitor")] == [reference[1].state_key]
    again = watched(tmp_path)
    Scenario(Stepped, loaders, lambda: dict(EPOCHS)).run(tmp_path, *again, ckpt_path=checkpoint)
    assert again[1].transitions == reference[1].transitions and len(again[1].transitions) == 1
    assert again[1].boundaries == reference[1].boundaries == [30.0]
    assert known(again[1]) == known(reference[1])
    for folder in ("snapshots", "pinned"):
        names = [sorted(p.name for p in (m.folder / folder).iterdir()) for m in (again[0], reference[0])]
        assert names[0] == names[1]


class Bell(RecordingLogger):
    """A logger that can tell a person."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    @property
    def experiment(self) -> Any:
        return self

    def send_notification(self, title: str, **_: Any) -> None:
        self.told.append(title)

    def log_other(self, *_: Any, **__: Any) -> None:
        pass  # with the next two, what tells the publisher that a logger is of Comet's kind

    log_figure = log_table = log_other


@pytest.mark.parametrize("saved", [30, 45])
def test_an_alert_is_sent_once_across_a_crash_and_a_resume(saved: int, tmp_path: Path) -> None:
    """From a checkpoint before the flag, which the resumed run finds again, and from one after it."""
    bell = Bell()
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(tmp_path, *watched(tmp_path), saver, Dies(50), enable_checkpointing=True, logger=bell)
    assert len(bell.told) == 1
    monitor, watch = watched(tmp_path)
    Scenario(Plain, loaders, lambda: {**EPOCHS, "logger": bell}).run(
        tmp_path, monitor, watch, ckpt_path=str(tmp_path / f"step={saved}.ckpt")
    )
    assert len(watch.transitions) == len(bell.told) == 1


def test_a_new_run_is_told_of_its_own_transitions(tmp_path: Path) -> None:
    bell = Bell()
    for _ in range(2):
        train(tmp_path, *watched(tmp_path), logger=bell)
    assert len(bell.told) == 2


def test_a_monitor_that_is_added_on_resume_has_the_curve_before(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(RuntimeError):
        train(tmp_path, watched(tmp_path)[0], saver, Dies(25), enable_checkpointing=True)
    monitor, watch = watched(tmp_path)
    Scenario(Plain, loaders, lambda: dict(EPOCHS)).run(
        tmp_path, monitor, watch, ckpt_path=str(tmp_path / "step=24.ckpt")
    )
    whole = TransitionMonitor()
    train(tmp_path / "whole", Scripted(), whole)
    assert watch.transitions == whole.transitions and len(whole.transitions) == 1


def test_a_second_run_of_the_same_object_starts_afresh(tmp_path: Path) -> None:
    monitor, watch = Scripted(), TransitionMonitor()
    train(tmp_path / "a", monitor, watch)
    first = watch.transitions
    train(tmp_path / "b", monitor, watch)
    assert watch.transitions == first and len(first) == 1
