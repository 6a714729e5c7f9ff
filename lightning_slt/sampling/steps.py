"""The loss of a LightningModule: its own ``training_step``, called so that nothing outside the copy notices."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_slt.sampling.stand_ins import SILENT, ReadThrough, Silenced

LossFn = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(module, batch)``: a scalar, or one loss a sample ``[batch]`` (their mean is taken)."""


class NoLossError(Exception):
    """The step gave no loss for a batch (it returned None): that batch is left out."""


class NoGradientError(ValueError):
    """The loss does not depend on the weights that move: chains would have nothing to follow."""


BATCH_IDX = 2
"""What chains give as ``batch_idx``, the same at every call. What a step does now and then it does at the first of so
many batches (``if batch_idx % 100 == 0: print(...)``); and losses in turn are told by whether it is even, as 0 is."""
EVAL_MODE = (
    "Chains call the module in eval mode, where self.training is False: a step that gives a loss in training mode only "
    "is none for them."
)
NO_LOSS = (
    f"training_step returned None for every minibatch: there is no loss to sample. {EVAL_MODE} So is one that gives a "
    f"loss at some batch_idx only, which is {BATCH_IDX} for them. Give loss_fn(module, batch) -> loss."
)


def no_loss_of(loss_fn: Any) -> NoLossError:
    """What to say where no minibatch has a loss.

    Args:
        loss_fn: what was given; None where the module's own step is the loss.
    """
    if loss_fn is None:
        return NoLossError(NO_LOSS)
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    return NoLossError(
        f"loss_fn={name}: returned None for every minibatch: there is no loss to sample. Return it, as a tensor: "
        f"def loss_fn(module, batch): ... return loss. {EVAL_MODE}"
    )


def check_gradient(loss: Tensor) -> None:
    """Before a gradient is taken.

    Raises:
        NoGradientError: for a loss that has none.
    """
    if not loss.requires_grad:
        raise NoGradientError(
            "the loss does not depend on the weights that move: it is a constant, or was computed under no_grad() or "
            "from detach(), item() or other weights. Return a loss that can be differentiated, or choose the weights "
            "that it depends on with restrict."
        )


def loss_function(module: nn.Module, loss_fn: Optional[LossFn] = None) -> LossFn:
    """How to get the losses of ``module`` on a batch: ``loss_fn`` where given, else the module's ``training_step``.

    What comes back is a scalar, or what ``loss_fn`` gives for each sample (and token); :func:`mean_loss` of it is the
    loss of the batch.

    Raises:
        ValueError: where there is no usable step: a plain module without ``loss_fn``, manual optimisation (its step
            moves the optimisers), or a step that takes ``dataloader_iter``.
    """
    if loss_fn is not None:
        check_loss_fn(loss_fn)
        return _user_loss(loss_fn)
    module = getattr(module, "_orig_mod", module)  # of torch.compile(module)
    if not isinstance(module, LightningModule):
        kind = type(module).__name__
        if any(base.__module__.startswith("pytorch_lightning.") for base in type(module).__mro__):
            raise ValueError(
                f"loss_fn is None, and {kind} is a module of pytorch_lightning, not of lightning.pytorch: import "
                "LightningModule and Trainer from lightning.pytorch, or give loss_fn(module, batch)."
            )
        raise ValueError(f"loss_fn is None, and {kind} is not a LightningModule: give loss_fn(module, batch).")
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} uses manual optimisation: its training_step moves the optimisers, so "
            "chains cannot call it. Give loss_fn(module, batch) -> loss."
        )
    positional = _step_arguments(module)

    def step_loss(copy: nn.Module, batch: Any) -> Tensor:
        return mean_loss(read_losses(copy.training_step(batch, *positional)))  # type: ignore[operator]

    return step_loss


