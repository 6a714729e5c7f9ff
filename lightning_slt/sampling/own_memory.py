"""What processes share of what a dataset holds, in memory of this process's own: a process that was forked to read has
none of training's numbers to move on.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.managers import (  # type: ignore[attr-defined]  # two of them are not in its stubs
    ArrayProxy,
    BaseProxy,
    DictProxy,
    ListProxy,
    NamespaceProxy,
    ValueProxy,
)
from multiprocessing.shared_memory import SharedMemory
from types import MethodType, NoneType, SimpleNamespace
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_slt.sampling.belongings import MAX_DEPTH, MAX_ITEMS, is_users
from lightning_slt.sampling.services import SHARED_NUMBERS, renewed
from lightning_slt.sampling.structures import PLAIN, attributes_of

MAX_SHARED_BYTES = 2**24
"""Shared memory up to this size, of an attribute together, is taken for numbers that are counted up, and copied by each
process; what is more for data, which is read."""
MAX_SERVED = 100
"""The same of what a ``multiprocessing.Manager`` holds, in items: how large these are it does not say."""
_LEAVES = (*PLAIN, NoneType, type)


class OwnMemory:
    """Puts copies in the place of what is shared, in a process that was forked: what it changes is its own.

    What is met in two places has one copy. Collections longer than
    :data:`~lightning_slt.sampling.belongings.MAX_ITEMS`, or of so many items together, are data and not looked into; of
    an array and the number over whose memory it lies each has a copy.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Any]] = {}
        """By id, the things that have been met, which keeps their ids theirs, and what is in their place."""
        self._room, self._bytes = 0, 0
        """How many more items of the attribute that goes on are looked into, and how much of its memory is copied."""

    def give(self, dataset: Any) -> None:
        """Have a dataset hold nothing that other processes see changed, as far as this can be."""
        for name, value in list(attributes_of(dataset).items()):
            before = self._room, self._bytes
            self._room, self._bytes = MAX_ITEMS, MAX_SHARED_BYTES
            with suppress(Exception):  # what does not let itself be looked at is left as it was
                _set(dataset, name, value, self._own(value, MAX_DEPTH))
            self._room, self._bytes = before

    def _own(self, value: Any, depth: int) -> Any:
        """What belongs in the place of ``value``: itself where it is not shared."""
        if isinstance(value, _LEAVES) or depth == 0:
            return value
        if id(value) not in self._made:
            self._made[id(value)] = value, value
            size, found = _shared_bytes(value), value
            if size is not None and size <= self._bytes:
                found = _copy_of(value)
                self._bytes -= size
            found = self._looked_into(found, depth)
            self._made[id(value)], self._made[id(found)] = (value, found), (found, found)
        return self._made[id(value)][1]

    def _looked_into(self, value: Any, depth: int) -> Any:
        """The same object with what it holds replaced; a tuple is another one then."""
        if isinstance(value, Dataset):
            self.give(value)
        elif isinstance(value, MethodType):
            self._own(value.__self__, depth - 1)
        elif isinstance(value, (dict, list, deque, tuple)) and len(value) > self._room:
            pass
        elif isinstance(value, dict):
            self._replace(dict(value), value.__setitem__, depth)
        elif isinstance(value, (list, deque)):
            self._replace(dict(enumerate(value)), value.__setitem__, depth)
        elif isinstance(value, tuple):
            items, changed = dict(enumerate(value)), dict[int, Any]()
            self._replace(items, changed.__setitem__, depth)
            if changed:
                made = ({**items, **changed}[index] for index in items)
                return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        elif isinstance(value, nn.Module) or is_users(value):
            held = attributes_of(value)
            self._replace(held, lambda name, other: _set(value, name, held[name], other), depth)
        return value

    def _replace(self, members: dict[Any, Any], put: Callable[[Any, Any], None], depth: int) -> None:
        if len(members) > self._room:
            return
        self._room -= len(members)
        for key, member in members.items():
            other = self._own(member, depth - 1)
            if other is not member:
                put(key, other)


def _set(holder: Any, name: str, before: Any, value: Any) -> None:
    if value is before:
        return
    own = getattr(holder, "__dict__", {})
    if name in own:
        own[name] = value
    else:
        object.__setattr__(holder, name, value)  # in a slot


def _shared_bytes(value: Any) -> Optional[int]:
    """Size of what other processes see changed: none of what a manager holds, which is told in items; None for what is
    not shared, or cannot be written to."""
    if isinstance(value, (*SHARED_NUMBERS, BaseProxy)):
        return 0
    if isinstance(value, Tensor):
        return value.nbytes if is_shared(value) else None
    if isinstance(value, SharedMemory):
        return value.size
    if isinstance(value, np.ndarray):
        return value.nbytes if value.flags.writeable and _is_memory_of_others(value) else None
    if isinstance(value, memoryview):
        return value.nbytes if not value.readonly and _is_memory_of_others(value) else None
    return None


def _copy_of(value: Any) -> Any:
    """The same in memory of its own, but what is taken for data."""
    if isinstance(value, SHARED_NUMBERS):
        return renewed(value)
    if isinstance(value, BaseProxy):
        return _as_served(value)
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, memoryview):
        return memoryview(bytearray(value)).cast(value.format, value.shape)  # type: ignore[call-overload]
    nothing: Callable[[], None] = lambda: None  # noqa: E731
    own = memoryview(bytearray(value.buf))
    return SimpleNamespace(name=value.name, size=value.size, buf=own, close=nothing, unlink=nothing)


def is_shared(tensor: Tensor) -> bool:
    """Whether other processes see what is written to it. Those on a GPU are not told apart, nor can a process that was
    forked touch them; those without storage of their own (sparse ones) cannot be asked."""
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_shared()


def _is_memory_of_others(value: Any) -> bool:
    """Whether an array or a view of memory is of a map, a shared number or a shared tensor."""
    while isinstance(value, (np.ndarray, memoryview)):
        value = value.base if isinstance(value, np.ndarray) else value.obj
    return isinstance(value, (mmap.mmap, *SHARED_NUMBERS)) or (isinstance(value, Tensor) and is_shared(value))


def _as_served(proxy: BaseProxy) -> Any:
    """What a manager holds as of now, where that is a few numbers."""
    few = isinstance(proxy, (DictProxy, ListProxy, ArrayProxy)) and len(proxy) <= MAX_SERVED
    return proxy._getvalue() if few or isinstance(proxy, (ValueProxy, NamespaceProxy)) else proxy


__all__ = ["MAX_SHARED_BYTES", "OwnMemory", "is_shared"]
