"""Batches of any structure: the tensors in them, copies of them, and others in their place."""

from __future__ import annotations

import copy
import logging
from abc import ABC
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, Union

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

log = logging.getLogger(__name__)

PLAIN = (str, bytes, int, float, bool)  # what a batch holds beside tensors, compared by value


MAX_DEPTH = 8
"""Collections and objects inside each other that are looked into for tensors."""


def num_bytes(batch: Any) -> int:
    """Bytes of the tensors and arrays in a batch of any structure (mappings, dataclasses, named tuples and objects
    included)."""
    return sum(
        held.nbytes if isinstance(held, np.ndarray) else held.numel() * held.element_size() for held in data_in(batch)
    )


def tensors_in(batch: Any) -> list[Tensor]:
    """The tensors of a batch of any structure, those that an object of it holds as attributes included."""
    return [held for held in data_in(batch) if isinstance(held, Tensor)]


def data_in(batch: Any) -> list[Union[Tensor, np.ndarray]]:
    """The tensors of a batch, as :func:`tensors_in` finds them, and its NumPy arrays."""
    found: list[Union[Tensor, np.ndarray]] = []
    seen: set[int] = set()
    waiting: list[tuple[Any, int]] = [(batch, MAX_DEPTH)]
    while waiting:
        value, depth = waiting.pop()
        if value is None or isinstance(value, PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (Tensor, np.ndarray)):
            found.append(value)
        elif depth and isinstance(value, Mapping):
            waiting += [(item, depth - 1) for item in value.values()]
        elif depth and isinstance(value, (list, tuple, deque)):
            waiting += [(item, depth - 1) for item in value]
        elif depth and _is_object(value):
            waiting += [(item, depth - 1) for item in attributes_of(value).values()]
    return found


def clone(batch: Any) -> Any:
    """The same structure with tensors and arrays of its own; what holds them as attributes is copied with them."""
    if _holds_objects(batch):
        try:
            return copy.deepcopy(batch)
        except Exception as error:  # an object that cannot be copied is shared
            log.debug(f"the batch is copied in part: {type(error).__name__}: {error}")
    return over_tensors(batch, lambda tensor: tensor.detach().clone())


def told_of(batch: Any) -> float:
    """A number that is the same for the same samples in another order, and hardly for others; NaN where it cannot be
    had."""
    told = 0.0
    try:
        for tensor in tensors_in(batch):
            if tensor.layout == torch.strided and not tensor.is_nested and tensor.ndim > 0 and not tensor.is_complex():
                numbers = tensor.detach().cpu().double()
                rows = numbers.flatten(1) if numbers.ndim > 1 else numbers[:, None]
                weights = torch.arange(1.0, rows.shape[1] + 1, dtype=torch.float64, device="cpu").cos()
                told += float((rows @ weights).square().sum())
    except Exception as error:
        log.debug(f"what a batch has is not told: {type(error).__name__}: {error}")
        return float("nan")
    return told


class _OwnMapping(ABC):  # noqa: B024 - what belongs to it is told by the hook
    """A mapping that may be more than its entries, such as a tensordict with its batch size."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return issubclass(other, Mapping) and other not in (dict, OrderedDict, defaultdict)


class _Frozen(ABC):  # noqa: B024 - as above
    """A dataclass whose fields Lightning cannot set in a copy."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return is_dataclass(other) and other.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _entries(value: Any) -> dict[Any, Any]:
    """What is in a mapping, or in the fields of a dataclass."""
    return (
        dict(value.items()) if isinstance(value, Mapping) else {f.name: getattr(value, f.name) for f in fields(value)}
    )


def tensors_in_collections(batch: Any) -> list[Tensor]:
    """The tensors of a batch in their order, without those that an object of it holds as attributes."""
    found: list[Tensor] = []

    def see(value: Any) -> None:
        found.extend([value] if isinstance(value, Tensor) else tensors_in_collections(_entries(value)))

    apply_to_collection(batch, (Tensor, _OwnMapping, _Frozen), see)
    return found


def over_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same structure with ``function`` of its tensors in their place; a mapping keeps what its class has beside its
    entries."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        entries = {key: over_tensors(entry, function) for key, entry in _entries(value).items()}
        if isinstance(value, _Frozen) and not isinstance(value, _OwnMapping):
            other = copy.copy(value)
            for name, entry in entries.items():
                object.__setattr__(other, name, entry)
            return other
        try:
            # of the tensors, which are replaced, no second copy is made: where they have a graph they have none
            twin = copy.deepcopy(value, {id(tensor): tensor for tensor in tensors_in_collections(value)})
            for key, entry in entries.items():
                twin[key] = entry
        except Exception as error:
            log.debug(f"a {type(value).__name__} is made anew from its entries: {type(error).__name__}: {error}")
            return type(value)(entries)
        return twin

    return apply_to_collection(batch, (Tensor, _OwnMapping, _Frozen), changed)


def _holds_objects(batch: Any) -> bool:
    """Whether something in a batch is no collection, such as a graph: its tensors would not be found otherwise. An
    array is none either."""
    return any(_is_closed(leaf) for leaf in tree_flatten(batch)[0])


def _is_closed(leaf: Any) -> bool:
    if isinstance(leaf, Mapping):
        return any(_holds_objects(item) for item in leaf.values())
    if is_dataclass(leaf) and not isinstance(leaf, type):
        return any(_holds_objects(getattr(leaf, field.name, None)) for field in fields(leaf))
    return isinstance(leaf, np.ndarray) or _is_object(leaf)


def _is_object(value: Any) -> bool:
    # a graph may be callable
    return (hasattr(value, "__dict__") or hasattr(value, "__slots__")) and not isinstance(
        value, (Tensor, nn.Module, type, FunctionType, MethodType, ModuleType)
    )


def attributes_of(value: Any) -> dict[str, Any]:
    """What an object holds, in its slots too: those of attrs and of ``dataclass(slots=True)`` have nothing else."""
    return {**getattr(value, "__dict__", {}), **in_slots(value)}


def in_slots(value: Any) -> dict[str, Any]:
    """What an object holds in those of its slots that are filled."""
    # what a class in C shows of itself (days of a timedelta) is of the same type, and may not be written to
    names = (
        name
        for kind in type(value).__mro__
        if "__slots__" in vars(kind)
        for name, member in vars(kind).items()
        if isinstance(member, MemberDescriptorType)
    )
    return {name: getattr(value, name) for name in names if hasattr(value, name)}
