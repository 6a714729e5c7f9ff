"""Whether the loss of a batch depends on which samples are together in it: then no batch may come back.

Negatives of the same batch, pairs that are ranked, class weights or unmasked tokens whose sum divides: the loss of a
dataset is the mean over all the batches that it can be cut into. The few that it is cut into once have a minimum of
their own, at which chains find lower losses than there are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import preserve_rng, seed_globals
from lightning_slt.sampling.structures import over_tensors, tensors_in, tensors_in_collections

log = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)


def couples_samples(objective: Objective, batches: tuple[Any, Any], batch_size: int) -> bool:
    """Whether two batches have another loss together when they have exchanged half of their samples.

    A mean over samples has the same, and so has a sum; and a step meets no batch of another size. What a step draws is
    the same for the same places of a batch. It is looked at with random weights, at which samples have different
    losses: a head that begins at zero gives all of them the same. Where it cannot be tried (a batch of one, tensors of
    different shapes or without the samples in front, lists and arrays beside them, shards), it is not told.

    Args:
        objective: active, with ``w*`` in its weights.
        batches: two of the chains.
        batch_size: samples in each.
    """
    shaped = [[x for x in tensors_in_collections(batch) if x.ndim > 0] for batch in batches]
    if any(len(tensors_in(b)) != len(tensors_in_collections(b)) for b in batches):  # some are held by an object
        return False
    if objective.layout.sharded or batch_size < 2 or not shaped[0]:
        return False
    if any(x.is_nested or len(x) != batch_size for x in shaped[0] + shaped[1]):
        return False
    if [x.shape for x in shaped[0]] != [x.shape for x in shaped[1]]:
        return False
    others = [leaf for leaf in tree_leaves(batches[0]) if not isinstance(leaf, Tensor)]
    if len(others) >= batch_size or any(hasattr(leaf, "__array__") for leaf in others):  # of the samples, and stay
        return False
    half = batch_size // 2

    def mixed(front: Any, back: Any) -> float:
        rest = iter([x for x in tensors_in_collections(back) if x.ndim > 0])

        def joined(x: Tensor) -> Tensor:
            return torch.cat([x[:half], next(rest)[half:]]) if x.ndim > 0 else x

        seed_globals(0)
        return float(objective.loss(over_tensors(front, joined)))

    def losses_at(weights: AbstractContextManager[None]) -> list[float]:
        one, other = batches
        with preserve_rng(0), torch.no_grad(), weights:
            return [mixed(a, b) for a, b in ((one, one), (other, other), (one, other), (other, one))]

    try:
        found = losses_at(nullcontext() if objective.borrowed else scattered(objective.parameters()))
        if not all(map(math.isfinite, found)):
            found = losses_at(objective.elsewhere())
    except Exception as error:
        log.debug(f"could not see whether the loss couples its samples: {type(error).__name__}: {error}")
        return False
    coarse = objective.autocast or objective.rounds or any(x.dtype in HALF for x in shaped[0])
    slack = 2e-2 if coarse else 1e-3 if objective.device.type != "cpu" else 1e-5
    one, other, *exchanged = found
    size = abs(one) + abs(other)
    return math.isfinite(size) and not abs(one + other - sum(exchanged)) <= slack * size


@contextmanager
def scattered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Weights with noise of half their size, and of half of what layers begin with at the least; and put back."""
    home = [(p, p.detach().clone()) for p in parameters if p.is_floating_point()]
    noise = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter, value in home:
                least = value[0].numel() ** -0.5 if value.ndim > 1 and value.numel() else 0.1
                size = max(float(value.float().square().mean()) ** 0.5, least) if value.numel() else 0.0
                drawn = torch.randn(value.shape, generator=noise).to(value.device, value.dtype)
                parameter.add_(drawn, alpha=0.5 * size)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in home:
                parameter.copy_(value)


__all__ = ["couples_samples"]
