"""Single samples of a dataset: which of them, read once and kept, those of one shape stacked, the group each is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from lightning_slt.sampling.arguments import check_data, without_fabric
from lightning_slt.sampling.batches import MOST_SHUFFLED, DatasetSource
from lightning_slt.sampling.counting import batch_size_of
from lightning_slt.sampling.given_data import source_of
from lightning_slt.sampling.rng import CHOICE, generator

MAX_SAMPLES = 1000
"""Of the training set that are looked at where nothing else is said."""
MAX_CHUNK = 1024
ALL_AT_ONCE = 2048
"""Data sets up to this size are seen whole at every step by chains with momenta."""
LARGE_BATCH = 512
"""Minibatch of larger ones: momentum does not take the minibatches' heat off."""
CHECKED = 8
"""Samples that are read twice, to see whether the dataset gives the same ones again."""

GroupFn = Callable[[Any], Any]
"""The group of a sample, as the dataset gives it."""


def indexed_source(
    purpose: str,
    name: str,
    data: Any,
    batch_size: Optional[int],
    device: torch.device,
    seed: int,
    full_batch: Optional[bool] = None,
) -> DatasetSource:
    """The source of data whose samples can be asked for by number.

    Args:
        purpose: what they are asked for, as an error names it.
        name: of the argument that ``data`` is.
        batch_size: None for all the data up to 2,048 samples; of more, for that of the loader, 512 at the least.
        full_batch: every minibatch is all the data; None for where ``batch_size`` says so.

    Raises:
        ValueError: where they cannot be, or there are none.
        TypeError: for something that is no data.
    """
    no_index = (
        f"{name}: {purpose} needs samples that can be asked for by number. Give a map-style Dataset (with __len__ and "
        "__getitem__), or a DataLoader over one without a sampler or a batch sampler of its own."
    )
    data = without_fabric(data)
    check_data(name, data)
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(no_index)
    if len(dataset) == 0:
        raise ValueError(f"{name}: the dataset is empty.")
    if full_batch is None:
        full_batch = batch_size is None and len(dataset) <= ALL_AT_ONCE
    if batch_size is None:
        batch_size = max(batch_size_of(data) or 1, LARGE_BATCH)
    source = source_of(data, len(dataset) if full_batch else batch_size, device, seed)
    if not isinstance(source, DatasetSource):
        raise ValueError(no_index)
    return source


def choose_samples(n: int, limit: Optional[int], seed: int) -> list[int]:
    """Which samples of n: all up to ``limit``, else a random subset that depends on ``seed`` alone, in ascending order.

    Example:
        >>> choose_samples(5, 10, seed=0), choose_samples(1000, 4, seed=0) == choose_samples(1000, 4, seed=0)
        ([0, 1, 2, 3, 4], True)
    """
    if limit is None or n <= limit:
        return list(range(n))
    numbers = generator(seed, CHOICE)
    if n <= max(MOST_SHUFFLED, 2 * limit):
        return sorted(torch.randperm(n, generator=numbers, device="cpu")[:limit].tolist())
    chosen: dict[int, None] = {}  # in the order drawn: those that come first are a fair choice
    while len(chosen) < limit:
        chosen |= dict.fromkeys(torch.randint(n, (limit,), generator=numbers, device="cpu").tolist())
    return sorted(list(chosen)[:limit])


@dataclass
class Samples:
    """Samples of one dataset, read once and kept.

    Attributes:
        index: their numbers in the dataset.
        batches: a batch of each sample alone, as the step wants it.
        changed: those that were different when read a second time (random augmentation), of the few that were tried.
    """

    index: list[int]
    batches: list[Any]
    changed: list[int] = field(default_factory=list)

    @staticmethod
    def of(source: DatasetSource, numbers: Sequence[int]) -> Samples:
        """Read these samples (numbers within the source's ``indices``, where it has some).

        Raises:
            ValueError: for nested tensors, of which no sample can be put beside another.
        """
        index = [source.indices[i] for i in numbers] if source.indices is not None else list(numbers)
        batches = source.read_samples(index)
        if any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in tree_flatten(batches[:1])[0]):
            raise ValueError(
                "the batches hold nested tensors, which torch cannot stack or take apart by samples, so the losses of "
                "single samples cannot be had. Give samples whose collate function pads them (a tensor and its mask), "
                "or do without influence and susceptibility: probe=None."
            )
        # one more in front: a worker that starts from the same random state again gives each sample other numbers
        again = source.read_samples([*index[:1], *index[:CHECKED]])[1:]
        changed = [i for i, a, b in zip(index, batches, again, strict=False) if not _equal(a, b)]
        return Samples(index, batches, changed)


def _equal(a: Any, b: Any) -> bool:
    (one, spec), (two, other) = tree_flatten(a), tree_flatten(b)
    if spec != other:
        return False
    for x, y in zip(one, two, strict=True):
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.shape != y.shape or not torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)):
                return False
        elif type(x) is not type(y) or (isinstance(x, (str, int, float, bool)) and x != y):
            return False
    return True


