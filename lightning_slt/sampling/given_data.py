"""What users hand over as data (a Dataset, a loader, batches), as a source of minibatches on a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import FrozenInstanceError
from functools import partial
from typing import Any, Optional

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_slt.sampling.arguments import without_fabric
from lightning_slt.sampling.batch_size import USUAL
from lightning_slt.sampling.batches import DatasetSource, IterableSource, MinibatchSource
from lightning_slt.sampling.counting import (
    batch_length,
    batch_size_of,
    length_of,
    looks_like_a_batch,
    makes_batches,
    samples_of_batches,
)

log = logging.getLogger(__name__)


def to_device(device: torch.device) -> Callable[[Any], Any]:
    """A transfer that moves the tensors of a batch (and what has a ``.to``) to ``device``."""

    return partial(_moved, device=device)


def _moved(batch: Any, device: torch.device) -> Any:
    """On the device.

    Raises:
        ValueError: for a frozen dataclass, whose fields Lightning would set.
    """
    try:
        batch = move_data_to_device(batch, device)
    except ValueError as error:
        if not isinstance(error.__cause__, FrozenInstanceError):
            raise
        raise ValueError(
            "data: its batches are frozen dataclasses or hold some, which Lightning cannot move to a device, here as "
            "in training. Take frozen=True away, or give the class a method to(device) that returns another one."
        ) from error
    # gradients cannot go through a tensor that was made in inference mode
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, batch)


def source_of(
    data: Any,
    batch_size: Optional[int],
    device: torch.device,
    seed: int,
    num_samples: Optional[int] = None,
    full_batch: bool = False,
) -> MinibatchSource:
    """The source for data handed to a one-call estimate: a Dataset, a DataLoader, or an iterable of batches.

    Raises:
        ValueError: for no data; TypeError: for something that is no data.
    """
    data = without_fabric(data)
    collate: Optional[Callable[[list[Any]], Any]] = None
    workers: Optional[int] = None
    move = to_device(device)
    indices: Optional[Sequence[int]] = None
    if isinstance(data, DataLoader):
        uniform, indices = uniform_samples(data)
        if not uniform:
            _refuse_full_batch(full_batch)
            source = IterableSource(data, num_samples or length_of(data), move)
            return _of_batches(source, length_of(data), num_samples) if makes_batches(data) else source
        collate, workers = data.collate_fn, data.num_workers or None
        batch_size = batch_size or batch_size_of(data)
        data = data.dataset
    # of a DataLoader's list the collate function says what a sample is
    listed = collate is None and isinstance(data, (list, tuple))
    if listed and num_samples is not None:
        _refuse_full_batch(full_batch)
        return IterableSource(data, num_samples, move)
    if isinstance(data, IterableDataset):
        _refuse_full_batch(full_batch)
        return IterableSource(DataLoader(data, batch_size=batch_size or USUAL), num_samples, move)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        if len(data) == 0:
            raise ValueError("data: the dataset is empty; chains need samples to compute a loss on.")
        if listed and looks_like_a_batch(data[0]):
            log.warning(
                f"data: a {type(data).__name__} is read as samples, n = {len(data)}; its first one looks like a batch. "
                "If they are batches, give num_samples."
            )
        if full_batch:
            batch_size = len(data)
        samples = DatasetSource(data, batch_size or USUAL, collate, indices, move, seed, workers)
        samples.size_is_open = batch_size is None
        samples.num_samples = num_samples or samples.num_samples
        return samples
    if isinstance(data, Iterable):
        _refuse_full_batch(full_batch)
        return IterableSource(data, num_samples, move)
    raise TypeError(f"data: expected a Dataset, a DataLoader or an iterable of batches, got {type(data).__name__}.")


def uniform_samples(loader: Any) -> tuple[bool, Optional[Sequence[int]]]:
    """Whether a loader's batches are uniform over its dataset or over some indices, so that they can be drawn anew.

    Returns:
        ``(False, None)`` for an iterable dataset, a dataset that makes the batches itself, a loader that iterates in a
        way of its own (it may change them), a batch sampler of another class than torch's own or a sampler that gives
        the order a meaning; else True and the indices (None for the whole dataset).
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False, None
    if _iterates_its_own_way(loader):
        return False, None
    batches: Any = loader.batch_sampler
    if _kind(batches) is not BatchSampler or not hasattr(loader.dataset, "__len__"):
        return False, None
    sampler: Any = batches.sampler  # a loader that is given a batch sampler has none of its own
    if isinstance(sampler, DistributedSamplerWrapper):
        sampler = getattr(sampler.dataset, "_sampler", None)  # what the user's own sampler was before DDP
    kind = _kind(sampler)
    if kind is SubsetRandomSampler:
        return True, list(sampler.indices)
    # exactly these: a class derived from one may do anything
    if kind not in (RandomSampler, SequentialSampler, DistributedSampler):
        return False, None
    over: Any = sampler.dataset if kind is DistributedSampler else sampler.data_source
    count = len(over)
    return True, None if count == len(loader.dataset) else range(count)


_OF_TORCHDATA = {
    "BatchSampler": BatchSampler,
    "RandomSampler": RandomSampler,
    "StatefulDistributedSampler": DistributedSampler,
}
"""Its samplers can be stopped and resumed, and give what these of torch give."""


def _kind(sampler: Any) -> type:
    """The class of a sampler; of one of torchdata's, which a StatefulDataLoader has, that of torch which it stands
    for."""
    kind = type(sampler)
    return _OF_TORCHDATA.get(kind.__name__, kind) if kind.__module__.partition(".")[0] == "torchdata" else kind


def _iterates_its_own_way(loader: DataLoader[Any]) -> bool:
    kinds = type(loader).__mro__
    makers = [next(kind for kind in kinds if name in vars(kind)) for name in ("__iter__", "_get_iterator")]
    # that of torchdata can be stopped and resumed, and gives what torch's gives
    return any(maker.__module__.partition(".")[0] not in ("torch", "torchdata") for maker in makers)


def _of_batches(source: IterableSource, count: Optional[int], num_samples: Optional[int]) -> IterableSource:
    """The source of a dataset that makes its batches itself, ``count`` of them, with n and the batch size by those
    that the first window holds."""
    first = source.window(0).batches[:count]
    source.batch_size = batch_length(first[0]) or source.batch_size
    source.num_samples = num_samples or (samples_of_batches(count, first) if count is not None else None)
    return source


def _refuse_full_batch(full_batch: bool) -> None:
    if full_batch:
        raise ValueError("full_batch=True needs a map-style Dataset, or a DataLoader that is uniform over one.")


__all__ = ["source_of", "to_device", "uniform_samples"]
