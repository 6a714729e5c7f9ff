"""What a background worker needs of a training run, as files: what stays the same once, the module with every snapshot.

Files and not queues: ``torch.multiprocessing`` hands over storage that both processes share, and weights that train on
would change under the chains. What goes is pickled by reference to the modules that define it, as for any spawned
process. What cannot be pickled is named before training.
"""

from __future__ import annotations

import ast
import copy
import io
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, type_before_parametrizations

from lightning_slt.callbacks.data.training import SeenBatches, TrainingData
from lightning_slt.durable import save_tensors, write_durably
from lightning_slt.estimate import ChainSettings
from lightning_slt.sampling.restriction import Restriction, select_parameters
from lightning_slt.sampling.shadow import shadow_copy, without_compile
from lightning_slt.sampling.stand_ins import SILENT, Silenced
from lightning_slt.sampling.steps import LossFn

INLINE = "or measure inside training: execution='inline'."

TRAVELLING = (
    "accumulate_grad_batches",
    "callback_metrics",
    "check_val_every_n_epoch",
    "current_epoch",
    "estimated_stepping_batches",
    "fast_dev_run",
    "global_rank",
    "global_step",
    "gradient_clip_val",
    "is_global_zero",
    "is_last_batch",
    "local_rank",
    "log_every_n_steps",
    "logged_metrics",
    "max_epochs",
    "max_steps",
    "min_epochs",
    "min_steps",
    "node_rank",
    "num_devices",
    "num_nodes",
    "num_training_batches",
    "num_val_batches",
    "overfit_batches",
    "predicting",
    "progress_bar_metrics",
    "sanity_checking",
    "testing",
    "training",
    "validating",
    "world_size",
)
"""What a step may read of its trainer in a worker: plain values, as they were when the snapshot was taken."""


class CannotTravelError(ValueError):
    """Something of the run cannot be handed to another process; the message names it and the remedy."""


@dataclass(frozen=True)
class Kit:
    """What stays the same over a run.

    Attributes:
        plugin: the precision plugin, which converts batches.
        under_plugin: the loss is computed in the plugin's context (autocast).
        loss_fn: that of the user.
    """

    plugin: Any
    under_plugin: bool
    loss_fn: Optional[LossFn]


@dataclass(frozen=True)
class Snapshot:
    """What a firing is of.

    Attributes:
        module: a private copy, that shares nothing with the module that trains.
        restrict: names of the weights that move.
        settings: of the chains.
        trainer: what the step may read of its trainer.
        batches: to be replayed, where the data cannot be read again.
        probed: samples are looked at as well; they are in a file of their own.
        data: number of the file of the data that training had.
    """

    module: nn.Module
    restrict: list[str]
    settings: ChainSettings
    trainer: Mapping[str, Any]
    batches: Optional[SeenBatches]
    probed: bool
    data: int


def take_snapshot(
    trainer: Trainer,
    module: LightningModule,
    restrict: Restriction,
    settings: ChainSettings,
    data: TrainingData,
    probed: bool,
    number: int,
) -> Snapshot:
    """The weights as they are now, on a private copy.

    Args:
        number: of the file that ``data`` is in.

    Raises:
        CopyError: where the module cannot be copied.
        ValueError: where ``restrict`` matches nothing.
    """
    names = [without_compile(name) for name in select_parameters(module, restrict)]
    batches = data.seen() if data.replays else None
    return Snapshot(shadow_copy(module), names, settings, freeze(trainer), batches, probed, number)


def flat_weights(module: nn.Module, restrict: Restriction) -> Tensor:
    """``[d]``, the weights that move, as chains have them: float64 where all of them are, else float32."""
    parameters = dict(module.named_parameters())
    pieces = [parameters[name].detach().flatten() for name in select_parameters(module, restrict)]
    dtype = torch.float64 if all(piece.dtype == torch.float64 for piece in pieces) else torch.float32
    return torch.cat([piece.to(dtype) for piece in pieces])


