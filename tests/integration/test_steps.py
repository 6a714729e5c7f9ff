"""Every form of training step and every kind of module: measured, or refused before training with the reason."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_slt import SGNHT, SLTMonitor, estimate_llc
from tests.integration import models
from tests.integration.harness import Scenario, quiet_trainer, steps_of, tiny_monitor
from tests.integration.models import Net, loaders

FORMS: dict[str, type[Net]] = {
    "returns a dict": models.ReturnsDict,
    "takes the batch only": models.OneArgument,
    "returns None for some batches": models.SometimesNone,
}


@pytest.mark.parametrize("module", FORMS.values(), ids=FORMS)
def test_form_of_the_training_step(module: type[Net], tmp_path: Path) -> None:
    monitor = tiny_monitor(every_n_epochs=1)
    Scenario(module, loaders).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 2
    assert all(e.trace.isfinite().all() and e.finite_share == 1.0 for e in monitor.estimates)


def refusal(module: Any, folder: Path, **settings: Any) -> str:
    """What the monitor says when it refuses to set up; no batch has been trained on."""
    with pytest.raises(MisconfigurationException) as raised:
        Scenario(lambda: module, loaders).run(folder, tiny_monitor(**settings))
    assert module.trainer.fit_loop.epoch_loop.batch_progress.total.ready == 0
    return str(raised.value)


@pytest.mark.parametrize(
    ("module", "cause"),
    [(models.TakesIterator, "dataloader_iter"), (models.Manual, "manual"), (models.TwoOptimizers, "manual")],
)
def test_step_without_a_loss_of_a_batch_is_refused(module: type[Any], cause: str, tmp_path: Path) -> None:
    message = refusal(module(), tmp_path)
    assert cause in message and "loss_fn" in message


def test_manual_optimisation_with_a_loss_function(tmp_path: Path) -> None:
    monitor = tiny_monitor(loss_fn=models.loss_of_net)
    Scenario(models.Manual, loaders).assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]


def test_dataloader_iter_with_a_loss_function(tmp_path: Path) -> None:
    monitor = tiny_monitor(loss_fn=lambda module, batch: models.Plain.training_step(module, batch, 0))
    Scenario(models.TakesIterator, loaders).assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]


def test_two_optimisers_keep_the_x_axis_of_the_loss_curve(tmp_path: Path) -> None:
    """``global_step`` is 24 after 12 batches; the loggers count 12."""
    monitor = tiny_monitor(loss_fn=models.loss_of_net)
    scenario = Scenario(models.TwoOptimizers, loaders, lambda: {"log_every_n_steps": 1})
    trace = scenario.assert_undisturbed(tmp_path, monitor)
    assert trace.trainer.global_step == 24
    curve = [step for metrics, step in trace.rows if "loss" in metrics]
    assert curve == list(range(12))
    assert [e.x for e in monitor.estimates] == [curve[3], curve[7], curve[11]]


# --------------------------------------------------------------------------------------------- modules that do not copy


UNCOPYABLE: dict[str, Callable[[], Net]] = {
    "cached tensor with a history": models.CachesActivation,
    "lock": lambda: models.Holds(lambda _: threading.Lock()),
    "event in a list": lambda: models.Holds(lambda _: [threading.Event()]),
    "torch generator": lambda: models.Holds(lambda _: models.torch.Generator().manual_seed(3)),
    "file handle": lambda: models.Holds(lambda _: open(__file__)),  # noqa: SIM115
    "legacy weight_norm": models.OldWeightNorm,
    "python generator": lambda: models.Holds(lambda _: (i for i in range(3))),
    "Python modules": lambda: models.Holds(lambda _: [torch.nn.functional, json]),
    "executor": lambda: models.Holds(lambda _: ThreadPoolExecutor(1)),
    "event loop": lambda: models.Holds(lambda _: asyncio.new_event_loop()),
    "memory view": lambda: models.Holds(lambda _: memoryview(b"abc")),
}


@pytest.mark.parametrize("method", ["sequential", "auto"])
@pytest.mark.parametrize("module", UNCOPYABLE.values(), ids=UNCOPYABLE)
def test_module_that_cannot_be_copied(module: Callable[[], Net], method: str, tmp_path: Path) -> None:
    monitor = tiny_monitor(method=method)
    Scenario(module, loaders).assert_undisturbed(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    assert all(e.trace.abs().min() > 0 for e in monitor.estimates)


def test_attribute_that_blocks_the_copy_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = tiny_monitor()
    Scenario(UNCOPYABLE["memory view"], loaders).run(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    assert "Holds.held" in caplog.text


@pytest.mark.parametrize("blocked", [False, True], ids=["in a copy", "in place"])
def test_a_python_module_is_neither_copied_nor_looked_through(
    blocked: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All that was ever imported was copied piece by piece, which took seconds a firing and could end the process."""
    settings = types.ModuleType("settings")
    settings.sub, settings.reads = torch.nn.functional, []

    class Reads(models.Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            settings.reads.append(self.settings is settings)
            return self.settings.sub.cross_entropy(self.net(batch[0]), batch[1])

    module = Reads()
    module.settings = settings  # type: ignore[assignment]
    if blocked:
        module.blocks = memoryview(b"abc")  # type: ignore[assignment]
    monitor = tiny_monitor()
    quiet_trainer(tmp_path, callbacks=[monitor]).fit(module, **loaders())
    assert steps_of(monitor) == [4, 8, 12]
    assert len(settings.reads) > 12 and all(settings.reads)  # its state is of no module: chains add to it as well
    assert ("cannot be copied" in caplog.text) is blocked
    assert sum(e.seconds for e in monitor.estimates) < 4


def test_an_object_that_can_be_called_is_named_as_any_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A connection to a database can be called: the attribute after it was named, with the error of the connection."""
    module = models.Holds(lambda _: sqlite3.connect(":memory:"))
    module.later = threading.local()  # type: ignore[assignment]
    monitor = tiny_monitor()
    quiet_trainer(tmp_path, callbacks=[monitor]).fit(module, **loaders())
    assert steps_of(monitor) == [4, 8, 12]
    assert "the attribute Holds.held blocks it (TypeError: cannot pickle 'sqlite3.Connection' object)" in caplog.text


def test_a_module_that_is_profiled_is_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The profiler's hooks of the modules hold records of what has run, which torch cannot copy."""
    monitor = tiny_monitor(every_n_train_steps=3)
    profiler = PyTorchProfiler(str(tmp_path), export_to_chrome=False)
    quiet_trainer(tmp_path, callbacks=[monitor], profiler=profiler).fit(Net(), **loaders())
    assert steps_of(monitor) == [3, 6, 9, 12]
    assert "cannot be copied" not in caplog.text


class OfAnotherClass(torch.Tensor):
    """Without new_empty(), which a copy asks for."""


def test_a_weight_that_blocks_the_copy_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = models.Plain()
    module.net.bias = torch.nn.Parameter(torch.zeros(models.CLASSES).as_subclass(OfAnotherClass))
    monitor = tiny_monitor()
    quiet_trainer(tmp_path, callbacks=[monitor]).fit(module, **loaders())
    assert steps_of(monitor) == [4, 8, 12]
    assert "['bias'] blocks it (RuntimeError" in caplog.text


# ----------------------------------------------------------------------------------------------------------- strategies


def setup_under(strategy: type[Any], folder: Path, precision: Any = None, **settings: Any) -> None:
    """Such a strategy or precision cannot be made without a device or a package of its own: the trainer is told that
    it has one."""
    trainer = quiet_trainer(folder)
    trainer._accelerator_connector.strategy = object.__new__(strategy)
    trainer.strategy._precision_plugin = object.__new__(precision) if precision is not None else None
    tiny_monitor(**settings).setup(trainer, Net(), "fit")


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_keeps_the_weights_to_itself_is_refused_at_setup(strategy: type[Any], tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=f"{strategy.__name__}.*'ddp' or ModelParallelStrategy") as told:
        setup_under(strategy, tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("strategy", [XLAStrategy, SingleDeviceXLAStrategy])
def test_a_device_on_which_nothing_was_tried_is_refused_at_setup(strategy: type[Any], tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=f"{strategy.__name__}.*estimate_llc") as told:
        setup_under(strategy, tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, ModelParallelStrategy])
@pytest.mark.parametrize("precision", [TransformerEnginePrecision, BitsandbytesPrecision])
def test_a_precision_with_a_state_of_its_own_is_refused_at_setup(
    precision: type[Any], strategy: type[Any], tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=f"{precision.__name__}.*another precision") as told:
        setup_under(strategy, tmp_path, precision)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"probe": True}, r"probe=.*estimate_influence"), ({"sampler": SGNHT(lr=1e-4)}, r"sampler=.*RMSpropSGLD")],
)
def test_what_shards_do_not_allow_is_refused_at_setup(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=named) as told:
        setup_under(ModelParallelStrategy, tmp_path, **settings)
    assert "\n" not in str(told.value)


