"""What the graph of a loss shows of how it was made."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_PASSED = tuple(f"{name}Backward" for name in ("Add", "Sub", "Neg", "Mul", "View", "Squeeze", "ToCopy"))
_SUM = 2
"""``reduction="sum"`` of a loss function, as its node has it."""


def ends_in_sum(loss: Tensor) -> bool:
    """Whether a sum, or a loss function with ``reduction="sum"``, is what the loss was last made by.

    Additions and factors that come after it are looked through, and what is added is to be a sum as well. A mean or a
    division is none: what is divided is taken for a mean.

    Example:
        >>> import torch
        >>> w = torch.ones(3, requires_grad=True)
        >>> [ends_in_sum(x) for x in (2 * w.square().sum(), w.mean(), w.sum() / 3, w.mean() + w.square().sum())]
        [True, False, False, False]
    """
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    found = False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        if name.startswith("SumBackward") or getattr(node, "_saved_reduction", None) == _SUM:
            found = True
        elif name.startswith(_PASSED):
            waiting += [before for before, _ in node.next_functions]
        elif "AccumulateGrad" not in name:
            return False
    return found