def freeze(trainer: Trainer) -> dict[str, Any]:
    """The plain values of a trainer that a step may read in a worker, tensors among them on the CPU; silent loggers."""
    values: dict[str, Any] = {}
    for name in TRAVELLING:
        try:
            value = getattr(trainer, name)
        except Exception:  # not known yet, or not in this version
            continue
        if isinstance(value, Mapping):
            value = {k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in value.items()}
        values[name] = value
    # a copy of a silenced logger has its values and not the logger
    values["loggers"] = [copy.copy(Silenced(logger)) for logger in trainer.loggers]
    values["rates"] = [[float(g["lr"]) for g in o.param_groups if "lr" in g] for o in trainer.optimizers]
    return values


class StillOptimizer(torch.optim.Optimizer):
    """The rates of an optimiser as they were: ``param_groups`` to read, and no weights."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups


class StillTrainer:
    """A trainer as it was: plain values to read, and nothing else.

    Args:
        values: see :func:`freeze`.
        datamodule: that of the run.
        device: of the worker.
    """

    def __init__(self, values: Mapping[str, Any], datamodule: Any, device: torch.device) -> None:
        groups = [[{"lr": rate} for rate in rates] for rates in values.get("rates", [])]
        self.__dict__.update({k: v for k, v in values.items() if k != "rates"})
        self.__dict__.setdefault("loggers", [SILENT])
        self.datamodule = datamodule
        self.optimizers = [StillOptimizer(group) for group in groups]
        # self.optimizers() of a module asks the strategy
        self.strategy = SimpleNamespace(root_device=device, reduce=SILENT, _lightning_optimizers=self.optimizers)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"the step reads trainer.{name}, which a background worker does not have: give loss_fn(module, batch), "
            + INLINE
        )


# --- files ------------------------------------------------------------------------------------------------------------


def write_pickled(value: Any, path: Path, what: str) -> set[str]:
    """Pickle ``value`` into a file, durably.

    Args:
        value: whose tensors are written as they are; load it with :func:`read_pickled`.
        path: of the file.
        what: what it is, for errors.

    Returns:
        Names of classes and functions in it that are defined in the script that runs (``__main__``).

    Raises:
        CannotTravelError: naming the part that does not pickle.
        OSError: where the file cannot be written.
    """
    found: set[str] = set()
    try:
        write_durably(path, lambda temporary: save_tensors(value, temporary, pickle_module=_pickle_module(found)))
    except OSError:
        raise
    except Exception as error:
        raise _named(value, what, error) from error
    return found


def check_pickles(value: Any, what: str) -> set[str]:
    """As :func:`write_pickled`, without a file.

    Raises:
        CannotTravelError: naming the part that does not pickle.
    """
    found: set[str] = set()
    try:
        torch.save(value, _Nowhere(), pickle_module=_pickle_module(found))  # type: ignore[arg-type]
    except Exception as error:
        raise _named(value, what, error) from error
    return found


def pickles(value: Any) -> bool:
    """Whether another process can have it."""
    return _blocking(value, "") is None


def read_pickled(path: Path, device: torch.device | str = "cpu") -> Any:
    """What :func:`write_pickled` wrote; tensors that were on an accelerator are on ``device``, the others on the CPU.

    Raises:
        OSError, RuntimeError, pickle.UnpicklingError: where there is no such file, or it is not whole.
    """
    return torch.load(
        path,
        map_location=lambda storage, where: storage if where == "cpu" else storage.to(device=torch.device(device)),  # type: ignore[attr-defined]
        weights_only=False,
    )


class _Nowhere(io.RawIOBase):
    """Takes all that is written to it."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)

    def flush(self) -> None:
        pass


