"""The loss of a module: what its step may return and take, what is refused, what is silenced."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn

from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.stand_ins import Silenced
from lightning_slt.sampling.steps import (
    NoLossError,
    ReadThroughTrainer,
    loss_function,
    mean_loss,
    read_losses,
    runs_muted,
)
from tests.sampling.helpers import WithMetric, mean_squared, mlp

BATCH = (torch.ones(2, 3), torch.zeros(2, 1))


class Base(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def value(self, batch: Any) -> Tensor:
        return mean_squared(self.net, batch)


class ReturnsDict(Base):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.value(batch), "batch": batch_idx}


class OneArgument(Base):
    def training_step(self, batch: Any) -> Tensor:
        return self.value(batch)


class NowAndThen(Base):
    """Says something at the first of so many batches, and has another loss at every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.said += [k for k in (3, 10, 50, 100) if batch_idx % k == 0]
        self.said += [0] if batch_idx == 0 else []
        return self.value(batch) * (1.0 if batch_idx % 2 == 0 else 2.0)


class AnyArguments(Base):
    def training_step(self, *args: Any) -> Tensor:
        batch, index = args
        assert index == 2
        return self.value(batch)


class Keyword(Base):
    def training_step(self, batch: Any, *, scale: float = 1.0) -> Tensor:
        return scale * self.value(batch)


class Defaulted(Base):
    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        assert (batch_idx, dataloader_idx) == (2, 0)
        return self.value(batch)


class PerSample(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return 0.5 * (self.net(x) - y).square().sum(-1)


def test_what_a_step_does_now_and_then_it_does_at_no_call_of_the_chains() -> None:
    module = NowAndThen()
    loss = loss_function(module)(module, BATCH)
    assert module.said == []
    assert torch.equal(loss, module.value(BATCH))  # of the even ones, as at the first batch


@pytest.mark.parametrize("kind", [ReturnsDict, OneArgument, AnyArguments, Keyword, Defaulted, PerSample])
def test_forms_of_the_step(kind: type[Base]) -> None:
    module = kind()
    objective = Objective(module)
    assert objective.loss(BATCH).shape == ()
    assert float(objective.loss(BATCH).detach()) == pytest.approx(float(module.value(BATCH).detach()), rel=1e-6)


def test_forms_of_the_loss() -> None:
    assert mean_loss(read_losses(torch.tensor([1.0, 3.0]))).item() == 2.0
    assert mean_loss(read_losses({"loss": torch.tensor(2.0), "other": None})).item() == 2.0
    for nothing in (None, {"loss": None}, {}):
        with pytest.raises(NoLossError):
            read_losses(nothing)
    for wrong in (1.0, {"loss": 1.0}, "loss"):
        with pytest.raises(TypeError, match=r"the loss must be a tensor.*got (float|str)"):
            read_losses(wrong)


def test_dataloader_iter_is_refused_with_the_remedy() -> None:
    class Iter(Base):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            raise AssertionError

    with pytest.raises(ValueError, match=r"Iter.*dataloader_iter.*loss_fn\(module, batch\)"):
        loss_function(Iter())
    assert loss_function(Iter(), lambda m, b: m.value(b))(Iter(), BATCH).ndim == 0


def test_manual_optimisation_is_refused_and_taken_with_a_loss_fn() -> None:
    class Manual(Base):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=r"Manual uses manual optimisation.*loss_fn\(module, batch\)"):
        Objective(Manual())
    module = Manual()
    assert float(Objective(module, lambda m, b: m.value(b)).loss(BATCH).detach()) == pytest.approx(
        float(module.value(BATCH).detach())
    )


def test_a_plain_module_needs_a_loss_fn() -> None:
    with pytest.raises(ValueError, match=r"loss_fn is None, and Sequential is not a LightningModule"):
        Objective(mlp())


def test_what_the_step_logs_goes_nowhere_and_its_metric_does_not_grow() -> None:
    module = WithMetric()
    objective = Objective(module)
    batch = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    objective.adapt(batch)
    counted = objective.module.accuracy._update_count
    for _ in range(3):
        objective.loss(batch)
    assert objective.module.accuracy._update_count == counted
    assert module.accuracy._update_count == 0 and objective.module.log("x", 1.0) is None
    assert "log" not in module.__dict__


def test_a_loss_that_is_a_metric_is_not_stubbed() -> None:
    from torchmetrics import MeanSquaredError

    class MetricLoss(Base):
        def __init__(self) -> None:
            super().__init__()
            self.error = MeanSquaredError()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.error(self.net(batch[0]), batch[1])

    module = MetricLoss()
    objective = Objective(module)
    objective.adapt(BATCH)
    expected = (module.net(BATCH[0]) - BATCH[1]).square().mean().item()
    assert float(objective.loss(BATCH).detach()) == pytest.approx(expected, rel=1e-5)


def test_the_trainer_is_read_through_and_never_written() -> None:
    live = SimpleNamespace(current_epoch=7, global_step=5, logger=object())
    view = ReadThroughTrainer(live)
    assert (view.current_epoch, view.global_step) == (7, 5)
    view.current_epoch = 9
    assert (view.current_epoch, live.current_epoch) == (9, 7)
    assert view.logger is not live.logger and view.loggers == []
    view.logger.experiment.add_scalar("x", 1.0)  # silent
    with pytest.raises(AttributeError):
        view.missing  # noqa: B018


