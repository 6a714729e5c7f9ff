"""Losses of minibatches at ``w*``, the weights that the chains start from, and which minibatches have none."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Optional

import torch
from torch import Tensor

from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.coupled import couples_halves, couples_samples
from lightning_slt.sampling.eval_mode import only_in_training, refuse_without_gradient
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import seed_globals
from lightning_slt.sampling.shadow import CopyError
from lightning_slt.sampling.steps import EVAL_MODE, NoLossError, no_loss_of
from lightning_slt.sampling.sums import is_sum
from lightning_slt.sampling.window import Window

PROBED_BATCHES = 8
"""Minibatches whose loss is known before anything is tried on them."""
ONLY_IN_TRAINING = (
    f"In training mode the step gives a loss. {EVAL_MODE} Give a loss_fn(module, batch) that has one in eval mode too."
)


def open_window(objective: Objective, source: MinibatchSource) -> float:
    """Adapt ``objective`` to the first minibatch that has a loss, and return that loss; measure a few more for probes.

    Raises:
        NoLossError: where no minibatch of the first window has a loss.
        AssertionError: where the step fails an assertion, with what may be behind it.
        Exception: whatever else the user's step raises; where it does not fail in training mode, it says so.
    """
    try:
        return _opened(objective, source)
    except AssertionError as error:
        # of the step most often, and it may say nothing itself
        if EVAL_MODE in str(error):
            raise
        said = f": {error}" if str(error) else ""
        raise AssertionError(f"an assertion failed while the loss was computed{said}. {EVAL_MODE}") from error


def _opened(objective: Objective, source: MinibatchSource) -> float:
    if source.coupled:
        source.let_pass()
    window = source.window(0)
    adapted: Optional[int] = None
    summed = False
    for i in range(len(window)):
        try:
            if adapted is None:
                objective.adapt(window[i])
                adapted = i
            with objective.active(), torch.no_grad():
                window.anchor_loss[i] = float(objective.loss(window[i]))
                if i == adapted:
                    objective.compare_with_first(window.anchor_loss[i])
                if not summed:
                    objective.is_sum, summed = is_sum(objective, window[i], source.batch_size), True
        except NoLossError:
            window.without_loss.add(i)
        except (AssertionError, CopyError):
            raise
        except Exception as error:
            remedy = _remedy(error, objective, window[i])
            if remedy is None:
                raise
            raise _as(error, f"{str(error).rstrip('.') or type(error).__name__}. {remedy}") from error
        if len(window.anchor_loss) >= PROBED_BATCHES:
            break
    if window.anchor_loss:
        if objective.unreached:
            with objective.active():
                objective.only_in_training = only_in_training(objective, window)
                refuse_without_gradient(objective, window[next(iter(window.anchor_loss))])
        return next(iter(window.anchor_loss.values()))
    raise no_loss_of(objective.given_loss)


def coupling(objective: Objective, source: MinibatchSource) -> Optional[bool]:
    """Whether the loss couples the samples of a batch, asked where it is not known; None where no batch need come back
    or it cannot be told. The first window has been opened."""
    if source.coupled is not None or not source.can_pass:
        return source.coupled
    window = source.window(0)
    known = list(window.anchor_loss)[:2]
    if len(known) < 2:
        return None
    with objective.active():
        return couples_samples(objective, (window[known[0]], window[known[1]]), source.batch_size)


def weighs_together(objective: Objective, source: MinibatchSource) -> bool:
    """Whether the loss of a batch depends on which samples are together in it, as :func:`coupling`, wherever that can
    be told: also where no batch comes back, or all the data is one batch, whose halves are then compared.

    Args:
        objective: active, with ``w*`` in its weights.
        source: whose first window has been opened.
    """
    if source.coupled is not None:
        return source.coupled
    window = source.window(0)
    known = [window[number] for number in window.anchor_loss]
    if len(known) == 1:
        return couples_halves(objective, known[0], source.batch_size)
    return len(known) > 1 and couples_samples(objective, (known[0], known[1]), source.batch_size)


def let_pass(objective: Objective, source: MinibatchSource) -> None:
    """Have no batch come back; the first window is another one from now on."""
    if source.can_pass:
        source.let_pass()
        measure_first(objective, source)


def measure_first(objective: Objective, source: MinibatchSource) -> None:
    """The losses at ``w*`` of a few minibatches, where the first window is another one than that which was opened."""
    window = source.window(0)
    with objective.active():
        measure_anchor(objective, window, torch.arange(min(PROBED_BATCHES, len(window)), device="cpu"))


def _remedy(error: Exception, objective: Objective, batch: Any) -> Optional[str]:
    """What may be behind an error of the step, or of ``loss_fn``; None where that is not known."""
    if objective.has_loss_in_training(batch):
        return ONLY_IN_TRAINING
    if objective.given_loss is None or not isinstance(error, (TypeError, AttributeError)):
        return None
    kind = type(objective.module).__name__
    if kind not in str(error) and "positional argument" not in str(error):
        return None
    name = getattr(objective.given_loss, "__name__", type(objective.given_loss).__name__)
    return (
        f"loss_fn={name}: is called as loss_fn(module, batch), here with a {kind} and a {type(batch).__name__}. If it "
        "is a loss of outputs and targets, give lambda module, batch: criterion(module(batch[0]), batch[1])."
    )


def _as(error: Exception, message: str) -> Exception:
    """An error of the same type with another message, where the type takes one."""
    try:
        told = type(error)(message)
    except Exception:
        return RuntimeError(message)
    return told if "loss_fn" in str(told) else RuntimeError(message)


def measure_anchor(objective: Objective, window: Window, indices: Tensor) -> Tensor:
    """Measure the losses at ``w*`` of the minibatches that are about to be used, each once in a window's life.

    Args:
        objective: the loss, active, with ``w*`` in its weights.
        window: keeps what is measured.
        indices: ``[chains, steps]``, which minibatch each chain is about to see.

    Returns:
        ``indices``, with other minibatches in the place of those without a loss.

    Raises:
        NoLossError: where no minibatch of those measured has a loss.
    """
    for i in indices.unique().tolist():
        if i in window.anchor_loss:
            continue
        try:
            with torch.no_grad():
                window.anchor_loss[i] = float(objective.loss(window[i]))
        except NoLossError:
            window.without_loss.add(i)
    if window.without_loss:
        usable = torch.tensor([i for i in range(len(window)) if i in window.anchor_loss], device="cpu")
        if not len(usable):
            raise no_loss_of(objective.given_loss)
        without = torch.isin(indices, torch.tensor(sorted(window.without_loss), device="cpu"))
        indices = torch.where(without, usable[indices % len(usable)], indices)
    return indices


def some_batch(objective: Objective, window: Window) -> int:
    """A minibatch whose loss at ``w*`` is known, measured where none is yet.

    Raises:
        NoLossError: where no minibatch has a loss.
    """
    for i in range(len(window)):
        if window.anchor_loss:
            break
        with suppress(NoLossError):
            measure_anchor(objective, window, torch.tensor([i], device="cpu"))
    if not window.anchor_loss:
        raise no_loss_of(objective.given_loss)
    return next(iter(window.anchor_loss))


def anchor_of_steps(objective: Objective, window: Window, indices: Tensor, seeds: Tensor) -> Tensor:
    """The loss at ``w*`` of every step by itself, for a step that draws random numbers: with those numbers.

    Of other ones it would be off by what they change, by the same at all steps of all chains: no error tells.

    Args:
        objective: the loss, active, with ``w*`` in its weights.
        window: of the minibatches.
        indices: ``[chains, steps]``, which minibatch each chain is about to see.
        seeds: ``[chains, steps]``, of the numbers.

    Returns:
        ``[chains, steps]`` float64; NaN where there is no loss.
    """
    if indices.numel() == 0:
        return torch.empty(indices.shape, dtype=torch.float64, device="cpu")
    unknown = torch.tensor(torch.nan, device=objective.device)
    rows = []
    for numbers, own in zip(indices.tolist(), seeds.tolist(), strict=True):
        losses = [unknown] * len(numbers)
        for t, (number, seed) in enumerate(zip(numbers, own, strict=True)):
            seed_globals(seed)
            with suppress(NoLossError), torch.no_grad():
                losses[t] = objective.loss(window[number])
        rows.append(torch.stack([loss.double() for loss in losses]).cpu())  # a GPU is waited for once
    return torch.stack(rows)
