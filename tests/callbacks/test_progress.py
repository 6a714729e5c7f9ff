"""The line of a long firing: shown with the trainer's bar, silent without it, and never the end of a measurement."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader, TensorDataset

from lightning_slt import SLTMonitor
from lightning_slt.callbacks import progress


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(tmp_path: Any, **settings: Any) -> SLTMonitor:
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 2, generator=g), torch.randn(32, 1, generator=g))
    callbacks = settings.pop("callbacks", [])
    monitor = SLTMonitor(every_n_train_steps=2, num_chains=2, num_draws=4, num_burnin_steps=2, on_failure="raise")
    trainer = Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[*callbacks, monitor], **settings,
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(data, 8))
    return monitor


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_a_long_firing_shows_a_line_with_either_bar(bar: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    original = progress.FiringProgress._show

    def show(self: progress.FiringProgress, text: str) -> None:
        original(self, text)
        shown.append(text)

    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress.FiringProgress, "_show", show)
    monitor = fit(tmp_path, callbacks=[bar()])
    assert [e.step for e in monitor.estimates] == [2, 4]
    assert shown and all("chain-steps" in text for text in shown)
    assert {text.split(":")[0] for text in shown} == {"slt at step 2", "slt at step 4"}


def test_it_is_silent_where_the_bar_is_disabled(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress.FiringProgress, "_show", lambda self, text: shown.append(text))
    assert len(fit(tmp_path, enable_progress_bar=False).estimates) == 2
    assert shown == []


def test_what_tells_of_no_steps_is_checked_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes at every reading of samples, thousands of times a second."""
    shown: list[str] = []
    checked: list[bool] = []
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress.FiringProgress, "_show", lambda self, text: shown.append(text))
    trainer: Any = SimpleNamespace(progress_bar_callback=TQDMProgressBar(), is_global_zero=True)
    line = progress.FiringProgress(trainer, "slt", lambda: checked.append(True))
    for steps in (0, 0, 7, 0):
        line(steps)
    assert len(checked) == 4 and [text.split(",")[0] for text in shown] == ["slt: 7 chain-steps"]


def test_a_line_that_fails_costs_no_measurement(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def show(self: progress.FiringProgress, text: str) -> None:
        raise RuntimeError("the terminal is gone")

    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress.FiringProgress, "_show", show)
    assert [e.step for e in fit(tmp_path, callbacks=[TQDMProgressBar()]).estimates] == [2, 4]
