"""All that can be seen of one training run, and the first thing in which two runs differ.

A :class:`Fingerprint`, as the last callback, copies the state of training before and after every batch, before every
optimiser step and at every validation batch; a :class:`RecordingLogger` keeps the rows that loggers get.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torchmetrics import Metric

PREFIX = "slt"
"""How the keys of the callbacks of this package begin: the only ones that may be new."""

Snapshot = dict[str, Any]
"""Name of a piece of state -> its value: a tensor of its own, or plain data."""


@dataclass
class TrainingTrace:
    """What was seen of one training run.

    Attributes:
        snapshots: ``(moment, state)`` in order: before and after each batch, before each optimiser step, at each
            validation batch, and at the end.
        rows: ``(metrics, step)`` as the loggers received them, this package's own keys left out.
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


@dataclass(frozen=True)
class Difference:
    """The first thing in which two runs differ.

    Attributes:
        moment: when, such as ``"after batch 3"``.
        name: the piece of state, such as ``"weights/net.0.weight"``; empty where the course itself differs.
        what: by how much, or how.
    """

    moment: str
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.moment}: {self.name} {self.what}" if self.name else f"{self.moment}: {self.what}"


class RecordingLogger(Logger):
    """Keeps every row that it is given.

    Args:
        save_dir: what callbacks that write files are told; None for the trainer's own.
    """

    def __init__(self, save_dir: Optional[str] = None) -> None:
        super().__init__()
        self.rows: list[tuple[dict[str, Any], Optional[int]]] = []
        self._save_dir = save_dir

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> str:
        return "0"

    @property
    def save_dir(self) -> Optional[str]:
        return self._save_dir

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Settings are not kept."""

    def log_metrics(self, metrics: Mapping[str, Any], step: Optional[int] = None) -> None:
        self.rows.append((dict(metrics), step))

    def of_training(self) -> list[tuple[dict[str, Any], Optional[int]]]:
        """The rows without this package's keys; a row that held nothing else is left out."""
        rows = [({k: v for k, v in metrics.items() if not _own(k)}, step) for metrics, step in self.rows]
        return [(kept, step) for (kept, step), (whole, _) in zip(rows, self.rows, strict=True) if _told(kept, whole)]

    def of_callback(self) -> list[tuple[dict[str, Any], Optional[int]]]:
        """The rows of this package's callbacks, their own keys only."""
        rows = [({k: v for k, v in metrics.items() if _own(k)}, step) for metrics, step in self.rows]
        return [(own, step) for own, step in rows if own]


def _own(key: str) -> bool:
    return any(part.startswith(PREFIX) for part in key.split("/")[0].split("."))


