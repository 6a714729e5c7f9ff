"""Whether a dataset is still what it was: told by what it holds, without reading it.

A DataModule may relabel, filter or extend its training set in place. What a dataset holds is looked at, and what the
datasets inside it hold: tensors by identity and version, arrays by identity and, where they are small, by content,
lists of all samples by identity, transforms and other callables by identity, switches, names and shares (bool, text,
float) by value. Counters, caches and random states are not data.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

DEPTH = 4
"""Datasets inside datasets (subsets, concatenations, wrappers) that are looked into."""
MAX_SUMMED_BYTES = 16 * 2**20
"""Size of an array up to which its content is looked at."""
FEW = 12
"""Length of a list up to which what is in it is looked at: tensors of a dataset, datasets of a concatenation."""


@dataclass(frozen=True, eq=False)
class Mark:
    """One thing that a dataset holds, as it was.

    Attributes:
        where: its place.
        of: the thing itself, weakly, so that data which is given up is not kept; None where that cannot be.
        number: what tells it from another one, or from itself at another time.
    """

    where: str
    of: Optional[weakref.ref[Any]]
    number: tuple[int, ...]

    def same_as(self, other: Mark) -> bool:
        """Whether it is the same thing, and has not been changed in between."""
        ours, theirs = (mark.of() if mark.of is not None else None for mark in (self, other))
        return (self.where, self.number) == (other.where, other.number) and ours is theirs


def marks_of(dataset: Any) -> list[Mark]:
    """What a dataset holds now.

    Example:
        >>> import torch
        >>> data = torch.utils.data.TensorDataset(torch.zeros(3))
        >>> before = marks_of(data)
        >>> same_marks(before, marks_of(data))
        True
        >>> _ = data.tensors[0].add_(1)
        >>> same_marks(before, marks_of(data))
        False
    """
    return list(_marks(dataset, "", DEPTH, _size(dataset)))


def same_marks(ours: list[Mark], theirs: list[Mark]) -> bool:
    """Whether nothing that is looked at has been changed or replaced in between."""
    return len(ours) == len(theirs) and all(a.same_as(b) for a, b in zip(ours, theirs, strict=True))


def _marks(value: Any, where: str, depth: int, size: int) -> Iterator[Mark]:
    """Of ``value``, which a dataset of ``size`` samples holds."""
    if isinstance(value, Tensor):
        version = 0 if value.is_inference() else value._version
        yield Mark(where, weakref.ref(value), (version, value.numel()))
    elif isinstance(value, np.ndarray):
        small = value.nbytes <= MAX_SUMMED_BYTES and not value.dtype.hasobject
        yield Mark(where, weakref.ref(value), (zlib.crc32(value.tobytes()) if small else 0, value.size))
    elif isinstance(value, (list, tuple)):
        # a tuple is often made anew, of the same things; and a list of another length is maybe no data
        if isinstance(value, list) and len(value) == size:
            yield Mark(where, None, (id(value), size))
        if len(value) <= FEW:
            for number, part in enumerate(value):
                yield from _marks(part, f"{where}/{number}", depth - 1, size)
    elif isinstance(value, (bool, str, float)):
        yield Mark(where, None, (hash(value),))
    elif callable(value) and not isinstance(value, Dataset):
        with suppress(TypeError):  # what cannot be referred to weakly is no transform
            yield Mark(where, weakref.ref(value), ())
    elif isinstance(value, Dataset) and depth > 0:
        for name, part in getattr(value, "__dict__", {}).items():
            yield from _marks(part, f"{where}/{name}", depth - 1, _size(value))


def _size(dataset: Any) -> int:
    try:
        return len(dataset)
    except Exception:  # an iterable has none
        return -1


__all__ = ["Mark", "marks_of", "same_marks"]
