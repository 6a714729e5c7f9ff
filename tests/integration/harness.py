"""Train with and without a callback, and compare everything that training is made of, bit by bit.

:func:`run` trains from fixed seeds with a :class:`Fingerprint` as last callback, which copies the state of training
before and after every batch; :func:`assert_same` compares two such traces and names the first difference.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torchmetrics import Metric

from lightning_slt import SGLD, SLTMonitor

SEED = 7
PREFIX = "slt"
"""How the keys of the callback under test begin: the only ones that may be new."""

FIGURES = (
    "chains_figure",
    "history_figure",
    "influence_figure",
    "suspects_figure",
    "trajectories_figure",
    "free_energy_figure",
)
"""What a publisher draws: ten times the work of the smallest chains."""

Snapshot = dict[str, Any]
"""Name of a piece of state -> its value: a tensor of its own, or plain data."""


@dataclass
class TrainingTrace:
    """All that was seen of one training run.

    Attributes:
        snapshots: ``(moment, state)`` in order: before and after each batch, before each optimiser step, at each
            validation batch, and at the end.
        rows: ``(metrics, step)`` as the loggers received them, the callback's own keys left out.
        trainer: the trainer after fit.
        module: the module after fit.
    """

    snapshots: list[tuple[str, Snapshot]] = field(default_factory=list)
    rows: list[tuple[dict[str, Any], Optional[int]]] = field(default_factory=list)
    trainer: Any = None
    module: Any = None

    @property
    def losses(self) -> list[Any]:
        """The loss of each batch, as exact numbers."""
        return [state["loss"] for moment, state in self.snapshots if moment.startswith("after batch")]

    @property
    def num_batches(self) -> int:
        return len(self.losses)

    def plain(self) -> TrainingTrace:
        """The trace without trainer and module: what can be stored."""
        return TrainingTrace(self.snapshots, self.rows)


class RecordingLogger(Logger):
    """Keeps every row that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[dict[str, Any], Optional[int]]] = []

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, Any], step: Optional[int] = None) -> None:
        self.rows.append((dict(metrics), step))

    def of_training(self) -> list[tuple[dict[str, Any], Optional[int]]]:
        """The rows without the callback's keys; a row that held nothing else is left out."""
        rows = [({k: v for k, v in metrics.items() if not _own(k)}, step) for metrics, step in self.rows]
        return [(kept, step) for (kept, step), (whole, _) in zip(rows, self.rows, strict=True) if _told(kept, whole)]

    def of_callback(self) -> list[tuple[dict[str, Any], Optional[int]]]:
        """The rows of the callback under test, its own keys only."""
        rows = [({k: v for k, v in metrics.items() if _own(k)}, step) for metrics, step in self.rows]
        return [(own, step) for own, step in rows if own]


def _own(key: str) -> bool:
    return any(part.startswith(PREFIX) for part in key.split("/")[0].split("."))


