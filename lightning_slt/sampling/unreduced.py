"""Losses of single samples from a step that returns a mean: its own call of a loss function is made without reduction.

``F.cross_entropy(output, target)`` is a mean over samples because of one argument. Inside :class:`Unreduced` the loss
functions of :mod:`torch.nn.functional` are called with ``reduction="none"`` instead, and a mean over what belongs to
each sample is what the step goes on with: ``[samples]`` where it had a scalar. One forward pass of a whole batch then
gives what a pass for each sample would.

It is a trick, and no more is believed of it than the numbers show: whoever uses it compares them with those of samples
alone. A step that takes the number out (``.item()``), means by itself, or weights classes, is left to other ways.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_BY_CLASS = {functional.cross_entropy, functional.nll_loss}
_ELEMENTWISE = {
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.poisson_nll_loss,
    functional.gaussian_nll_loss,
    functional.soft_margin_loss,
}


class Unreduced(TorchFunctionMode):
    """Means of losses are means for each sample inside it.

    Args:
        samples: in the batch; the first dimension of a loss is theirs, or a multiple of it (tokens of a sample beside
            each other).

    Example:
        >>> import torch
        >>> output, target = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
        >>> with Unreduced(2):
        ...     functional.cross_entropy(output, target)
        tensor([0.1269, 0.6931])
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self._samples = samples

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = func in _BY_CLASS or func in _ELEMENTWISE
        if not wanted or kwargs.get("reduction", "mean") != "mean" or kwargs.get("weight") is not None:
            return func(*args, **kwargs)
        losses = func(*args, **{**kwargs, "reduction": "none"})
        if not losses.ndim or losses.shape[0] % self._samples:
            return losses.mean()
        rows = losses.reshape(self._samples, -1)
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if func in _BY_CLASS and isinstance(target, Tensor) and not target.is_floating_point():
            # positions to be ignored are no part of the mean; a sample without any other has none
            counted = (target != kwargs.get("ignore_index", -100)).reshape(self._samples, -1)
            return (rows * counted).sum(dim=1) / counted.sum(dim=1)
        return rows.mean(dim=1)
