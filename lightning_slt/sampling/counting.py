"""How many samples there are in what a loader or a dataset gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, SubsetRandomSampler

from lightning_slt.sampling.structures import tensors_in

TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""What a tokeniser gives of a text, one number a token: of a batch of texts these have two dimensions. ``labels`` are
not among them: of a batch of pictures they have one dimension too."""


def batch_size_of(loader: Any) -> Optional[int]:
    """Samples in a batch, as the loader or its batch sampler says; None where neither does."""
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def makes_batches(loader: Any) -> bool:
    """Whether the loader hands on what the dataset gives, batches or single samples: ``batch_size=None``."""
    return isinstance(loader, DataLoader) and loader.batch_sampler is None


def length_of(loader: Any) -> Optional[int]:
    """What a loader's dataset holds, of which it may use a subset: samples, or batches where the dataset makes them.

    None where that is not known.
    """
    sampler = getattr(loader, "sampler", None)
    if type(sampler) is SubsetRandomSampler:
        return len(sampler.indices)
    try:
        return len(loader.dataset)
    except (TypeError, NotImplementedError, AttributeError):
        return None


def samples_of_batches(count: int, batches: Sequence[Any]) -> Optional[int]:
    """n of a dataset of ``count`` batches, by the mean over those that have been read; None where it cannot be told."""
    lengths = [length for length in map(batch_length, batches) if length is not None]
    if not batches or len(lengths) < len(batches):
        return None
    return round(count * sum(lengths) / len(lengths))


def batch_length(item: Any) -> Optional[int]:
    """Samples in what a dataset gives that may be a batch or a single sample; None where it cannot be told."""
    if looks_like_a_batch(item):
        return next(len(x) for x in tree_flatten(item)[0] if isinstance(x, Tensor))
    leaves = tree_flatten(item)[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    lengths = [len(x) for x in tensors if x.ndim > 0]
    of_batch = len(lengths) > 1 and len(set(lengths)) == 1
    # a number, such as a class, beside tensors of no common length is that of one sample
    number = len(lengths) < len(tensors) or any(isinstance(leaf, (bool, int, float)) for leaf in leaves)
    return 1 if _is_one_text(item) or set(lengths) == {1} or (number and not of_batch) else None


def looks_like_a_batch(item: Any) -> bool:
    if _is_one_text(item):
        return False
    tensors = [x for x in tree_flatten(item)[0] if isinstance(x, Tensor)]
    return len(tensors) > 1 and all(x.ndim > 0 and len(x) == len(tensors[0]) > 1 for x in tensors)


def _is_one_text(item: Any) -> bool:
    """Whether this is one tokenised text: whole numbers in one dimension under a name of :data:`TOKEN_KEYS`."""
    found = [item[key] for key in TOKEN_KEYS if key in item] if isinstance(item, Mapping) else []
    return any(isinstance(x, Tensor) and x.ndim == 1 and not x.is_floating_point() for x in found)


def common_length(batch: Any) -> Optional[int]:
    """Samples in a batch whose tensors all have them in front; None for another one."""
    tensors = tensors_in(batch)
    lengths = {tensor.size(0) if tensor.ndim > 0 else None for tensor in tensors}  # a nested one has no shape
    return lengths.pop() if len(lengths) == 1 and not _is_one_text(batch) else None