def _pickle_module(found: set[str]) -> ModuleType:
    """What :func:`torch.save` takes as a pickle module: a pickler that notes what the running script defines."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, (type, FunctionType)) and value.__module__ == "__main__":
                found.add(value.__qualname__)
            if isinstance(value, ModuleType) and _imported(value):  # by its name, as a function goes
                return import_module, (value.__name__,)
            if isinstance(value, nn.Module) and _is_parametrised(value):
                kind = type_before_parametrizations(value)
                names = [*value.get_submodule("parametrizations")._modules]
                return _parametrised, (kind, names), _state_of(value, kind)
            return NotImplemented

    module = ModuleType("pickle_of_lightning_slt")
    module.Pickler = Pickler  # type: ignore[attr-defined]
    return module


def _is_parametrised(module: nn.Module) -> bool:
    return is_parametrized(module) and type(module).__module__ == register_parametrization.__module__


def _state_of(module: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """As ``kind`` would have it pickled, without the local function by which weight norm reads old checkpoints."""
    state: dict[str, Any] = {**getattr(kind, "__getstate__", vars)(module)}
    hooks = state["_load_state_dict_pre_hooks"]
    own = {k: h for k, h in hooks.items() if not str(getattr(h, "__module__", "")).startswith("torch.")}
    state["_load_state_dict_pre_hooks"] = type(hooks)(own)
    return state


def _parametrised(kind: type[nn.Module], names: list[str]) -> nn.Module:
    """A module of the class that torch makes of ``kind`` where these tensors are parametrised, to be given its state.

    That class belongs to one module and is found by no name, and torch refuses to pickle it.
    """
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name in names:
        module.register_buffer(name, torch.empty(0, device="cpu"))
        register_parametrization(module, name, nn.Identity(), unsafe=True)
    return module


def _imported(module: ModuleType) -> bool:
    name = module.__name__
    return name != "__main__" and sys.modules.get(name) is module


def _named(value: Any, what: str, error: Exception) -> CannotTravelError:
    where, reason = _blocking(value, what) or (what, error)
    said = str(reason).splitlines()[0] if str(reason) else ""
    return CannotTravelError(
        f"{where} cannot be pickled ({type(reason).__name__}: {said}), so no other process can have it. Define it at "
        f"the top level of a module, {INLINE}"
    )


def _blocking(value: Any, path: str, depth: int = 6) -> Optional[tuple[str, Exception]]:
    """Where in ``value`` the first part is that does not pickle, and why; None where all of it does."""
    try:
        torch.save(value, _Nowhere(), pickle_module=_pickle_module(set()))  # type: ignore[arg-type]
        return None
    except Exception as error:
        found = path, error
    if depth == 0 or isinstance(value, (Tensor, type, FunctionType)):
        return found
    parts: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        parts = [(f"{path}[{k!r}]", v) for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    elif isinstance(value, nn.Module):
        own = {k: v for k, v in vars(value).items() if k not in ("_modules", "_trainer", "_fabric")}
        parts = [(f"{path}.{k}", v) for k, v in {**value._modules, **own}.items()]
    elif hasattr(value, "__dict__"):
        parts = [(f"{path}.{k}", v) for k, v in vars(value).items() if k != "trainer"]
    for name, part in parts:
        inner = _blocking(part, name, depth - 1)
        if inner is not None:
            return inner
    return found


# --- the script that runs ---------------------------------------------------------------------------------------------


def main_script(names: set[str]) -> dict[str, str]:
    """How a worker finds what the running script defines: empty where it has nothing of it.

    Args:
        names: what is defined there and has to travel.

    Returns:
        ``{"name": module}`` for ``python -m``, ``{"path": file}`` for a script.

    Raises:
        CannotTravelError: where there is no file to import (a notebook), or importing it would train again.
    """
    if not names:
        return {}
    shown = ", ".join(sorted(names)[:3])
    are = "is" if len(names) == 1 else "are"
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    path = getattr(main, "__file__", None)
    if path is None or not Path(path).exists():
        raise CannotTravelError(
            f"{shown} {are} defined in a notebook or an interactive session, which no other process can import. Define "
            f"it in a module, {INLINE}"
        )
    if not _is_guarded(Path(path)):
        raise CannotTravelError(
            f"{shown} {are} defined in {Path(path).name}, which a worker has to import, and importing it would train "
            f"again. Put what trains below if __name__ == '__main__':, define {shown} in a module, {INLINE}"
        )
    return {"name": name} if name is not None else {"path": str(Path(path).resolve())}


def _is_guarded(path: Path) -> bool:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return False
    return any(
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Compare)
        and any(
            isinstance(side, ast.Name) and side.id == "__name__" for side in (node.test.left, *node.test.comparators)
        )
        for node in tree.body
    )


__all__ = [
    "CannotTravelError",
    "Kit",
    "Snapshot",
    "StillTrainer",
    "check_pickles",
    "flat_weights",
    "freeze",
    "main_script",
    "pickles",
    "read_pickled",
    "take_snapshot",
    "write_pickled",
]