@dataclass
class SampleGroup:
    """Samples whose batches have one structure and one set of shapes, stacked.

    Attributes:
        places: which of the samples they are.
        columns: leaves of the batch; tensors have the samples in front.
        spec: how the leaves make a batch.
        size: of the chunks that are computed at once.
        at: ``[len(places), tokens or 1]``, the columns of the result.
    """

    places: list[int]
    columns: list[Any]
    spec: Any
    size: int = MAX_CHUNK
    at: Tensor = field(default_factory=lambda: torch.empty(0, 1, dtype=torch.long, device="cpu"))

    def part(self, start: int, stop: int) -> tuple[Any, Any]:
        """The batches of one each, stacked, and the ``in_dims`` for vmap."""
        some = [c[start:stop] if isinstance(c, Tensor) else c for c in self.columns]
        return tree_unflatten(some, self.spec), self.dims

    def joined(self, rows: Union[slice, list[int]], time_first: bool = False) -> Any:
        """One batch of these samples: they take the place of the batch dimension of one.

        Args:
            rows: which samples.
            time_first: leaves ``[time, 1, ...]`` have that dimension second.
        """

        def join(column: Any) -> Any:
            if not isinstance(column, Tensor) or column.ndim < 2:
                return column
            some = column[rows]
            return some.transpose(0, 1).flatten(1, 2) if time_first and _is_time_first(column) else some.flatten(0, 1)

        return tree_unflatten([join(c) for c in self.columns], self.spec)

    @property
    def may_be_time_first(self) -> bool:
        """There are leaves whose batch dimension could be the second one."""
        return any(isinstance(c, Tensor) and _is_time_first(c) for c in self.columns)

    def only(self, rows: list[int]) -> SampleGroup:
        """These rows of it."""
        return SampleGroup([self.places[k] for k in rows], [_pick(c, rows) for c in self.columns], self.spec, self.size)

    def single(self, k: int) -> Any:
        return tree_unflatten([c[k] if isinstance(c, Tensor) else c for c in self.columns], self.spec)

    @property
    def dims(self) -> Any:
        return tree_unflatten([0 if isinstance(c, Tensor) else None for c in self.columns], self.spec)


def grouped(batches: Sequence[Any]) -> list[SampleGroup]:
    """Samples that can be stacked with each other."""
    found: dict[Any, list[int]] = {}
    flat = [tree_flatten(batch) for batch in batches]
    for place, (leaves, spec) in enumerate(flat):
        kinds = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else _plain_key(x, place) for x in leaves)
        found.setdefault((str(spec), kinds), []).append(place)
    groups = []
    for places in found.values():
        leaves = [flat[p][0] for p in places]
        columns = [torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in zip(*leaves, strict=True)]
        groups.append(SampleGroup(places, columns, flat[places[0]][1]))
    return groups


def _plain_key(value: Any, place: int) -> Any:
    """What is no tensor keeps samples apart where it differs."""
    if isinstance(value, (list, tuple)) and all(isinstance(v, (str, int, float, bool)) for v in value):
        return tuple(value)
    return value if isinstance(value, (str, bytes, int, float, bool, type(None))) else place


def _pick(column: Any, rows: list[int]) -> Any:
    return column[rows] if isinstance(column, Tensor) else column


def _is_time_first(column: Tensor) -> bool:
    """Of stacked leaves ``[samples, time, 1, ...]``."""
    return column.ndim > 2 and column.shape[1] != 1 and column.shape[2] == 1


def default_group(sample: Any) -> Optional[str]:
    """The class of a sample: the integer label of ``(x, y)``, or under a usual name in a dict; None without one.

    Example:
        >>> default_group((torch.zeros(4), 3)), default_group({"text": "a", "label": torch.tensor(1)})
        ('3', '1')
        >>> default_group(2.5) is None
        True
    """
    value: Any = None
    if isinstance(sample, (tuple, list)) and len(sample) >= 2:
        value = sample[1]
    elif isinstance(sample, Mapping):  # a tokenizer's BatchEncoding is no dict
        value = next((sample[k] for k in ("label", "labels", "target", "targets", "y", "class") if k in sample), None)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if hasattr(value, "item") and getattr(value, "shape", None) == () and not isinstance(value, Tensor):
        value = value.item()
    return str(value) if isinstance(value, (int, str, bool)) else None


def group_name(group: Any) -> Optional[str]:
    """The name of a group that is given as text, a number or a tensor with one; None for none.

    Example:
        >>> group_name("cat"), group_name(torch.tensor(3)), group_name(torch.tensor([2.5])), group_name(None)
        ('cat', '3', '2.5', None)
    """
    if isinstance(group, Tensor) and group.numel() == 1:
        group = group.item()  # its text would be that of a tensor
    # half characters are no text: neither files nor loggers take them
    return None if group is None else str(group).encode(errors="replace").decode()
