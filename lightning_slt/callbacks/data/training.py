"""Minibatches for chains inside a trainer: from the training data, but never from the iterator that training reads.

A plain training loader is rebuilt: its dataset and collate function, an order of our own. Iterating the loader itself
would reset persistent workers, and training would lose steps. Where the order carries meaning (a custom sampler or
batch sampler) or cannot be had twice (an iterable dataset), batches that training has seen are cloned and replayed.
"""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_slt.callbacks.data.combined import Combined, Transfer, batches_of_epoch
from lightning_slt.callbacks.data.hooks import DataHooks
from lightning_slt.callbacks.data.marks import marks_of, same_marks
from lightning_slt.sampling.batches import (
    LEAST_WINDOW,
    MAX_RESIDENT_BATCHES,
    MAX_RESIDENT_BYTES,
    DatasetSource,
    MinibatchSource,
    ReplaySource,
)
from lightning_slt.sampling.counting import batch_length, batch_size_of, length_of, makes_batches, samples_of_batches
from lightning_slt.sampling.given_data import uniform_samples
from lightning_slt.sampling.rng import derive_seed
from lightning_slt.sampling.structures import clone, num_bytes, tensors_in_collections, told_of
from lightning_slt.warned import speaker, warn

REPLAYED_BATCHES = MAX_RESIDENT_BATCHES


@dataclass(frozen=True)
class _Leaf:
    """One loader that can be rebuilt."""

    loader: DataLoader[Any]
    indices: Optional[Sequence[int]]

    @property
    def num_samples(self) -> int:
        return len(self.indices) if self.indices is not None else len(self.loader.dataset)  # type: ignore[arg-type]


