"""Whether the loss of a batch depends on which samples are together in it: then no batch may come back.

Negatives of the same batch, pairs that are ranked, class weights or unmasked tokens whose sum divides: the loss of a
dataset is the mean over all the batches that it can be cut into. The few that it is cut into once have a minimum of
their own, at which chains find lower losses than there are.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.structures import over_tensors, tensors_in, tensors_in_collections

log = logging.getLogger(__name__)


HALF = (torch.float16, torch.bfloat16)
CLEAR = 0.1
"""Losses of two batches that say at ``w*`` whether they change: of smaller ones the last digits alone may."""


def couples_samples(
    objective: Objective, batches: tuple[Any, Any], losses: tuple[float, float], batch_size: int
) -> bool:
    """Whether two batches have another loss together when they have exchanged half of their samples.

    A mean over samples has the same, and so has a sum; and a step meets no batch of another size. Where it cannot be
    tried (a batch of one, tensors of different shapes or without the samples in front, shards, a step that draws random
    numbers), it is not told.

    Args:
        objective: active, with ``w*`` in its weights.
        batches: two of the chains.
        losses: of these at ``w*``.
        batch_size: samples in each.
    """
    shaped = [[x for x in tensors_in_collections(batch) if x.ndim > 0] for batch in batches]
    if any(len(tensors_in(b)) != len(tensors_in_collections(b)) for b in batches):  # some are held by an object
        return False
    if objective.draws or objective.layout.sharded or batch_size < 2 or not shaped[0]:
        return False
    if any(x.is_nested or len(x) != batch_size for x in shaped[0] + shaped[1]):
        return False
    if [x.shape for x in shaped[0]] != [x.shape for x in shaped[1]]:
        return False
    half = batch_size // 2

    def mixed(front: Any, back: Any) -> float:
        rest = iter([x for x in tensors_in_collections(back) if x.ndim > 0])

        def joined(x: Tensor) -> Tensor:
            return torch.cat([x[:half], next(rest)[half:]]) if x.ndim > 0 else x

        return float(objective.loss(over_tensors(front, joined)))

    one, other = batches
    clear = abs(losses[0]) + abs(losses[1]) >= CLEAR
    try:
        with preserve_rng(0), torch.no_grad(), nullcontext() if clear else objective.elsewhere():
            kept = losses if clear else (mixed(one, one), mixed(other, other))
            exchanged = mixed(one, other), mixed(other, one)
    except Exception as error:
        log.debug(f"could not see whether the loss couples its samples: {type(error).__name__}: {error}")
        return False
    coarse = objective.autocast or objective.rounds or any(x.dtype in HALF for x in shaped[0])
    slack = (2e-2 if coarse else 1e-4) * (abs(kept[0]) + abs(kept[1]))
    return math.isfinite(slack) and not abs(sum(kept) - sum(exchanged)) <= slack