class TwoRanks(DDPStrategy):
    """As seen from its first rank."""

    world_size = 2


@pytest.mark.parametrize("strategy", [TwoRanks, ModelParallelStrategy])
def test_chains_beside_several_ranks_or_shards_are_refused_at_setup(strategy: type[Any], tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=f"{strategy.__name__}.*execution='inline'") as told:
        setup_under(strategy, tmp_path, execution="background")
    assert "\n" not in str(told.value)


def test_a_trainer_of_the_other_package_is_told_which_to_import(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Other(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[SLTMonitor(every_n_train_steps=1)],
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4, 1))
    with pytest.raises(MisconfigurationException, match=r"lightning\.pytorch"):
        trainer.fit(Other(), torch.utils.data.DataLoader(data, 2))
    with pytest.raises(ValueError, match=r"Other is a module of pytorch_lightning.*lightning\.pytorch.*loss_fn"):
        estimate_llc(Other(), data)


class HeadOnly(Net):
    """The layers below the head are in no optimizer, and want a gradient all the same."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[-1].parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("module", "settings", "said"),
    [(HeadOnly, {}, True), (HeadOnly, {"restrict": "net.*"}, False), (Net, {}, False)],
    ids=["head only", "restricted", "all"],
)
def test_weights_that_are_in_no_optimizer_are_said_to_move(
    module: type[Any], settings: dict[str, Any], said: bool, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Scenario(module, loaders).run(tmp_path, tiny_monitor(**settings))
    found = [str(w.message) for w in caught if "in no optimizer" in str(w.message)]
    assert len(found) == said
    if said:
        rest = [name for name, _ in module().named_parameters()][:-2]
        assert f"{len(rest)} parameters" in found[0] and rest[0] in found[0]
