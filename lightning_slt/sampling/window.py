"""A few minibatches on the chains' device, held together, of which each chain picks its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cached_property
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_slt.sampling.counting import common_length
from lightning_slt.sampling.structures import PLAIN, tensors_in


class Window:
    """Some minibatches, addressed by number, alone or several stacked.

    Args:
        batches: at least one.
        is_whole: they hold all the data, each sample as often as any other.
    """

    def __init__(self, batches: Sequence[Any], is_whole: bool = False) -> None:
        self.batches = list(batches)
        self.is_whole = is_whole
        self._columns: Optional[list[Any]] = None
        self._spec: Any = None
        self.anchor_loss: dict[int, float] = {}
        """``L_B(w*)`` of the batches measured so far."""
        self.without_loss: set[int] = set()
        """Batches for which the step gives no loss."""

    def __len__(self) -> int:
        return len(self.batches)

    @cached_property
    def shares(self) -> Optional[Tensor]:
        """``[batches]`` float64, how often each is to be seen for the mean over their samples; None for all alike.

        What is left at the end of an epoch is a smaller batch, whose samples would count for more than others. Batches
        of many sizes, as those that hold about as many tokens each, are left as they are: what their loss is a mean
        over cannot be told.
        """
        lengths = [common_length(batch) for batch in self.batches]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths) or min(known) == max(known) or 2 * known.count(max(known)) < len(known):
            return None
        return torch.tensor(known, dtype=torch.float64, device="cpu") / sum(known)

    def forget(self) -> None:
        """Drop what belongs to the weights under study; the batches stay."""
        self.anchor_loss.clear()
        self.without_loss.clear()

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]

    @property
    def unlike(self) -> str:
        """Why the batches cannot be stacked, for several chains to be computed at once; empty where they can."""
        first, spec = tree_flatten(self.batches[0])
        closed = [leaf for leaf in first if not isinstance(leaf, Tensor) and tensors_in(leaf)]
        if closed:
            name = type(closed[0]).__name__
            remedy = f"; torch.export.register_dataclass({name}) shows them" if is_dataclass(closed[0]) else ""
            return f"the batches hold a {name}, whose tensors torch does not find{remedy}"
        for batch in self.batches[1:]:
            leaves, other = tree_flatten(batch)
            if other != spec:
                return "the batches differ in structure"
            for a, b in zip(first, leaves, strict=True):
                if isinstance(a, Tensor) != isinstance(b, Tensor):
                    return "the batches differ in structure"
                if isinstance(a, Tensor):
                    if a.is_nested:
                        return "the batches hold nested tensors"
                    if a.shape != b.shape or a.dtype != b.dtype:
                        return "the batches differ in shape"
                elif a is not b and (type(a) is not type(b) or not isinstance(a, PLAIN) or a != b):
                    return "the batches hold other values beside their tensors"
        return "" if any(isinstance(leaf, Tensor) for leaf in first) else "the batches hold no tensor"

    def gather(self, indices: Tensor) -> tuple[list[Any], list[Optional[int]]]:
        """The leaves of the batches of ``indices``, tensors stacked along a new first dimension, and where
        :func:`torch.vmap` finds that: None for what is the same for all. Of a window of one batch that is everything:
        products with it become one large product."""
        if self._columns is None:
            self._columns = self._stack()
        if len(self) == 1:
            return self._columns, [None] * len(self._columns)
        stacked = [c.index_select(0, indices.to(c.device)) if isinstance(c, Tensor) else c for c in self._columns]
        return stacked, [0 if isinstance(c, Tensor) else None for c in self._columns]

    def _stack(self) -> list[Any]:
        leaves = [tree_flatten(batch)[0] for batch in self.batches]
        self._spec = tree_flatten(self.batches[0])[1]
        if len(self) == 1:
            return leaves[0]
        columns = [_stack(c) if isinstance(c[0], Tensor) else c[0] for c in zip(*leaves, strict=True)]
        # the batches become views of the stack: they are not held twice
        self.batches = [
            self.whole([c[i] if isinstance(c, Tensor) else c for c in columns]) for i in range(len(self.batches))
        ]
        return columns

    def whole(self, leaves: Sequence[Any]) -> Any:
        """A batch of the structure that :meth:`gather` has found, of these leaves."""
        return tree_unflatten(leaves, self._spec)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """As :func:`torch.stack`; where they lie one after another in the same memory already, that memory itself."""
    first, size = tensors[0], tensors[0].numel()
    plain = all(type(t) is Tensor and t.layout is torch.strided and not t.requires_grad for t in tensors)
    if plain and all(
        t.is_contiguous()
        and t.storage_offset() == first.storage_offset() + k * size
        and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for k, t in enumerate(tensors)
    ):
        return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))
    return torch.stack(tuple(tensors))
