"""Whether the loss of a batch is the sum over its samples: chains need the mean, whose n-fold is the log likelihood."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_slt.functional.posterior import default_nbeta
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.window import tensors_in

log = logging.getLogger(__name__)

FEW = 4
"""Samples that are counted once, twice and three times."""
IS_SUM = "the loss of a minibatch is a sum over its samples"


def is_sum(objective: Objective, batch: Any, batch_size: int) -> bool:
    """Whether twice the samples have twice the loss, and three times the samples three times.

    Tried where the graph of the loss ends in a sum. A loss that couples samples has something else. Where it cannot be
    tried (a batch of one, tensors that do not all have the samples in front, shards, a step that draws random numbers,
    a module that is called in place), it is no sum; nor is one that is divided, by the batch size or a constant.

    Args:
        objective: active, with ``w*`` in its weights.
        batch: of the chains.
        batch_size: samples in it.
    """
    if not objective.ends_in_sum:
        return False
    shaped = [x for x in tensors_in(batch) if x.ndim > 0]
    if batch_size < 2 or not shaped or any(len(x) != batch_size for x in shaped) or objective.layout.sharded:
        return False
    count = min(FEW, batch_size // 2)

    def times(number: int) -> float:
        some = apply_to_collection(batch, Tensor, lambda x: torch.cat([x[:count]] * number) if x.ndim > 0 else x)
        return float(objective.loss(some))

    try:
        with preserve_rng(), torch.no_grad(), objective.elsewhere():
            once = times(1)
            slack = (2e-2 if objective.autocast else 1e-4) * abs(once)
            return math.isfinite(once) and all(0 < slack >= abs(times(k) - k * once) for k in (2, 3))
    except Exception as error:
        log.debug(f"could not see whether the loss is a sum over samples: {type(error).__name__}: {error}")
        return False


def misfit_of_sum(objective: Objective, source: MinibatchSource, nbeta: float) -> tuple[str, ...]:
    """Why chains at this ``nbeta`` do not sample the posterior, where the loss is a sum; empty where it is none, or
    ``nbeta`` is not the one of a mean.

    Args:
        objective: the loss.
        source: of minibatches.
        nbeta: of the chains.
    """
    n = source.num_samples
    if not objective.is_sum or n is None or n < 2 or not math.isclose(nbeta, default_nbeta(n)):
        return ()
    return (
        f"{IS_SUM}, and nbeta = n / log n is for their mean: {source.batch_size} times too large for a plain sum. "
        "Divide it by the number of samples in the batch (reduction='mean'), or give another nbeta, which is taken as "
        "it is",
    )