def check_loss_fn(loss_fn: Any) -> None:
    """A loss of outputs and targets knows nothing of a module and a batch; what cannot be called is none at all.

    Raises:
        TypeError: with how it is wrapped.
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn={loss_fn!r}: expected a function of the module and a batch, got {type(loss_fn).__name__}. Give "
            "loss_fn(module, batch) -> loss, or leave it None for the module's training_step."
        )
    is_module = isinstance(loss_fn, nn.Module) and type(loss_fn).__module__.startswith("torch.nn.")
    if not is_module and getattr(loss_fn, "__module__", None) != "torch.nn.functional":
        return
    name = type(loss_fn).__name__ if is_module else loss_fn.__name__
    raise TypeError(
        f"loss_fn={name}: is a loss of outputs and targets, and loss_fn is called with the module and a batch. Give "
        f"lambda module, batch: {'criterion' if is_module else name}(module(batch[0]), batch[1])."
    )


def _step_arguments(module: LightningModule) -> tuple[int, ...]:
    """What follows the batch: nothing, or :data:`BATCH_IDX` (a constant: L(w) must not depend on it)."""
    parameters = list(inspect.signature(_unwrapped_step(module)).parameters.values())
    if any(parameter.name == "dataloader_iter" for parameter in parameters):
        raise ValueError(
            f"{type(module).__name__}.training_step takes dataloader_iter: it draws its own batches, so the loss of a "
            "given batch is not defined. Give loss_fn(module, batch) -> loss, or write training_step(batch, batch_idx)."
        )
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_index = len(by_position) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return (BATCH_IDX,) if takes_index else ()


def _unwrapped_step(module: LightningModule) -> Callable[..., Any]:
    context = getattr(module, "_compiler_ctx", None)
    return context["original_training_step"] if context else module.training_step


def _user_loss(loss_fn: LossFn) -> LossFn:
    def loss(copy: nn.Module, batch: Any) -> Tensor:
        return read_losses(loss_fn(copy, batch))

    return loss


def mean_loss(losses: Tensor) -> Tensor:
    """The scalar loss of a batch, from losses of any shape."""
    return losses if losses.ndim == 0 else losses.mean()


def read_losses(output: Any) -> Tensor:
    """The loss in what a step returned, a tensor or a mapping with ``"loss"``: a scalar, or one loss a sample.

    Raises:
        NoLossError: for None, which Lightning reads as "skip this batch".
        TypeError: for anything that holds no tensor loss.
    """
    if isinstance(output, Mapping):
        output = output.get("loss")
    if output is None:
        raise NoLossError("the step returned no loss: give loss_fn(module, batch) -> loss.")
    if not isinstance(output, Tensor):
        raise TypeError(f"the loss must be a tensor (or a mapping with 'loss'), got {type(output).__name__}.")
    return output


def mute(shadow: nn.Module) -> None:
    """Silence a private copy: nothing it logs or counts may reach the run, or cost time."""
    for module in shadow.modules():
        if isinstance(module, LightningModule):
            for name in ("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer"):
                module.__dict__[name] = _nothing
            module.__dict__["all_gather"] = _refuse_gather
            # what was taken of the module before, as self.report = self.log, is the function of the class: it may log
            # what a step may, and where that goes is said by the trainer's view
            module.__dict__["_current_fx_name"] = "training_step"


@contextmanager
def runs_muted() -> Iterator[None]:
    """What a step sends to the wandb run by itself (``wandb.log``, ``wandb.run.log``) is not sent inside.

    What other threads send is: rows that wait for a server, or a thread of the user's that watches the machine.
    """
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    here = threading.current_thread()
    beside = {thread for thread in threading.enumerate() if thread is not here and type(thread) is not _OF_NO_PYTHON}
    with ExitStack() as undo:
        for holder in (wandb, run) if run is not None else ():
            for name in ("log", "log_artifact", "alert"):
                if callable(getattr(holder, name, None)):
                    undo.enter_context(_replaced(holder, name, beside))
        yield


_OF_NO_PYTHON = threading._DummyThread  # type: ignore[attr-defined]
"""How threads appear that Python has not started: autograd's, which run the hooks of a step."""


@contextmanager
def _replaced(holder: Any, name: str, beside: set[threading.Thread]) -> Iterator[None]:
    own = vars(holder)
    had, before = name in own, own.get(name)
    live = getattr(holder, name)

    def muted(*args: Any, **kwargs: Any) -> Any:
        return live(*args, **kwargs) if threading.current_thread() in beside else None

    setattr(holder, name, muted)
    try:
        yield
    finally:
        if had:
            setattr(holder, name, before)
        else:
            delattr(holder, name)


def metrics_of(module: nn.Module) -> list[nn.Module]:
    """The torchmetrics that a module holds."""
    return [submodule for submodule in module.modules() if isinstance(submodule, (Metric, MetricCollection))]


def stub_metrics(shadow: nn.Module) -> bool:
    """Replace the torchmetrics of a private copy by constants: their state would grow with every step of a chain.

    Returns:
        Whether there was any metric to replace.
    """
    found = metrics_of(shadow)
    for module in found:
        value: Any = _zeros(module)
        module.__dict__["forward"] = lambda *_, _value=value, **__: _value
        module.__dict__["compute"] = lambda *_, _value=value, **__: _value
        module.__dict__["update"] = _nothing
        module.__dict__["reset"] = _nothing
    return bool(found)


