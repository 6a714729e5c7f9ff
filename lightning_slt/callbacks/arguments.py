"""What a monitor makes of its arguments, and of the trainer that it finds itself in."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Optional

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from torch import Tensor, nn

from lightning_slt.sampling import samplers
from lightning_slt.sampling.arguments import no_restriction
from lightning_slt.sampling.restriction import nothing_named, restriction_entries
from lightning_slt.sampling.samplers import KineticLangevin
from lightning_slt.sampling.sharded import local_of
from lightning_slt.warned import warn


def warn_of_untrained(trainer: Trainer, module: nn.Module, who: str) -> None:
    """Say which weights chains move and training does not; a run without an optimizer says nothing of its weights."""
    trained = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in trained]
    if trained and names:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        warn(
            f"{who}: {len(names)} parameters are in no optimizer and want a gradient ({some}): the chains move "
            "them as well. restrict=[...] names those that are to move; requires_grad_(False) holds others."
        )


def warn_of_other_curve(states: Mapping[str, Any], callback: Callback, trainer: Trainer, who: str) -> None:
    """Say that a resumed run begins a curve of its own, where its checkpoint has one of a monitor of other settings."""
    kind = type(callback).__name__
    claimed = {other.state_key for other in trainer.callbacks}  # type: ignore[attr-defined]
    curves = [state for key, state in states.items() if key.startswith(f"{kind}{{") and key not in claimed]
    curves = [state for state in curves if state and state.get("estimates")]
    if callback.state_key in states or not curves:
        return
    gammas = ", ".join(f"{float(state['localization']):.4g}" for state in curves)
    warn(
        f"{who}: the checkpoint has the curve of a monitor of other settings or another name, which this one does not "
        "go on with: it begins a folder, chains and a localization of its own. Give it the settings that it had, or, "
        f"from the first run on, name=: then settings may change. localization={gammas} keeps the numbers comparable."
    )


def warn_of_other_number(state: Mapping[str, Any], prefix: str, who: str) -> None:
    """Say that the keys of a monitor without a name begin otherwise than in the run that its state is of."""
    before = state.get("prefix", prefix)
    if before != prefix and state.get("estimates"):
        warn(
            f"{who}: the keys of this monitor began with '{before}/' in the run that goes on, and begin with "
            f"'{prefix}/' from here on: monitors without a name are numbered in their order among the trainer's "
            "callbacks, and what follows a key, in loggers and in callbacks, follows another monitor now. Give the "
            "trainer the monitors that it had, in that order, or, from the first run on, name=."
        )


def is_smoke_test(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def local_folder(folder: str | os.PathLike[str]) -> Optional[Path]:
    """A folder in the file system of this machine; None for the address of one elsewhere, such as ``s3://bucket``."""
    path = os.fspath(folder).removeprefix("file://")
    return None if "://" in path else Path(path)


def check_name(name: Optional[str]) -> None:
    """Refuse what cannot be part of a key.

    Raises:
        TypeError: for what is no text.
        ValueError: for text with other characters.
    """
    if name is None:
        return
    if not isinstance(name, str):
        raise TypeError(
            f"name={name!r}: expected text, got {type(name).__name__}. Give lower-case letters, digits and "
            f"underscores, such as {'run_3' if isinstance(name, int) else 'head'!r}."
        )
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"name={name!r}: only lower-case letters, digits and underscores (it becomes a log key).")


def check_dirpath(dirpath: Optional[str]) -> None:
    """Refuse an address, and what is no path.

    Raises:
        ValueError: naming the address.
        TypeError: for anything but text and paths.
    """
    if dirpath is not None and not isinstance(dirpath, (str, os.PathLike)):
        kind = type(dirpath).__name__
        raise TypeError(f"dirpath={dirpath!r}: expected the path of a folder, got {kind}. Give text or a Path.")
    if dirpath is not None and "://" in os.fspath(dirpath):
        raise ValueError(f"dirpath={dirpath!r}: is an address, and files are kept locally. Give the path of a folder.")


def loss_context(trainer: Trainer) -> Optional[Callable[[], AbstractContextManager[Any]]]:
    """The trainer's precision around the loss: autocast where it is used, with float32 weights.

    float16 autocast needs the scaler of training, which chains must not touch: their losses are computed in float32.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.precision == "16-mixed":
        return None
    if isinstance(plugin, (MixedPrecision, HalfPrecision)) or plugin.precision != "32-true":
        return plugin.train_step_context
    return None


_SQUARES = ("exp_avg_sq", "square_avg")
"""What optimisers call their running mean of squared gradients: Adam and its kind; RMSprop and Adadelta."""


def second_moments(
    optimizers: Sequence[torch.optim.Optimizer], module: nn.Module, names: Sequence[str]
) -> Optional[Tensor]:
    """``[d]``, what optimisers keep of the squared gradients of the weights that move; None where some have none."""
    parameters, pieces = dict(module.named_parameters()), []
    for name in names:
        states = [o.state[parameters[name]] for o in optimizers if parameters.get(name) in o.state]
        moment = next((states[0][key] for key in _SQUARES if key in states[0]), None) if states else None
        if not isinstance(moment, Tensor) or moment.shape != parameters[name].shape:
            return None
        pieces.append(local_of(moment.detach()).flatten().to("cpu", torch.float32))
    return torch.cat(pieces)


def as_sampler(sampler: Any) -> Any:
    """A sampler as it is, or built from a mapping (Hydra hands nested arguments over as untyped dicts).

    Raises:
        ValueError: for an unknown key, naming it; for a sampler that wants full batches.
        TypeError: for anything else.
    """
    found = samplers.as_sampler(sampler, samplers.BY_NAME)
    name = type(found).__name__
    instead = (
        f"Use LeimkuhlerMatthews, SGLD, RMSpropSGLD or SGNHT here, and estimate_llc(..., sampler={name}(), "
        "full_batch=True) on a stored checkpoint."
    )
    if found is not None and found.full_batch:
        raise ValueError(
            f"sampler={name}(): needs the loss of all the data at every step, which is no way to measure while "
            f"training. {instead}"
        )
    if isinstance(found, KineticLangevin):
        raise ValueError(
            f"sampler={name}(): minibatches heat its chains, and little of that can be taken off. {instead}"
        )
    return found


def plain(restrict: Any, called: str = "restrict") -> Any:
    """Lists of a configuration library as plain lists.

    Args:
        called: what an error calls an empty one.

    Raises:
        ValueError: for a list without an entry.
        TypeError: for a Parameter, a Tensor, or anything else that is not a name or a submodule.
    """
    if restrict is None or isinstance(restrict, (str, nn.Module)):
        return restrict
    entries = restriction_entries(restrict)
    if not entries:
        raise nothing_named(called)
    for entry in entries:
        if not isinstance(entry, (str, nn.Module)):
            raise no_restriction(entry)
    return entries


def listed(restrict: Any) -> list[Any]:
    if restrict is None:
        return []
    return [restrict] if isinstance(restrict, (str, nn.Module)) else list(restrict)


__all__ = [
    "as_sampler",
    "check_dirpath",
    "check_name",
    "is_smoke_test",
    "listed",
    "local_folder",
    "loss_context",
    "plain",
    "second_moments",
]