class TrainingData:
    """What the trainer's loaders are, looked at once before training.

    Args:
        trainer: with its training loaders set up.
        batch_size: of the chains' minibatches; None for the loader's own.
        num_samples: n; None to take it from the data.
        seed: order of the chains' data.
        prefix: of the monitor, for what is said.

    Attributes:
        num_samples: n, or None where it is not known.
        replays: batches that training sees must be handed to :meth:`see`.
        counts_batches: n is not known before batches have been seen: a dataset makes them, and has so many of them.
        indexed: samples can be asked for by number: there is one loader, which can be rebuilt.
    """

    def __init__(
        self,
        trainer: Trainer,
        batch_size: Optional[int],
        num_samples: Optional[int],
        seed: int,
        prefix: str = "slt",
    ) -> None:
        self._seed, self._prefix = seed, prefix
        self._batch_size = batch_size
        # weakly: the workers of loaders that are given up must not wait for this object
        self._loaded = weakref.ref(trainer.fit_loop._combined_loader)
        self._given = num_samples is not None
        loaders = trainer.train_dataloader
        flat, self._spec = tree_flatten(loaders, is_leaf=lambda x: isinstance(x, DataLoader))
        combined = trainer.fit_loop._combined_loader
        self._shortest = combined is not None and combined._mode == "min_size"
        leaves = [_rebuildable(loader, trainer) for loader in flat]
        self._leaves = [leaf for leaf in leaves if leaf is not None]
        self.replays = not flat or len(self._leaves) < len(flat)
        self.indexed = not self.replays and isinstance(loaders, DataLoader)
        ending = combined is not None and combined._mode == "max_size" and not self.replays
        self._ends = batches_of_epoch(flat, trainer) if ending else None
        self._sizes = [leaf.num_samples if leaf else length_of(x) for x, leaf in zip(flat, leaves, strict=True)]
        self._makes_batches = [makes_batches(loader) for loader in flat]
        if num_samples is None and flat:
            num_samples = self._of_all(self._sizes)
        self.counts_batches = not self._given and num_samples is not None and any(self._makes_batches)
        self.num_samples = None if self.counts_batches else num_samples
        self._told_size = batch_size_of(flat[0]) if len(flat) == 1 else None
        self._seen: list[Any] = []
        self._seen_bytes = 0
        self._count = 0
        # a rank may have a part of an iterable dataset, which the dataset itself has cut
        self._may_be_a_part = num_samples is not None and not self._given and any(map(_is_iterable, flat))
        self._told: Optional[float] = None
        self._told_of_growth = False
        self._order = random.Random(derive_seed(seed, 1))
        self._marks = [marks_of(leaf.loader.dataset) for leaf in self._leaves]

    def is_of(self, trainer: Trainer) -> bool:
        """Whether the trainer still has these loaders: ``reload_dataloaders_every_n_epochs`` gives it others."""
        return self._loaded() is trainer.fit_loop._combined_loader

    def keep_marks_of(self, other: TrainingData) -> None:
        """Stay with what the data was when the chains' minibatches were read."""
        self._marks = other._marks

    def is_changed(self) -> bool:
        """Whether the data has been changed in place, where its batches are not replayed."""
        return not self.replays and not all(
            same_marks(marks, marks_of(leaf.loader.dataset))
            for leaf, marks in zip(self._leaves, self._marks, strict=True)
        )

    def follow(self, trainer: Trainer) -> None:
        """Be of the trainer's loaders as they are now."""
        self._loaded = weakref.ref(trainer.fit_loop._combined_loader)

    def has_the_samples_of(self, other: TrainingData) -> bool:
        """Whether the chains' minibatches are those that the other's would be."""
        if self.replays or other.replays or self._spec != other._spec or self.num_samples != other.num_samples:
            return False
        if self._ends != other._ends:
            return False
        return all(
            ours.loader.dataset is theirs.loader.dataset
            and ours.num_samples == theirs.num_samples
            and ours.indices == theirs.indices
            and batch_size_of(ours.loader) == batch_size_of(theirs.loader)
            for ours, theirs in zip(self._leaves, other._leaves, strict=True)
        )

    def see(self, batch: Any) -> None:
        """Clone a batch that training is about to use (on its device, hooks applied): a sample of all seen."""
        self._count += 1
        if self._may_be_a_part:
            told, self._may_be_a_part = told_of(batch), False
            self._told = None if math.isnan(told) else told
        if self._seen and len(self._seen) >= min(
            REPLAYED_BATCHES, max(LEAST_WINDOW, MAX_RESIDENT_BYTES // max(1, self._seen_bytes // len(self._seen)))
        ):
            place = self._order.randrange(self._count)
            if place < len(self._seen):
                self._seen[place] = clone(batch)
            return
        self._seen.append(clone(batch))
        self._seen_bytes += num_bytes(batch)

    def source(self, transfer: Transfer) -> MinibatchSource:
        """The chains' minibatches.

        Args:
            transfer: what the trainer does to a collated batch before its step.

        Raises:
            ValueError: where there is no data (yet).
        """
        if not self.replays:
            return self.plan().build(transfer)
        source = self.seen().build()
        source.given, self._told = self._told, None  # ranks compare it once
        return source

    def seen(self) -> SeenBatches:
        """The batches that there are to be replayed now."""
        sizes = [self._samples_in(batch) for batch in self._seen]
        n = self._counted() if self.counts_batches else self.num_samples
        # weights are no minimum of a few samples: nbeta must be that of the samples that are held, not of all
        if sizes and n is not None and not self._given and sum(sizes) < n:
            self._tell_of_growth(sum(sizes), n)
            n = sum(sizes)
        return SeenBatches(list(self._seen), n, sizes[0] if sizes else 1)

    def _samples_in(self, batch: Any) -> int:
        own = batch_length(batch) if self._makes_batches == [True] else None
        return own if own is not None else _samples(batch, self._told_size)

    def _counted(self) -> Optional[int]:
        """n by the batches that have been seen; None where they do not tell it."""
        try:
            parts = [self._spec.flatten_up_to(batch) for batch in self._seen]
        except ValueError:  # a hook has changed how the batches of several loaders are put together
            return None
        return self._of_all(
            [
                samples_of_batches(size, [part[k] for part in parts if part[k] is not None])
                if size is not None and self._makes_batches[k]
                else size
                for k, size in enumerate(self._sizes)
            ]
        )

    def _of_all(self, sizes: Sequence[Optional[int]]) -> Optional[int]:
        """n by that of each loader; None where one of them is not known."""
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            return None
        return min(known) if self._shortest else max(known)

    def _tell_of_growth(self, n: int, total: int) -> None:
        if not self._told_of_growth:
            self._told_of_growth = True
            warn(
                f"{speaker(self._prefix, 'num_samples=None')}: batches that training has seen are replayed, so n = {n} "
                f"of {total} is the number of samples seen so far. It grows along the curve, and nbeta with it unless "
                "that is given. Give num_samples= to hold n fixed."
            )

    def plan(self) -> SourcePlan:
        """How the data is read where it is not replayed."""
        parts = tuple(
            LoaderPart(
                leaf.loader.dataset,
                self._batch_size or batch_size_of(leaf.loader) or 1,
                leaf.loader.collate_fn,
                leaf.indices,
                derive_seed(self._seed, number),
                leaf.loader.num_workers if leaf.loader.num_workers > 1 else None,
                MAX_RESIDENT_BYTES // len(self._leaves),
                leaf.loader.worker_init_fn,
            )
            for number, leaf in enumerate(self._leaves)
        )
        return SourcePlan(parts, None if self.indexed else self._spec, self.num_samples, self._shortest, self._ends)


@dataclass(frozen=True)
class SeenBatches:
    """Batches that training has seen, on its device; n and the batch size that go with them."""

    batches: list[Any]
    num_samples: Optional[int]
    batch_size: int

    def build(self) -> MinibatchSource:
        """The source that replays them.

        Raises:
            ValueError: where there are none yet.
        """
        return ReplaySource(self.batches, self.num_samples, self.batch_size)


@dataclass(frozen=True)
class LoaderPart:
    """What of one loader its batches depend on; the names are those of
    :class:`~lightning_slt.sampling.batches.DatasetSource`."""

    dataset: Any
    batch_size: int
    collate_fn: Optional[Callable[[list[Any]], Any]]
    indices: Optional[Sequence[int]]
    seed: int
    num_workers: Optional[int]
    max_bytes: int
    worker_init_fn: Optional[Callable[[int], None]]


@dataclass(frozen=True)
class SourcePlan:
    """How the chains' minibatches are read, as data: another process reads the same ones by it.

    Attributes:
        parts: the loaders.
        spec: how their batches are put together; None for a single loader.
        num_samples: n.
        shortest: the shortest loader ends the epoch.
        ends: batches of each loader in an epoch, after which it gives None; None where no loader ends before the epoch.
    """

    parts: tuple[LoaderPart, ...]
    spec: Any
    num_samples: Optional[int]
    shortest: bool
    ends: Optional[tuple[int, ...]] = None

    def build(self, transfer: Transfer) -> MinibatchSource:
        """The source.

        Args:
            transfer: what the trainer does to a collated batch before its step.

        Raises:
            ValueError: for an empty dataset.
        """
        single = self.spec is None
        sources = [
            DatasetSource(
                part.dataset,
                part.batch_size,
                part.collate_fn,
                part.indices,
                transfer if single else _unchanged,
                part.seed,
                part.num_workers,
                part.max_bytes,
                part.worker_init_fn,
            )
            for part in self.parts
        ]
        if single:
            sources[0].num_samples = self.num_samples
            return sources[0]
        return Combined(sources, self.spec, self.num_samples, self.shortest, transfer, self.ends)


def _rebuildable(loader: Any, trainer: Trainer) -> Optional[_Leaf]:
    """The loader as a leaf, or None where its batches must be replayed."""
    uniform, indices = uniform_samples(loader)
    if not uniform:
        return None
    if indices is not None:
        return _Leaf(loader, indices)
    sampler = loader.batch_sampler.sampler
    distributed = isinstance(sampler, DistributedSampler)
    in_order = isinstance(sampler, SequentialSampler) or (distributed and not sampler.shuffle)
    total = len(loader.dataset)
    batches = trainer.num_training_batches
    # fast_dev_run cuts the run short, which says nothing of the data
    if in_order and batches != float("inf") and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        # overfit_batches and limit_train_batches without shuffling: only the front of the data is ever trained on
        across = (batch_size_of(loader) or 1) * (sampler.num_replicas if distributed else 1)
        used = int(batches) * across
        if used < total - across or (trainer.overfit_batches and used < total):  # type: ignore[attr-defined]
            return _Leaf(loader, range(used))
    return _Leaf(loader, None)


def _samples(batch: Any, told: Optional[int]) -> int:
    """Samples in a batch: the length of its tensors, or what the loader says of its batches (``told``) where there are
    none to be seen (in an object of a class of the user's) or they are of many lengths (a list of sequences)."""
    sizes = [len(tensor) if tensor.ndim else 1 for tensor in tensors_in_collections(batch)]
    if not sizes:
        return told or 1
    ragged = isinstance(batch, list) and all(isinstance(item, Tensor) for item in batch) and len(set(sizes)) > 1
    if told is not None and (told in sizes or ragged):
        return told
    return sizes[0]


def _is_iterable(loader: Any) -> bool:
    return isinstance(getattr(loader, "dataset", None), IterableDataset)


def _unchanged(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class BatchTransfer:
    """What the trainer does between collating a batch and its step, each once, with the hooks of the private copy.

    Attributes:
        plugin: the precision plugin.
        datamodule: whose hooks go before the module's where it has them; None for none.
        module: the private copy.
        device: where the batch goes.
    """

    plugin: Any
    datamodule: Any
    module: LightningModule
    device: torch.device

    def __call__(self, batch: Any) -> Any:
        batch = self.plugin.convert_input(batch)
        batch = self._hook("on_before_batch_transfer")(batch, 0)
        batch = self._hook("transfer_batch_to_device")(batch, self.device, 0)
        return self._hook("on_after_batch_transfer")(batch, 0)

    def _hook(self, name: str) -> Callable[..., Any]:
        owner = self.datamodule if self.datamodule is not None and is_overridden(name, self.datamodule) else self.module
        hook: Callable[..., Any] = getattr(owner, name)
        return hook


def training_transfer(trainer: Trainer, module: LightningModule, hooks: Optional[DataHooks] = None) -> Transfer:
    """The transfer of a live trainer, for one batch.

    Args:
        trainer: gives the precision plugin, the device, and the DataModule whose hooks go before the module's.
        module: the private copy.
        hooks: those of that DataModule, where they have been made for a firing.
    """
    datamodule = (hooks or DataHooks(datamodule_of(trainer))).for_a_batch()
    return BatchTransfer(trainer.precision_plugin, datamodule, module, trainer.strategy.root_device)


def datamodule_of(trainer: Trainer) -> Any:
    """The DataModule of this fit; ``trainer.datamodule`` may still be that of an earlier one, whose hooks are not
    called any more."""
    selector = getattr(getattr(trainer, "_data_connector", None), "_datahook_selector", None)
    return selector.datamodule if selector is not None else getattr(trainer, "datamodule", None)


def check_num_samples(num_samples: Optional[int], nbeta: Optional[float], who: str) -> None:
    """Refuse, before training, data from which nbeta cannot be derived.

    Raises:
        MisconfigurationException: naming ``num_samples`` and ``nbeta``.
    """
    if nbeta is not None:
        return
    if num_samples is None:
        raise MisconfigurationException(
            f"{who}: the training data has no length (an IterableDataset without __len__?), or does not show how "
            "many samples a batch has (batch_size=None), so n is not known and nbeta = n / log n cannot be derived. "
            "Give num_samples= or nbeta=."
        )
    if num_samples < 2:
        raise MisconfigurationException(
            f"{who}: the training data has num_samples={num_samples}; nbeta = n / log n needs at least 2. "
            "Give more data, or set nbeta=."
        )