def unstub_metrics(shadow: nn.Module) -> None:
    """Undo :func:`stub_metrics`, for a module whose loss is itself a metric."""
    for module in metrics_of(shadow):
        for name in ("forward", "compute", "update", "reset"):
            module.__dict__.pop(name, None)
        if isinstance(module, Metric):
            cls = type(module)
            module.__dict__["update"] = module._wrap_update(cls.update.__get__(module))
            module.__dict__["compute"] = module._wrap_compute(cls.compute.__get__(module))


def _zeros(metric: nn.Module) -> Any:
    if isinstance(metric, MetricCollection):
        return {name: torch.zeros(()) for name in metric.keys()}  # noqa: SIM118 - a ModuleDict's keys carry the prefix
    return torch.zeros(())


def _refuse_gather(*_: Any, **__: Any) -> Any:
    # chains of different ranks are at different weights and steps: a collective call inside one would never be answered
    raise ValueError(
        "training_step gathers from other ranks (self.all_gather), which a chain cannot: give loss_fn(module, batch), "
        "with the loss of one rank's batch."
    )


def _nothing(*_: Any, **__: Any) -> None:
    return None


class ReadThroughTrainer(ReadThrough):
    """What a private copy sees as ``self.trainer``: its attributes to read; writes stay here, loggers and the profiler
    are silent.

    Args:
        trainer: what the copy may see of a trainer, or None outside one.
    """

    def __init__(self, trainer: Any = None) -> None:
        super().__init__(trainer, _silent_parts(trainer))

    def __getattr__(self, name: str) -> Any:
        if self.__dict__["_live"] is not None or name in self.__dict__["_local"]:
            return super().__getattr__(name)
        if name in _OUTSIDE:
            return _OUTSIDE[name]
        raise _no_trainer(name)


def _silent_parts(trainer: Any) -> dict[str, Any]:
    """The loggers and the profiler of a trainer, silenced, and what ``self.log`` writes to; where nothing is known of
    them, what takes every call."""
    parts: dict[str, Any] = {"logger": SILENT, "loggers": [SILENT] if trainer is None else [], "profiler": SILENT}
    parts |= {"_results": SILENT, "_logger_connector": SILENT}
    parts |= {name: value for name, value in _ASKED_BY_LOG.items() if not hasattr(trainer, name)}
    if trainer is None:  # what a step may write to
        parts |= {"callback_metrics": {}, "logged_metrics": {}, "optimizers": _NoOptimizers()}
    if getattr(trainer, "profiler", None) is not None:
        parts["profiler"] = Silenced(trainer.profiler)
    if hasattr(trainer, "loggers"):
        parts["loggers"] = loggers = [Silenced(logger) for logger in trainer.loggers]
        parts["logger"] = loggers[0] if loggers else None
    return parts


_ASKED_BY_LOG = {"barebones": False, "_accelerator_connector": SILENT}
"""What ``self.log`` of Lightning asks of a trainer beside where it writes to."""


def _no_trainer(name: str) -> AttributeError:
    return AttributeError(
        f"training_step reads trainer.{name}, and there is no trainer here: give loss_fn(module, batch)."
    )


class _NoStrategy:
    """Where there is no trainer; ``self.optimizers()`` and much else asks its strategy."""

    root_device = torch.device("cpu")
    reduce = SILENT

    def __getattr__(self, name: str) -> Any:
        raise _no_trainer(f"strategy.{name}")


class _NoTrainerError(AttributeError, IndexError):
    """A step that does without an optimizer where there is none goes on doing so."""

    __str__ = Exception.__str__


class _NoOptimizers(list[Any]):
    """None, for those who count them."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return []
        raise _NoTrainerError(_no_trainer(f"optimizers[{key!r}]").args[0])


_OUTSIDE: Mapping[str, Any] = {
    "global_step": 0,
    "current_epoch": 0,
    "max_epochs": None,
    "max_steps": -1,
    "world_size": 1,
    "global_rank": 0,
    "local_rank": 0,
    "is_global_zero": True,
    "num_training_batches": 1,
    "accumulate_grad_batches": 1,
    "training": True,
    "sanity_checking": False,
    "strategy": _NoStrategy(),
}


def attach_trainer(shadow: nn.Module, trainer: Any = None) -> None:
    """Give every LightningModule in a private copy a :class:`ReadThroughTrainer` in place of its trainer."""
    view = ReadThroughTrainer(trainer)
    for module in shadow.modules():
        if isinstance(module, LightningModule):
            module._trainer = view  # type: ignore[assignment]
            module._fabric = None
