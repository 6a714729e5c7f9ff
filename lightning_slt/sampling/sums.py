"""Whether the loss of a batch is the sum over its samples: chains need the mean, whose n-fold is the log likelihood."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from lightning_slt.functional.posterior import default_nbeta
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.structures import over_tensors, tensors_in

log = logging.getLogger(__name__)

FEW = 4
"""Samples that are counted once, twice and three times."""
MORE, DRAWS = 64, 32
"""So many, and so many draws of their loss, where a step draws random numbers."""
IS_SUM = "the loss of a minibatch is a sum over its samples"


def is_sum(objective: Objective, batch: Any, batch_size: int) -> bool:
    """Whether twice the samples have twice the loss, and three times the samples three times.

    Tried where the graph of the loss ends in a sum. A loss that couples samples has something else. Where it cannot be
    tried (a batch of one, tensors that do not all have the samples in front, shards, a module that is called in place),
    it is no sum; nor is one that is divided, by the batch size or a constant. Of a step that draws random numbers it is
    the mean over some of them.

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
    count = min(MORE if objective.draws else FEW, batch_size // 2)

    def times(number: int) -> Tensor:
        some = over_tensors(batch, lambda x: torch.cat([x[:count]] * number) if x.ndim > 0 else x)
        return torch.stack([objective.loss(some).double().cpu() for _ in range(DRAWS if objective.draws else 1)])

    try:
        with preserve_rng(0), torch.no_grad(), objective.elsewhere():
            once = times(1)
            size = abs(float(once.mean()))
            slack = (2e-2 if objective.autocast else 1e-4) * size
            return math.isfinite(size) and all(_is_multiple(times(k), once, k, slack) for k in (2, 3))
    except Exception as error:
        log.debug(f"could not see whether the loss is a sum over samples: {type(error).__name__}: {error}")
        return False


def _is_multiple(more: Tensor, once: Tensor, k: int, slack: float) -> bool:
    """Whether ``more`` is k times ``once``, and not as much: of several draws on average, within three errors."""
    error = 0.0
    if len(once) > 1:
        error = 3 * math.sqrt((float(more.var()) + k**2 * float(once.var())) / len(once))
    off = abs(float(more.mean()) - k * float(once.mean()))
    return slack > 0 and off <= slack + error and 2 * error < (k - 1) * abs(float(once.mean()))


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
