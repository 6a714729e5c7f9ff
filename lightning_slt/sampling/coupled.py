"""Whether the loss of a batch depends on which samples are together in it: then no batch may come back.

Negatives of the same batch, pairs that are ranked, class weights or unmasked tokens whose sum divides: the loss of a
dataset is the mean over all the batches that it can be cut into. The few that it is cut into once have a minimum of
their own, at which chains find lower losses than there are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import preserve_rng, seed_globals
from lightning_slt.sampling.step_call import LOW_PRECISION
from lightning_slt.sampling.structures import data_in, over_tensors, tensors_in_collections
from lightning_slt.sampling.trials import moved

log = logging.getLogger(__name__)

ALONE = (
    "the loss of a batch depends on which samples are together in it (weights that divide, as of classes or of "
    "unmasked tokens): what is read of a sample is its loss alone, without its weight"
)
"""What is said where losses of single samples are read of such a loss."""


def couples_samples(objective: Objective, batches: tuple[Any, Any], batch_size: int) -> bool:
    """Whether two batches have another loss together when they have exchanged some of their samples.

    A mean over samples has the same, and so has a sum; and a step meets no batch of another size. What is exchanged is
    about half, at irregular places: pairs of neighbours, of both halves or of both ends would else stay together. What
    a step draws is the same for the same places of a batch. It is looked at with random weights, at which samples have
    different losses: a head that begins at zero gives all of them the same. Where it cannot be tried (a batch of one,
    tensors of different shapes or without the samples in front, lists and arrays beside them, shards), it is not told.

    Args:
        objective: active, with ``w*`` in its weights.
        batches: two of the chains.
        batch_size: samples in each.
    """
    shaped = [_by_sample(objective, batch, batch_size) for batch in batches]
    if batch_size < 2 or not shaped[0] or [x.shape for x in shaped[0]] != [x.shape for x in shaped[1]]:
        return False
    places = _places(batch_size)

    def mixed(front: Any, back: Any) -> Any:
        rest = iter([x for x in tensors_in_collections(back) if x.ndim > 0])

        def joined(x: Tensor) -> Tensor:
            return next(rest).index_copy(0, places.to(x.device), x[places.to(x.device)]) if x.ndim > 0 else x

        return over_tensors(front, joined)

    one, other = batches
    pairs = ((one, one), (other, other), (one, other), (other, one))
    found = _losses(objective, [partial(mixed, front, back) for front, back in pairs])
    return found is not None and not _agree(objective, shaped[0], found[:2], found[2:])


def averages_halves(objective: Objective, batch: Any, batch_size: int) -> bool:
    """Whether the loss of a batch is the mean of those of its halves, and so the same for batches of any size; not for
    a sum over samples, also where a number divides it, nor for what couples them.

    Args:
        objective: active, with ``w*`` in its weights.
        batch: any.
        batch_size: samples in it.

    Returns:
        False as well where it cannot be told: an odd number, what :func:`couples_samples` cannot try, and a step that
        draws random numbers, which are others for half a batch.
    """
    shaped, half = _by_sample(objective, batch, batch_size), batch_size // 2
    if batch_size % 2 or not shaped:
        return False
    found = _losses(
        objective, [partial(_cut, batch, *ends) for ends in ((0, batch_size), (0, half), (half, batch_size))]
    )
    if found is None or not all(map(math.isfinite, found)):
        return False
    return _agree(objective, shaped, [2.0 * found[0]], found[1:])


def _by_sample(objective: Objective, batch: Any, batch_size: int) -> list[Tensor]:
    """The tensors of a batch that have its samples in front; none where it cannot be told which samples they are."""
    held = tensors_in_collections(batch)
    shaped = [x for x in held if x.ndim > 0]
    if objective.layout.sharded or len(data_in(batch)) != len(held):  # arrays, or held by an object
        return []
    if any(x.is_nested or len(x) != batch_size for x in shaped):
        return []
    # of the samples, which they would not go with
    beside = sum(not isinstance(leaf, Tensor) for leaf in tree_leaves(batch))
    return shaped if beside < batch_size else []


def _cut(batch: Any, start: int, stop: int) -> Any:
    return over_tensors(batch, lambda x: x[start:stop] if x.ndim > 0 else x)


def _losses(objective: Objective, batches: Sequence[Callable[[], Any]]) -> list[float] | None:
    """At random weights, where samples have different losses; None where one cannot be had."""

    def losses_at(weights: AbstractContextManager[None]) -> list[float]:
        found = []
        with preserve_rng(0), torch.no_grad(), weights:
            for batch in batches:
                made = batch()
                seed_globals(0)
                found.append(float(objective.loss(made)))
        return found

    try:
        scatter = _scatter(torch.Generator().manual_seed(0))
        found = losses_at(nullcontext() if objective.borrowed else moved(objective.parameters(), scatter))
        return found if all(map(math.isfinite, found)) else losses_at(objective.elsewhere())
    except Exception as error:
        log.debug(f"could not see whether the loss couples its samples: {type(error).__name__}: {error}")
        return None


def _agree(objective: Objective, shaped: Sequence[Tensor], some: Sequence[float], others: Sequence[float]) -> bool:
    """Whether the sums of two lists of losses are the same within rounding, where the first list is finite."""
    coarse = objective.autocast or objective.rounds or any(x.dtype in LOW_PRECISION for x in shaped)
    slack = 2e-2 if coarse else 1e-3 if objective.device.type != "cpu" else 1e-5
    size = sum(map(abs, some))
    return not math.isfinite(size) or abs(sum(some) - sum(others)) <= slack * size


def couples_halves(objective: Objective, batch: Any, batch_size: int) -> bool:
    """:func:`couples_samples` of both halves of one batch; the last sample of an odd number is left out."""
    if not _by_sample(objective, batch, batch_size):
        return False
    half = batch_size // 2
    return couples_samples(objective, (_cut(batch, 0, half), _cut(batch, half, 2 * half)), half)


def _places(batch_size: int) -> Tensor:
    """About half of the places of a batch, in no order; an odd number, so that no pairing leaves all pairs whole."""
    order = torch.randperm(batch_size, generator=torch.Generator().manual_seed(0), device="cpu")
    return order[: (batch_size // 2 - 1) | 1]


def _scatter(noise: torch.Generator) -> Callable[[nn.Parameter], object]:
    """Adds noise of half the size of the weights, and of half of what layers begin with at the least."""

    def scattered(parameter: nn.Parameter) -> None:
        if not parameter.is_floating_point() or not parameter.numel():
            return
        least = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        size = max(float(parameter.float().square().mean()) ** 0.5, least)
        drawn = torch.randn(parameter.shape, generator=noise, device="cpu").to(parameter.device, parameter.dtype)
        parameter.add_(drawn, alpha=0.5 * size)

    return scattered


__all__ = ["averages_halves", "couples_halves", "couples_samples"]