def _told(kept: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether a filtered row says anything: "epoch" comes with every row that Lightning writes."""
    return bool(set(kept) - {"epoch"}) or len(kept) == len(whole)


class Fingerprint(Callback):
    """Copies the state of training into a trace; changes nothing. Must stand after the callbacks under test."""

    def __init__(self) -> None:
        self.trace = TrainingTrace()
        self._pointers: dict[str, int] = {}

    def _take(self, moment: str, state: Snapshot) -> None:
        self.trace.snapshots.append((moment, state))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        state = flatten({"batch": batch, "rng": rng_state(), "flags": _flags(pl_module)})
        self._take(f"before batch {len(self.trace.snapshots)}", state)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._take(f"before optimiser step {trainer.global_step}", flatten({"grad": _gradients(pl_module)}))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        loss = loss.detach().clone() if isinstance(loss, Tensor) else loss
        state = {"loss": loss, "batch_idx": batch_idx, **self._training_state(trainer, pl_module)}
        self._take(f"after batch {len(self.trace.snapshots)}", flatten(state))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._take(f"after validation batch {batch_idx}", flatten({"rng": rng_state(), "outputs": outputs}))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take("after training", flatten(self._training_state(trainer, pl_module)))

    def _training_state(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Everything that decides how training goes on, and everything that it has said."""
        loop = trainer.fit_loop
        loader = loop._combined_loader
        loaders = list(loader.flattened) if loader is not None else []
        metrics = {n: (m.metric_state, m._update_count) for n, m in module.named_modules() if isinstance(m, Metric)}
        epoch_loop = loop.epoch_loop
        results = {
            k: (m.value, getattr(m, "cumulated_batch_size", None))
            for k, m in epoch_loop._results.items()
            if not _own(k)
        }
        return {
            "weights": dict(module.named_parameters()),
            "requires_grad": {n: p.requires_grad for n, p in module.named_parameters()},
            "storage": {
                n: p.data_ptr() == self._pointers.setdefault(n, p.data_ptr()) for n, p in module.named_parameters()
            },
            "buffers": dict(module.named_buffers()),
            "metrics": metrics,
            "attributes": _plain_attributes(module),
            "flags": _flags(module),
            "grad": _gradients(module),
            "optimizer": [o.state_dict() for o in trainer.optimizers],
            "scheduler": [_without_functions(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "progress": dict(loop.state_dict()),
            "global_step": trainer.global_step,
            "stepped": epoch_loop._batches_that_stepped,
            "epoch": trainer.current_epoch,
            "should_stop": trainer.should_stop,
            "results": results,
            "callback_metrics": {k: v for k, v in trainer.callback_metrics.items() if not _own(k)},
            "logged_metrics": {k: v for k, v in trainer.logged_metrics.items() if not _own(k)},
            "datasets": [_plain_attributes(getattr(x, "dataset", None)) for x in loaders],
            "loader_rng": [g.get_state() for x in loaders for g in _generators(x)],
            "rng": rng_state(),
            "torch": (
                torch.is_grad_enabled(),
                torch.get_default_dtype(),
                torch.get_num_threads(),
                torch.are_deterministic_algorithms_enabled(),
                torch.is_autocast_enabled("cpu"),
            ),
        }


def _plain_attributes(owner: Any) -> dict[str, Any]:
    """Counters and positions that an object keeps for itself."""
    attributes = getattr(owner, "__dict__", {}).items()
    return {name: v for name, v in attributes if type(v) in (int, float, str, bool, list) and name != "training"}


def _flags(module: LightningModule) -> dict[str, Any]:
    """The mode of every submodule and the number of its hooks."""
    return {
        name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in module.named_modules()
    }


def _gradients(module: LightningModule) -> dict[str, Any]:
    return {n: p.grad for n, p in module.named_parameters()}


def rng_state() -> dict[str, Any]:
    """The global generators of torch (CUDA's where it is in use), NumPy and Python."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the generator users draw from
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
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
    """Nested state as one level: ``{"optimizer/0/state/1/exp_avg": tensor}``; tensors are cloned.

    Example:
        >>> flatten({"a": [1, {"b": "text"}]})
        {'a/0': 1, 'a/1/b': 'text'}
    """
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


def first_difference(a: TrainingTrace, b: TrainingTrace) -> Optional[Difference]:
    """What differs first between two runs, bit for bit; None where they are the same training.

    NaN equals NaN. Rows in the log are compared where all snapshots are the same.
    """
    for (when, state), (other_when, other) in zip(a.snapshots, b.snapshots, strict=False):
        if when != other_when:
            return Difference(when, "", f"the course of training differs: the other run was {other_when}")
        found = _first_in(when, state, other)
        if found is not None:
            return found
    if len(a.snapshots) != len(b.snapshots):
        return Difference("at the end", "", f"{len(a.snapshots)} moments against {len(b.snapshots)}")
    for i, (row, other_row) in enumerate(zip(a.rows, b.rows, strict=False)):
        found = _first_in(f"logged row {i}", flatten(row), flatten(other_row))
        if found is not None:
            return found
    if len(a.rows) != len(b.rows):
        return Difference("at the end", "", f"{len(a.rows)} logged rows against {len(b.rows)}")
    return None


def _first_in(when: str, a: Snapshot, b: Snapshot) -> Optional[Difference]:
    for name in [*a, *(k for k in b if k not in a)]:
        if name not in a or name not in b:
            return Difference(when, name, "is there in one run only")
        x, y = a[name], b[name]
        if isinstance(x, Tensor) and isinstance(y, Tensor) and (x.is_nested or x.layout != torch.strided):
            if not _same_parts(x, y):
                return Difference(when, name, f"differs: {_short(x)} against {_short(y)}")
            continue
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype:
            if not _same_bits(x, y):
                change = (x.double() - y.double()).abs().max().item()
                return Difference(when, name, f"differs, by at most {change:.3g}")
            continue
        nan = isinstance(x, float) and isinstance(y, float) and x != x and y != y
        if not nan and not (type(x) is type(y) and not isinstance(x, Tensor) and x == y):
            return Difference(when, name, f"differs: {_short(x)} against {_short(y)}")
    return None


def _short(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _same_parts(a: Tensor, b: Tensor) -> bool:
    """Equality of nested and sparse tensors, of what they are made of."""
    if (a.is_nested, a.layout, a.dtype) != (b.is_nested, b.layout, b.dtype):
        return False
    if not a.is_nested:
        return a.shape == b.shape and _same_bits(a.to_dense(), b.to_dense())
    parts, others = a.unbind(), b.unbind()
    return len(parts) == len(others) and all(
        x.shape == y.shape and _same_bits(x, y) for x, y in zip(parts, others, strict=True)
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality in which NaN equals NaN."""
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    same_nan = torch.equal(a.isnan(), b.isnan())
    return same_nan and torch.equal(a.nan_to_num(nan=1.25), b.nan_to_num(nan=1.25))
