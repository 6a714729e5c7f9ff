"""How large what goes into the layers of a module is: the loss is steeper along a weight by the square of its input.

Features of 100 beside others of 1 (columns of a table as they come) make a condition number of 10,000. Chains take
steps that suit the steepest weights, and along the others they hardly move.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import preserve_rng

log = logging.getLogger(__name__)

LARGE_INPUT = 10.0
"""Root mean square of a feature from which on it is large: that of standardised ones is 1. With one of eight features
10 times as large as the others default chains of a perceptron took up to 24 times as long and reached their width in
all of four cases, with one 30 times as large in none."""


@dataclass(frozen=True)
class LargeInput:
    """What goes into a layer.

    Attributes:
        layer: its name in the module; that of its class where it is the module.
        size: root mean square of its largest feature (of a convolution, channel) over a minibatch.
    """

    layer: str
    size: float


def largest_input(objective: Objective, batch: Any) -> Optional[LargeInput]:
    """The largest input of all linear, convolutional and recurrent layers whose weights move, from
    :data:`LARGE_INPUT` on; None where none is so large.

    Looked at by calling the step. Where that cannot be done (shards, a module that is called in place, a step that
    fails there), it is not told.

    Args:
        objective: the loss.
        batch: of the chains.
    """
    if objective.layout.sharded or objective.borrowed:
        return None
    moving = {id(parameter) for parameter in objective.parameters()}
    sizes: dict[str, float] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            size = _size(layer, inputs[0]) if inputs else 0.0
            sizes[name] = max(size, sizes.get(name, 0.0))

        return layer.register_forward_pre_hook(hook)

    layers = [
        (name or type(layer).__name__, layer)
        for name, layer in objective.module.named_modules()
        if isinstance(layer, (nn.Linear, _ConvNd, nn.RNNBase)) and any(id(p) in moving for p in layer.parameters())
    ]
    handles = [watch(name, layer) for name, layer in layers]
    try:
        with preserve_rng(0), objective.active():
            objective.loss(batch)
    except Exception as error:
        log.debug(f"could not see how large the inputs of layers are: {type(error).__name__}: {error}")
        return None
    finally:
        for handle in handles:
            handle.remove()
    if not sizes:
        return None
    layer = max(sizes, key=lambda name: sizes[name])
    return LargeInput(layer, sizes[layer]) if sizes[layer] >= LARGE_INPUT else None


@torch.no_grad()
def _size(layer: nn.Module, given: Any) -> float:
    """Of its largest feature; 0 for what has none that can be told, or is not finite."""
    data = given.data if isinstance(given, PackedSequence) else given
    if not (isinstance(data, Tensor) and data.is_floating_point()) or data.is_nested or not data.numel():
        return 0.0
    if isinstance(layer, _ConvNd):
        data = data.movedim(-1 - len(layer.kernel_size), -1)
    size = float(data.float().reshape(-1, data.shape[-1]).square().mean(dim=0).max().sqrt())
    return size if math.isfinite(size) else 0.0
