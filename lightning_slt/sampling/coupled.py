"""Whether the loss of a batch depends on which samples are together in it: then no batch may come back.

Negatives of the same batch, pairs that are ranked, class weights or unmasked tokens whose sum divides: the loss of a
dataset is the mean over all the batches that it can be cut into. The few that it is cut into once have a minimum of
their own, at which chains find lower losses than there are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
    shaped = [[x for x in tensors_in_collections(batch) if x.ndim > 0] for batch in batches]
    if any(len(data_in(b)) != len(tensors_in_collections(b)) for b in batches):  # arrays, or held by an object
        return False
    if objective.layout.sharded or batch_size < 2 or not shaped[0]:
        return False
    if any(x.is_nested or len(x) != batch_size for x in shaped[0] + shaped[1]):
        return False
    if [x.shape for x in shaped[0]] != [x.shape for x in shaped[1]]:
        return False
    if sum(not isinstance(leaf, Tensor) for leaf in tree_leaves(batches[0])) >= batch_size:
        return False  # of the samples, which they would not go with
    places = _places(batch_size)

    def mixed(front: Any, back: Any) -> float:
        rest = iter([x for x in tensors_in_collections(back) if x.ndim > 0])

        def joined(x: Tensor) -> Tensor:
            return next(rest).index_copy(0, places.to(x.device), x[places.to(x.device)]) if x.ndim > 0 else x

        seed_globals(0)
        return float(objective.loss(over_tensors(front, joined)))

    def losses_at(weights: AbstractContextManager[None]) -> list[float]:
        one, other = batches
        with preserve_rng(0), torch.no_grad(), weights:
            return [mixed(a, b) for a, b in ((one, one), (other, other), (one, other), (other, one))]

    try:
        scatter = _scatter(torch.Generator().manual_seed(0))
        found = losses_at(nullcontext() if objective.borrowed else moved(objective.parameters(), scatter))
        if not all(map(math.isfinite, found)):
            found = losses_at(objective.elsewhere())
    except Exception as error:
        log.debug(f"could not see whether the loss couples its samples: {type(error).__name__}: {error}")
        return False
    coarse = objective.autocast or objective.rounds or any(x.dtype in LOW_PRECISION for x in shaped[0])
    slack = 2e-2 if coarse else 1e-3 if objective.device.type != "cpu" else 1e-5
    one, other, *exchanged = found
    size = abs(one) + abs(other)
    return math.isfinite(size) and not abs(one + other - sum(exchanged)) <= slack * size


def couples_halves(objective: Objective, batch: Any, batch_size: int) -> bool:
    """:func:`couples_samples` of both halves of one batch; the last sample of an odd number is left out."""
    shaped = [x for x in tensors_in_collections(batch) if x.ndim > 0]
    if objective.layout.sharded or any(x.is_nested or len(x) != batch_size for x in shaped):
        return False
    half = batch_size // 2

    def part(start: int) -> Any:
        return over_tensors(batch, lambda x: x[start : start + half] if x.ndim > 0 else x)

    return couples_samples(objective, (part(0), part(half)), half)


def _places(batch_size: int) -> Tensor:
    """About half of the places of a batch, in no order; an odd number, so that no pairing leaves all pairs whole."""
    order = torch.randperm(batch_size, generator=torch.Generator().manual_seed(0))
    return order[: (batch_size // 2 - 1) | 1]


def _scatter(noise: torch.Generator) -> Callable[[nn.Parameter], object]:
    """Adds noise of half the size of the weights, and of half of what layers begin with at the least."""

    def scattered(parameter: nn.Parameter) -> None:
        if not parameter.is_floating_point() or not parameter.numel():
            return
        least = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        size = max(float(parameter.float().square().mean()) ** 0.5, least)
        drawn = torch.randn(parameter.shape, generator=noise).to(parameter.device, parameter.dtype)
        parameter.add_(drawn, alpha=0.5 * size)

    return scattered


__all__ = ["couples_halves", "couples_samples"]
