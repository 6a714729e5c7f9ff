"""What a step of training takes: a forward and a backward pass of the whole module, on minibatches of training."""

from __future__ import annotations

from statistics import median

import torch

from lightning_slt.sampling.anchor import open_window
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.device_clock import seconds_on
from lightning_slt.sampling.engines import sequential_engine
from lightning_slt.sampling.objective import Objective

FIRST, LEAST, MOST = 3, 5, 100
"""Steps that load kernels and are not counted; those that are timed at the least, and at the most ..."""
LONG = 1.0
"""... within so many seconds."""


def training_step_seconds(objective: Objective, source: MinibatchSource) -> float:
    """The median of some steps; an optimiser's update, loading data and logging come on top.

    Args:
        objective: the loss over all the weights that train.
        source: minibatches of the size of training's.

    Raises:
        NoLossError: where the step gives no loss for any minibatch.
    """
    open_window(objective, source)
    window = source.window(0)
    usable = list(window.anchor_loss)
    engine = sequential_engine(objective)
    seconds: list[float] = []
    with objective.active():
        engine.bind(objective.anchor.clone().unsqueeze(0), torch.zeros_like(objective.anchor).unsqueeze(0))
        try:
            for k in range(FIRST + MOST):
                start = seconds_on(objective.device)
                engine.step(window[usable[k % len(usable)]])
                seconds.append(seconds_on(objective.device) - start)
                if len(seconds) >= FIRST + LEAST and sum(seconds) > LONG:
                    break
        finally:
            engine.release()
    return median(seconds[FIRST:])


__all__ = ["training_step_seconds"]
