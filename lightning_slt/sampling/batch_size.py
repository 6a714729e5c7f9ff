"""How many samples a minibatch has where nobody says: more than 64 where more cost hardly anything.

The noise of minibatches keeps the step of a chain small where labels are noisy, and chains take as many steps more:
with 256 samples in place of 64 a step may be up to four times as large. Of a small network most of a step is calls and
not products. On one thread, eight chains, perceptrons of 67 to 3,333 weights, a step on 256 samples took 1.25 to 1.65
times as long as one on 64; where labels were noisy (three classes, n = 1,000) estimates of the same error then took
0.25 to 0.37 of the processor time.

Of a large network products are most of it. There a larger batch gains nothing that it does not cost, and takes memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_slt.sampling.anchor import measure_first
from lightning_slt.sampling.batches import DatasetSource, MinibatchSource
from lightning_slt.sampling.coupled import averages_halves
from lightning_slt.sampling.objective import Objective

USUAL, LARGE = 64, 256
MOST_WEIGHTS = 4096
"""Of the module, whether they move or not: from here on products show."""
MOST_KEPT = 256
"""Numbers for each sample that the backward pass needs: convolutions have many for few weights, and recurrence has."""


def enlarge(objective: Objective, source: MinibatchSource) -> None:
    """Give minibatches :data:`LARGE` samples where their size was left open and they are cheap.

    Only where the loss of a batch is seen to be the mean over its samples: any other is another loss at another size.

    Args:
        objective: of which the first minibatch has been looked at.
        source: whose first window has been opened; it begins anew where the size changes.
    """
    if not (isinstance(source, DatasetSource) and source.size_is_open) or source.batch_size == source.num_indexed:
        return
    if sum(weights.numel() for weights in objective.module.parameters()) > MOST_WEIGHTS:
        return
    window, size = source.window(0), source.batch_size
    batch = window[next(iter(window.anchor_loss))]
    with objective.active():
        if _kept(objective, batch) > MOST_KEPT * size or not averages_halves(objective, batch, size):
            return
    source.resize(LARGE)
    measure_first(objective, source)


def _kept(objective: Objective, batch: Any) -> int:
    """Numbers that the graph of the loss of a minibatch holds."""
    total = 0

    def count(saved: Tensor) -> Tensor:
        nonlocal total
        total += saved.numel()
        return saved

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        objective.loss(batch)
    return total
