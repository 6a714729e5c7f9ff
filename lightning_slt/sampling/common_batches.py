"""The first rank's minibatches on all ranks that run a chain together.

They read the same data as a rule, and nothing has to be sent. But where batches are those that training saw (each rank
its own), or a dataset makes up its samples as it goes, each would have others: the loss would be that of one batch, and
its gradient the mean over several.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.collective import Together
from lightning_slt.sampling.structures import clone, over_tensors
from lightning_slt.sampling.window import Window


class CommonBatches(MinibatchSource):
    """A source whose windows are the first rank's.

    Args:
        source: this rank's own.
        ranks: those that must have the same; made and asked for windows on all of them at once.

    Attributes:
        num_samples, batch_size, resident: the first rank's.
    """

    def __init__(self, source: MinibatchSource, ranks: Together) -> None:
        self._source, self._ranks = source, ranks
        self.num_samples, self.batch_size, self.resident = ranks.exchange(
            lambda: (source.num_samples, source.batch_size, source.resident)
        )[0]
        self._index = -1

    def window(self, index: int) -> Window:
        if self._kept is not None and (self.resident or self._index == index):
            return self._kept
        self._kept = None  # two windows are never held at once
        read: list[Window] = []

        def digest() -> bytes:
            # read in here, so that a rank that fails to do so makes all of them fail
            read.append(self._source.window(index))
            return digest_of(read[0].batches)

        first = self._ranks.exchange(digest)[0]
        own = read[0]
        others = self._ranks.add(
            torch.tensor([float(digest_of(own.batches) != first)], dtype=torch.float64, device="cpu")
        )
        if float(others) > 0:
            device = device_of(own.batches[0])
            # a part of a larger tensor would be sent with all of it: each batch as a copy of its own
            sent, is_whole = self._ranks.exchange(
                lambda: ([clone(_moved(batch, "cpu")) for batch in own.batches], own.is_whole)
            )[0]
            own = Window([_moved(batch, device) for batch in sent], is_whole)
        self._index, self._kept = index, own
        return own

    def forget(self) -> None:
        self._source.forget()
        super().forget()


def digest_of(batches: list[Any]) -> bytes:
    """The same for the same tensors, and for the same other things as far as ``repr`` tells them apart."""
    told = hashlib.blake2b(digest_size=16)
    for leaf in tree_flatten(batches)[0]:
        if isinstance(leaf, Tensor):
            told.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            told.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            told.update(repr(leaf).encode())
    return told.digest()


def device_of(batch: Any) -> torch.device:
    """Of the first tensor in a batch."""
    return next((leaf.device for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)), torch.device("cpu"))


def _moved(batch: Any, device: Any) -> Any:
    return over_tensors(batch, lambda tensor: tensor.detach().to(device))
