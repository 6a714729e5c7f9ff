"""Minibatches for chains, from a source of their own: never the iterator that training reads.

A source hands out *windows*: lists of minibatches on the chains' device. A small data set is one window that holds
every batch (it is *resident*); a large one is read in windows of bounded size, so that it is never held as a whole.
From a window that holds all the data every chain draws batches with replacement, from one that passes by each batch
once, in an order of its own: the batch is then independent of the chain's weights, and ``L_B(w) - L_B(w*)`` unbiased.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import (
    Dataset,
    default_collate,
)

from lightning_slt.sampling.reading import Reader
from lightning_slt.sampling.rng import LOADER, generator
from lightning_slt.sampling.structures import num_bytes, told_of
from lightning_slt.sampling.window import Window

log = logging.getLogger(__name__)

MAX_RESIDENT_BYTES = 256 * 2**20
LEAST_WINDOW = 2
"""Batches of a window however large they are: of a single one all chains would see the same at each step, and nothing
would tell its noise."""
MAX_RESIDENT_BATCHES = 1024
WINDOW_BATCHES = 128
MOST_SHUFFLED = 2**24
"""Of more samples than these no shuffled order is made: of a thousand million it would take 8 GB."""
REPEATED = 100
"""Samples for each one of a batch, beyond which it is drawn with replacement: one in 200 is in a batch twice then."""
MAX_UNEVEN = 0.002
"""Share of the data that may be left out in any case where the batch size does not divide n."""
MAX_SHIFT = 0.0015
"""More may be left out of many samples: what moves the mean over them by less than this many standard deviations of a
single one. The loss difference of a sample scatters by a few times its mean, and the LLC is known to some per cent."""
SAME_SAMPLES = 1e-9
"""Part of what is told of the samples of a pass by which that of another one with the same may differ in rounding."""


class MinibatchSource:
    """What chains need to know of data.

    Attributes:
        shared: every rank has the same windows.
        num_samples: n, or None where it cannot be known.
        batch_size: samples in a minibatch.
        resident: every window is the same one.
        coupled: the loss depends on which samples are together in a batch; None where that has not been asked.
        given: what tells the batches that this rank is given from those of others; None where there is nothing to tell.
    """

    num_samples: Optional[int]
    batch_size: int
    resident: bool
    shared: bool = True
    coupled: Optional[bool] = None
    given: Optional[float] = None
    _kept: Optional[Window] = None

    def window(self, index: int) -> Window:
        """The ``index``-th window; the same for the same seed, on every rank."""
        raise NotImplementedError

    @property
    def can_pass(self) -> bool:
        """Whether its batches come back, and need not."""
        return False

    def let_pass(self) -> None:
        """Have no batch come back, where that can be."""

    def forget(self) -> None:
        """The weights under study have changed: what is known of the losses at ``w*`` no longer holds."""
        if self._kept is not None:
            self._kept.forget()


def _itself(sample: Any) -> Any:
    return sample


def _of_one(function: Callable[[Any], Any], samples: list[Any]) -> Any:
    return function(samples[0])


class DatasetSource(MinibatchSource):
    """Minibatches of a map-style dataset, uniform over its samples.

    Args:
        dataset: map style, with ``__len__`` and ``__getitem__``.
        batch_size: samples in a minibatch; more than there are samples means all of them.
        collate_fn: as in a DataLoader.
        indices: the samples to use (None for all).
        transfer: applied to each collated batch (to the device, user's hooks).
        seed: order of the samples.
        num_workers: processes that read the data, see :class:`~lightning_slt.sampling.reading.Reader`.
        max_bytes: how much of the data may be held at once, beyond :data:`LEAST_WINDOW`.
        worker_init_fn: as in a DataLoader, for those processes.

    Attributes:
        size_is_open: nobody has said how many samples a minibatch has.

    Raises:
        ValueError: for an empty dataset or a batch size below 1.
    """

    size_is_open = False

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        collate_fn: Optional[Callable[[list[Any]], Any]] = None,
        indices: Optional[Sequence[int]] = None,
        transfer: Callable[[Any], Any] = lambda batch: batch,
        seed: int = 0,
        num_workers: Optional[int] = None,
        max_bytes: int = MAX_RESIDENT_BYTES,
        worker_init_fn: Optional[Callable[[int], None]] = None,
    ) -> None:
        self.dataset = dataset
        self._reader = Reader(dataset, seed, num_workers, worker_init_fn)
        self.indices = indices
        n = len(indices) if indices is not None else len(dataset)  # type: ignore[arg-type]
        if n == 0:
            raise ValueError("data: the dataset is empty; chains need samples to compute a loss on.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1.")
        self.num_samples, self._count = n, n
        self.batch_size = min(batch_size, n)
        self._collate = collate_fn or default_collate
        self._transfer = transfer
        self._seed = seed
        self._max_bytes = max_bytes
        self._plan()

    def _plan(self) -> None:
        """What of the data is held at once, with minibatches of this size."""
        n, self._next_window, self._kept = self._count, 0, None
        first = self._read(self._stream(0, 1))[0]
        self._affordable = max(LEAST_WINDOW, self._max_bytes // max(num_bytes(first), 1))
        total = n * _epochs_for_even_use(n, self.batch_size) // self.batch_size
        self.resident = total <= min(self._affordable, MAX_RESIDENT_BATCHES)
        self._window_batches = total if self.resident else min(self._affordable, WINDOW_BATCHES)

    @property
    def num_indexed(self) -> int:
        """Samples that can be asked for by number; ``num_samples`` may say otherwise of how many the loss is a mean."""
        return self._count

    def resize(self, batch_size: int) -> None:
        """Give minibatches this many samples, or all there are, from the first window on."""
        self.batch_size = min(batch_size, self._count)
        self._plan()

    def with_batches(self, batch_size: int, transfer: Callable[[Any], Any], seed: int) -> DatasetSource:
        """The same samples in minibatches of another size."""
        other = DatasetSource(self.dataset, batch_size, self._collate, self.indices, transfer, seed)
        other.num_samples, other.coupled = self.num_samples, self.coupled
        if other.coupled:
            other.let_pass()
        return other

    def _pool(self, count: int) -> list[list[int]]:
        """The first so many batches of shuffled epochs, which are held for good."""
        n, b = self._count, self.batch_size
        if n > MOST_SHUFFLED and b < n:  # all of it at once is every sample once
            return self._stream(0, count)
        epochs = range((count * b - 1) // n + 1)
        stream = torch.cat([_epoch_order(n, self._seed, e) for e in epochs])[: count * b]
        return self._of_dataset(stream.view(count, b))

    def _stream(self, start: int, count: int) -> list[list[int]]:
        """Batches ``start .. start + count`` of an endless stream, each by itself a draw from all the data.

        Not the batches of shuffled epochs: a chain meets each after others of the epoch, which together pull away from
        it. Its losses are too high for that, by about as much as the minibatches heat it.
        """
        n, b = self._count, self.batch_size
        stream = generator(self._seed, LOADER, start)
        if b * REPEATED < n:  # hardly any sample comes twice in a batch
            return self._of_dataset(torch.randint(n, (count, b), generator=stream, device="cpu"))
        return self._of_dataset(
            torch.stack([torch.randperm(n, generator=stream, device="cpu")[:b] for _ in range(count)])
        )

    def _of_dataset(self, numbers: Tensor) -> list[list[int]]:
        out: list[list[int]] = numbers.tolist()
        return out if self.indices is None else [[self.indices[j] for j in row] for row in out]

    def window(self, index: int) -> Window:
        if self._kept is not None and (self.resident or self._next_window == index):
            return self._kept
        self._kept = None  # two windows are never held at once
        count = self._window_batches
        window = Window(self._read(self._pool(count) if self.resident else self._stream(index * count, count)))
        self._kept, self._next_window = window, index
        return window

    @property
    def can_pass(self) -> bool:
        return self.resident and self.batch_size < self._count  # not all the data in one batch

    def let_pass(self) -> None:
        if self.can_pass:
            self.resident, self._kept = False, None
            self._window_batches = min(self._affordable, WINDOW_BATCHES)

    def read_samples(self, numbers: Sequence[int]) -> list[Any]:
        """A batch of each sample alone; ``numbers`` are those of the dataset itself."""
        return self._read([[int(i)] for i in numbers]) if len(numbers) else []

    def read_items(self, numbers: Sequence[int], function: Callable[[Any], Any] = _itself) -> list[Any]:
        """``function`` of each sample as the dataset gives it, neither collated nor moved.

        Read as minibatches are: where reading moves the dataset on, in another process, which runs ``function`` too.
        """
        return self._reader([[int(i)] for i in numbers], partial(_of_one, function)) if len(numbers) else []

    def _read(self, batches: list[list[int]]) -> list[Any]:
        return [self._transfer(batch) for batch in self._reader(batches, self._collate)]


class ReplaySource(MinibatchSource):
    """Batches that were seen elsewhere (the trainer's own, cloned), or that an iterable gives."""

    resident = True
    shared = False

    def __init__(self, batches: Sequence[Any], num_samples: Optional[int], batch_size: int) -> None:
        if not batches:
            raise ValueError("data: no batch has been seen yet; chains need batches to compute a loss on.")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self._kept = Window(batches)

    def window(self, index: int) -> Window:
        assert self._kept is not None
        return self._kept


class IterableSource(MinibatchSource):
    """Windows read one after another from an iterable of batches, which is started again at its end.

    Its batches may come in an order (one class after the other), and chains would run after the part that passes by:
    a window has whole passes through the iterable, as far as so many batches may be held. A pass of less than half of n
    samples is a part of the data, unless the next one has the same samples.
    """

    resident = False

    def __init__(
        self,
        batches: Iterable[Any],
        num_samples: Optional[int],
        transfer: Callable[[Any], Any] = lambda batch: batch,
        max_bytes: int = MAX_RESIDENT_BYTES,
    ) -> None:
        self._iterable = batches
        self._iterator = iter(batches)
        self._transfer = transfer
        self.num_samples = num_samples
        first = list(itertools.islice(self._iterator, 1))
        if not first:
            raise ValueError("data: the iterable gave no batch; chains need batches to compute a loss on.")
        self._pending = [transfer(first[0])]
        self.batch_size = _rows(self._pending[0])
        affordable = max(LEAST_WINDOW, max_bytes // max(1, num_bytes(self._pending[0])))
        self._least, self._most = min(affordable, WINDOW_BATCHES), min(affordable, MAX_RESIDENT_BATCHES)
        self._index = -1
        self._at_start = True
        self._told = float("nan")

    def window(self, index: int) -> Window:
        if self._kept is not None and index == self._index:
            return self._kept
        self._kept = None  # two windows are never held at once
        batches, self._pending = self._pending, []
        restarts, from_start = 0, self._at_start
        while len(batches) < self._least and restarts < 2:
            batches += [self._transfer(b) for b in itertools.islice(self._iterator, self._most - len(batches))]
            self._at_start = len(batches) < self._most
            if self._at_start:
                self._iterator = iter(self._iterable)
                restarts += 1
        if not batches:
            raise ValueError(
                "data: the iterable has run dry and cannot be started again. Give a Dataset or a DataLoader."
            )
        is_whole = from_start and self._at_start and self._are_all(batches, restarts)
        self._index, self._kept = index, Window(batches, is_whole)
        return self._kept

    def _are_all(self, batches: list[Any], passes: int) -> bool:
        """Whether so many passes have all the data: batches of a part of it are not to come back."""
        if isinstance(self._iterable, (list, tuple)) or self.num_samples is None:
            return True
        if 2 * sum(map(_rows, batches)) >= passes * self.num_samples:
            return True
        before, self._told = self._told, sum(map(told_of, batches)) / passes
        return abs(self._told - before) <= SAME_SAMPLES * abs(before)


def _rows(batch: Any) -> int:
    leaves = [x for x in tree_flatten(batch)[0] if isinstance(x, Tensor) and x.ndim > 0]
    return len(leaves[0]) if leaves else 1


def _epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, LOADER, epoch), device="cpu")


def _epochs_for_even_use(n: int, batch_size: int) -> int:
    """How many shuffled epochs to cut into batches, so that what is left over at the end is negligible.

    Leaving a share f of n samples out at random moves the mean over them by ``sqrt(f / n)`` standard deviations of a
    sample: of many samples one epoch is enough, and few batches are worth having. The loss of each at ``w*`` is
    computed, and all of them are held.
    """

    def left_over(epochs: int) -> float:
        return (n * epochs) % batch_size / (n * epochs)

    if left_over(1) <= n * MAX_SHIFT**2:
        return 1
    return next((e for e in range(1, 129) if left_over(e) <= MAX_UNEVEN), None) or min(range(1, 129), key=left_over)
