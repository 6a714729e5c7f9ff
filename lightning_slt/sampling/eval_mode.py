"""Weights that the loss depends on in training mode alone: chains, in eval mode, do not feel them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.steps import NoGradientError, NoLossError, check_gradient
from lightning_slt.sampling.structures import clone
from lightning_slt.sampling.window import Window


def only_in_training(objective: Objective, window: Window) -> tuple[str, ...]:
    """Those of the moving weights that reach the loss of none of the minibatches measured so far in eval mode, and that
    of the first in training mode.

    A part that is not used by one minibatch may be by another: an expert that no sample was sent to.
    """
    names, batches = objective.unreached, list(window.anchor_loss)
    for number in batches:
        if not names:
            return ()
        names = _unreached(objective, objective.module, names, window[number])

    def ask(twin: nn.Module) -> tuple[str, ...]:
        without = _unreached(objective, twin, names, window[batches[0]])
        return tuple(name for name in names if name not in without)

    return objective.in_training(ask, ()) if names else ()


def _unreached(objective: Objective, module: nn.Module, names: tuple[str, ...], batch: Any) -> tuple[str, ...]:
    own = dict(module.named_parameters())
    with torch.enable_grad():
        try:
            loss = objective.loss_of(module, clone(batch))
        except NoLossError:  # a step that draws may give one at another time
            return names
        if not loss.requires_grad:
            return names
        _refuse_frozen([name for name in names if not own[name].requires_grad])
        grads = torch.autograd.grad(loss, [own[name] for name in names], allow_unused=True)
    return tuple(name for name, grad in zip(names, grads, strict=True) if grad is None)


def _refuse_frozen(names: Sequence[str]) -> None:
    """A chain would move them without their gradient."""
    if names:
        raise NoGradientError(
            f"the step itself freezes {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} (requires_grad), which "
            "chains move since they trained when the chains began. Freeze them outside of the step, in a hook such as "
            "on_train_batch_start, or leave them out with restrict=."
        )


def misfit_of_eval(objective: Objective) -> tuple[str, ...]:
    """Why chains do not sample the posterior of the loss that trains; empty where they do, as far as is known.

    Args:
        objective: the loss, once minibatches have been measured.
    """
    names = objective.only_in_training
    if not names:
        return ()
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(names)} of {len(objective.names)} moving tensors ({shown}) reach the loss in training mode and not in "
        "eval mode, in which chains call the module: weights of LoRA that eval() merges, or a head for training alone. "
        "Give a loss_fn(module, batch) that depends on them in eval mode too, or leave them out with restrict",
    )


def refuse_without_gradient(objective: Objective, batch: Any) -> None:
    """Where no weight reaches the loss in eval mode, and some do in training mode.

    Raises:
        NoGradientError: that says so.
    """
    misfit = misfit_of_eval(objective)
    if not misfit:
        return
    with torch.enable_grad():
        loss = objective.loss(batch)
    try:
        check_gradient(loss)
    except NoGradientError as error:
        raise NoGradientError(f"{misfit[0]}.") from error