def _told(kept: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether a filtered row says anything: "epoch" comes with every row that Lightning writes."""
    return bool(set(kept) - {"epoch"}) or len(kept) == len(whole)


class Fingerprint(Callback):
    """Copies the state of training into a trace; changes nothing. Must stand after the callback under test."""

    def __init__(self) -> None:
        self.trace = TrainingTrace()

    def _take(self, moment: str, state: Snapshot) -> None:
        self.trace.snapshots.append((moment, state))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        state = flatten({"batch": batch, "rng": rng_state(), "flags": flags(pl_module)})
        self._take(f"before batch {len(self.trace.snapshots)}", state)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._take(f"before optimiser step {trainer.global_step}", flatten({"grad": gradients(pl_module)}))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        loss = loss.detach().clone() if isinstance(loss, Tensor) else loss
        state = {"loss": loss, "batch_idx": batch_idx, **training_state(trainer, pl_module)}
        self._take(f"after batch {len(self.trace.snapshots)}", flatten(state))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._take(f"after validation batch {batch_idx}", flatten({"rng": rng_state(), "outputs": outputs}))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take("after training", flatten(training_state(trainer, pl_module)))


def training_state(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Everything that decides how training goes on, and everything that it has said."""
    loop = trainer.fit_loop
    loader = loop._combined_loader
    loaders = list(loader.flattened) if loader is not None else []
    return {
        "weights": {n: p for n, p in module.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in module.named_parameters()},
        "storage": {n: p.data_ptr() == module.__dict__.setdefault("_ptr", {}).setdefault(n, p.data_ptr())
                    for n, p in module.named_parameters()},
        "buffers": {n: b for n, b in module.named_buffers()},
        "metrics": {n: (m.metric_state, m._update_count) for n, m in module.named_modules() if isinstance(m, Metric)},
        "attributes": plain_attributes(module),
        "flags": flags(module),
        "grad": gradients(module),
        "optimizer": [o.state_dict() for o in trainer.optimizers],
        "scheduler": [_without_functions(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
        "progress": {k: v for k, v in loop.state_dict().items()},
        "global_step": trainer.global_step,
        "stepped": loop.epoch_loop._batches_that_stepped,
        "epoch": trainer.current_epoch,
        "should_stop": trainer.should_stop,
        "results": {k: (m.value, getattr(m, "cumulated_batch_size", None))
                    for k, m in loop.epoch_loop._results.items() if not _own(k)},
        "callback_metrics": {k: v for k, v in trainer.callback_metrics.items() if not _own(k)},
        "logged_metrics": {k: v for k, v in trainer.logged_metrics.items() if not _own(k)},
        "datasets": [plain_attributes(getattr(x, "dataset", None)) for x in loaders],
        "loader_rng": [g.get_state() for x in loaders for g in _generators(x)],
        "rng": rng_state(),
        "torch": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
                  torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu")),
    }  # fmt: skip


def plain_attributes(owner: Any) -> dict[str, Any]:
    """Counters and positions that an object keeps for itself."""
    attributes = getattr(owner, "__dict__", {}).items()
    return {name: v for name, v in attributes if type(v) in (int, float, str, bool, list) and name != "training"}


def flags(module: LightningModule) -> dict[str, Any]:
    """The mode of every submodule and the number of its hooks."""
    return {
        name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in module.named_modules()
    }


def gradients(module: LightningModule) -> dict[str, Any]:
    return {n: p.grad for n, p in module.named_parameters()}


def rng_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the generator users draw from
    return {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "python": str(hash(random.getstate())),
    }


def _generators(loader: Any) -> Iterator[torch.Generator]:
    for owner in (loader, getattr(loader, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator


def _without_functions(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in state.items() if not callable(v)}


def flatten(value: Any, name: str = "") -> Snapshot:
    """Nested state as one level: ``{"optimizer/0/state/1/exp_avg": tensor}``; tensors are cloned."""
    if isinstance(value, Mapping):
        items: Sequence[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        if isinstance(value, Tensor):
            value = getattr(value, "_local_tensor", value).detach().clone()  # of a sharded tensor, what is here
        elif not isinstance(value, (int, float, str, bool, type(None), torch.dtype)):
            value = repr(type(value))
        return {name: value}
    out: Snapshot = {}
    for key, item in items:
        out |= flatten(item, f"{name}/{key}" if name else str(key))
    return out


def assert_same(a: TrainingTrace, b: TrainingTrace) -> None:
    """Bitwise the same training.

    Raises:
        AssertionError: naming the moment and the piece of state that differ first, and by how much.
    """
    for (when, state), (other_when, other) in zip(a.snapshots, b.snapshots, strict=False):
        assert when == other_when, f"the course of training differs: {when} against {other_when}"
        _assert_same_state(when, state, other)
    assert len(a.snapshots) == len(b.snapshots), f"{len(a.snapshots)} moments against {len(b.snapshots)}"
    for i, (row, other_row) in enumerate(zip(a.rows, b.rows, strict=False)):
        _assert_same_state(f"logged row {i}", flatten(row), flatten(other_row))
    assert len(a.rows) == len(b.rows), f"{len(a.rows)} logged rows against {len(b.rows)}"


def _assert_same_state(when: str, a: Snapshot, b: Snapshot) -> None:
    for name in [*a, *(k for k in b if k not in a)]:
        assert name in a and name in b, f"{when}: {name} is there in one run only"
        x, y = a[name], b[name]
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype:
            if not _same_bits(x, y):
                change = (x.double() - y.double()).abs().max().item()
                raise AssertionError(f"{when}: {name} differs, by at most {change:.3g}")
        else:
            nan = isinstance(x, float) and isinstance(y, float) and x != x and y != y
            assert nan or (type(x) is type(y) and x == y), f"{when}: {name} differs: {x!r} against {y!r}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality in which NaN equals NaN."""
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(nan=1.25), b.nan_to_num(nan=1.25))
                                 and torch.equal(a.isnan(), b.isnan()))  # fmt: skip


def quiet_trainer(folder: Path, **kwargs: Any) -> Trainer:
    """A CPU trainer for tests: nothing on the screen, nothing on disk unless asked for."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(folder),
        **kwargs,
    }
    if settings.get("barebones"):  # switches these off itself, and refuses to be told
        for name in ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"):
            settings.pop(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(**settings)


def seed_everything(seed: int = SEED) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that user code draws from
    random.seed(seed)


def run(
    make_trainer_kwargs: Callable[[], dict[str, Any]],
    make_module: Callable[[], Any],
    make_data: Callable[[], dict[str, Any]],
    callbacks: Sequence[Callback],
    folder: Path,
    ckpt_path: Optional[str] = None,
) -> TrainingTrace:
    """Train once from fixed seeds and keep what was seen.

    Args:
        make_trainer_kwargs: gives the arguments of the trainer, made anew for each run; its ``callbacks`` come first.
        make_module: gives the module.
        make_data: gives the data arguments of ``Trainer.fit``.
        callbacks: those under test; they stand after those of ``make_trainer_kwargs``.
        folder: ``default_root_dir``.
        ckpt_path: resume from there.
    """
    fingerprint, logger = Fingerprint(), RecordingLogger()
    seed_everything()
    kwargs = make_trainer_kwargs()
    others = kwargs.pop("callbacks", [])
    kwargs.setdefault("logger", logger)
    trainer = quiet_trainer(folder, callbacks=[*others, *callbacks, fingerprint], **kwargs)
    module = make_module()
    trainer.fit(module, ckpt_path=ckpt_path, **make_data())
    trace = fingerprint.trace
    trace.rows, trace.trainer, trace.module = logger.of_training(), trainer, module
    return trace


@dataclass(frozen=True)
class Scenario:
    """A training run that the callback must leave as it is.

    Attributes:
        module: makes the module (or a compiled one).
        data: makes the data arguments of ``Trainer.fit``.
        trainer: makes the arguments of the trainer.
    """

    module: Callable[[], Any]
    data: Callable[[], dict[str, Any]]
    trainer: Callable[[], dict[str, Any]] = dict

    def run(self, folder: Path, *callbacks: Callback, **kwargs: Any) -> TrainingTrace:
        return run(self.trainer, self.module, self.data, callbacks, folder, **kwargs)

    def assert_undisturbed(self, folder: Path, *callbacks: Callback) -> TrainingTrace:
        """Train without and with ``monitor``; everything must be the same. Gives the trace with it."""
        without = self.run(folder / "without")
        with_monitor = self.run(folder / "with", *callbacks)
        assert without.num_batches > 0
        assert_same(without, with_monitor)
        return with_monitor


TINY: dict[str, Any] = {
    "num_chains": 2,
    "num_draws": 4,
    "num_burnin_steps": 2,
    "num_steps_bw_draws": 1,
    "method": "sequential",
}


def tiny_monitor(**changes: Any) -> SLTMonitor:
    """A monitor with the smallest chains, a fixed step size, and failures that are failures."""
    settings: dict[str, Any] = {"sampler": SGLD(lr=1e-4), "on_failure": "raise", **TINY, **changes}
    if not {"every_n_train_steps", "every_n_epochs", "at_steps", "log_spaced"} & set(settings):
        settings["every_n_train_steps"] = 4
    return SLTMonitor(**settings)


def steps_of(monitor: SLTMonitor) -> list[Optional[int]]:
    """The optimiser steps at which ``monitor`` fired."""
    return [e.step for e in monitor.estimates]