class OwnLogger(CSVLogger):
    """Counts its experiments; another process cannot find the class by its name."""

    opened = 0

    @property
    def experiment(self) -> Any:
        self.opened += 1
        return super().experiment


OwnLogger.__qualname__ = "somewhere.OwnLogger"


def test_loggers_have_their_class_and_their_plain_values_and_log_nothing(tmp_path: Path) -> None:
    table = OwnLogger(tmp_path, "table", 7)
    others = WandbLogger(save_dir=str(tmp_path), offline=True, project="p"), TensorBoardLogger(tmp_path / "tb", "net")
    view = ReadThroughTrainer(SimpleNamespace(loggers=[table, *others]))
    first, second, third = view.loggers
    assert view.logger is first
    assert [next(x for x in view.loggers if isinstance(x, kind)) for kind in (WandbLogger, TensorBoardLogger)] == [
        second,
        third,
    ]
    assert isinstance(first, CSVLogger) and isinstance(first, Logger) and not isinstance(first, WandbLogger)
    assert (first.log_dir, first.root_dir, first.save_dir) == (table.log_dir, table.root_dir, str(tmp_path))
    assert (first.name, f"{first.version:03d}", second.name, third.name) == ("table", "007", "p", "net")
    assert os.path.join(third.log_dir, "samples") == str(tmp_path / "tb/net/version_0/samples")
    assert hasattr(first, "log_metrics") and not hasattr(first, "log_image") and hasattr(second, "log_image")
    for logger in view.loggers:
        logger.log_metrics({"x": 1.0}, step=3)
        logger.experiment.config["x"] = logger.experiment.add_scalar("x", 1.0)[0]
        with logger.experiment.train() as run:
            assert list(run.rows) == []
        logger.mine = 3
        assert logger.mine == 3
    assert not hasattr(table, "mine")
    assert table.opened == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_silent_logger_has_what_it_had_and_not_the_logger(copied: Any, tmp_path: Path) -> None:
    table = OwnLogger(tmp_path, "table", 7)
    silenced = Silenced(table)
    silenced.mine = 3
    again = Silenced(copied(silenced))
    folder, table._version = table.log_dir, 8
    assert (again.log_dir, again.name, again.version, again.mine) == (folder, "table", 7, 3)
    assert isinstance(again, CSVLogger) and hasattr(again, "log_metrics") and not hasattr(again, "log_image")
    again.experiment.log_metrics({"x": 1.0})
    again.log_metrics({"x": 1.0})
    assert table.opened == 0 and list(tmp_path.iterdir()) == []


def test_a_trainer_without_loggers_has_none_for_chains_either() -> None:
    view = ReadThroughTrainer(SimpleNamespace(loggers=[]))
    assert view.logger is None and view.loggers == []


def test_outside_a_trainer_there_is_one_silent_logger() -> None:
    view = ReadThroughTrainer(None)
    (only,) = view.loggers
    only.experiment.add_scalar("x", 1.0)
    assert view.logger is only and copy.deepcopy(only) is only and pickle.loads(pickle.dumps(only)) is only


def test_outside_a_trainer_the_usual_attributes_are_there_and_others_say_what_to_do() -> None:
    view = ReadThroughTrainer(None)
    assert (view.current_epoch, view.global_step, view.world_size) == (0, 0, 1)
    with pytest.raises(AttributeError, match=r"trainer\.datamodule.*no trainer here.*loss_fn"):
        view.datamodule  # noqa: B018


def test_outside_a_trainer_what_a_step_writes_stays_with_its_module() -> None:
    """Two modules that are measured in one process at once; a module reads back what it wrote."""
    one, other = ReadThroughTrainer(None), ReadThroughTrainer(None)
    for metrics in (one.callback_metrics, one.logged_metrics):
        metrics["loss"] = torch.tensor(1.0)
    one.optimizers.append("mine")
    assert list(one.callback_metrics) == list(one.logged_metrics) == ["loss"] and one.optimizers == ["mine"]
    assert other.callback_metrics == other.logged_metrics == {} and other.optimizers == []
    assert ReadThroughTrainer(None).callback_metrics == {}


def test_outside_a_trainer_there_are_no_optimizers() -> None:
    """A step that counts them goes on; one that asks for the first is told what to give."""
    found = ReadThroughTrainer(None).optimizers
    assert list(found) == [] and found[:1] == [] and not found
    for kind in (AttributeError, IndexError):  # as it was, for a step that does without
        with pytest.raises(kind, match=r"^training_step reads trainer\.optimizers\[0\], .*no trainer here.*loss_fn"):
            found[0]


def test_a_thread_beside_the_step_goes_on_sending_to_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that wait for a server are sent while chains run; what the step sends, in whichever thread, is not."""
    sent: list[str] = []

    class Run:
        def log(self, row: str) -> None:
            sent.append(row)

    run = Run()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=run, log=run.log))
    wandb = sys.modules["wandb"]
    began, done = threading.Event(), threading.Event()

    def publish() -> None:
        began.wait(5.0)
        run.log("row of a firing")
        wandb.log("line of a watcher")
        done.set()

    beside = threading.Thread(target=publish)
    beside.start()
    with runs_muted():
        run.log("by the step")
        wandb.log("by the step")
        of_the_step = threading.Thread(target=run.log, args=("by a thread of the step",))
        of_the_step.start()
        of_the_step.join()
        began.set()
        assert done.wait(5.0)
    beside.join()
    assert sent == ["row of a firing", "line of a watcher"]
    run.log("after")
    assert sent[-1] == "after" and "log" not in vars(run)
