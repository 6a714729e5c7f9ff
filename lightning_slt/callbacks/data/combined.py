"""Several training loaders side by side, as Lightning's CombinedLoader has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

from lightning.pytorch import Trainer
from torch.utils._pytree import tree_unflatten
from torch.utils.data import DataLoader

from lightning_slt.sampling.batches import MAX_RESIDENT_BATCHES, MAX_RESIDENT_BYTES, DatasetSource, MinibatchSource
from lightning_slt.sampling.structures import num_bytes
from lightning_slt.sampling.window import Window

Transfer = Callable[[Any], Any]
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it lie evenly between whole numbers, however many there are."""


class Combined(MinibatchSource):
    """Several loaders side by side, the structure of the batch kept (a dict of loaders gives a dict of batches)."""

    def __init__(
        self,
        parts: list[DatasetSource],
        spec: Any,
        num_samples: Optional[int],
        shortest: bool,
        transfer: Transfer,
        ends: Optional[tuple[int, ...]] = None,
    ) -> None:
        self._parts, self._spec, self._shortest, self._transfer, self._ends = parts, spec, shortest, transfer, ends
        self.num_samples = num_samples
        self.batch_size = sum(part.batch_size for part in parts)
        self.resident = all(part.resident for part in parts)
        self._index = -1

    def window(self, index: int) -> Window:
        if self._kept is not None and (self.resident or self._index == index):
            return self._kept
        self._kept = None
        windows = [part.window(index) for part in self._parts]
        rows: list[list[Any]]
        if self._ends is None:
            count = (min if self._shortest else max)(len(w) for w in windows)
            rows = [[w[i % len(w)] for w in windows] for i in range(count)]
        else:
            rows = self._until_they_end(windows, self._ends, index)
        self._index = index
        self._kept = Window([self._transfer(tree_unflatten(row, self._spec)) for row in rows])
        return self._kept

    def _until_they_end(self, windows: list[Window], ends: tuple[int, ...], index: int) -> list[list[Any]]:
        """Rows of batches as an epoch has them: None for a loader that has ended by then.

        A window that holds no whole epochs has its rows from evenly spaced places of one, other places in each window.
        """
        if self.resident:
            index = 0  # whichever is asked for first, it is the only one
        epoch = max(ends)
        # a loader that is held as a whole does not make a window longer: it is gone on with from window to window
        count = max(len(w) for w, part in zip(windows, self._parts, strict=True) if part.resident == self.resident)
        most = min(MAX_RESIDENT_BATCHES, MAX_RESIDENT_BYTES // max(1, sum(num_bytes(w[0]) for w in windows)))
        if self.resident and epoch <= most:
            # whole epochs, so many that every batch of every loader is used
            needed = max(-(-len(w) // end) for w, end in zip(windows, ends, strict=True))
            count = epoch * min(needed, most // epoch)
        offset = (0.5 + index * GOLDEN) % 1
        taken = [int(index * count * end / epoch) for end in ends]
        rows = []
        for i in range(count):
            place = min(int((i + offset) * epoch / count), epoch - 1)  # from the first to the last of one epoch
            row = [w[(k + i) % len(w)] if place < end else None for w, k, end in zip(windows, taken, ends, strict=True)]
            rows.append(row)
        return rows


def batches_of_epoch(loaders: Sequence[DataLoader[Any]], trainer: Trainer) -> Optional[tuple[int, ...]]:
    """Batches that training has of each loader in an epoch; None where all of them last until its end."""
    lengths = [len(loader) for loader in loaders]
    batches = trainer.num_training_batches
    # fast_dev_run cuts the run short, which says nothing of the data
    if batches != float("inf") and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        lengths = [min(length, int(batches)) for length in lengths]
    return tuple(lengths) if 0 < min(lengths) < max(lengths) else None
