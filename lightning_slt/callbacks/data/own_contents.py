"""What the attributes of a DataModule hold, a second time: what its hooks change in place is then the chains' own.

Within limits, since it is done at each firing: large data is shared with training, and so is what has a life beside the
hooks (datasets, files, connections, threads). Of what is shared it can be told whether hooks have changed it.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import operator
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Optional

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_slt.sampling.belongings import (
    BYTES,
    MAX_BYTES,
    MAX_ITEMS,
    RANDOM,
    copy_of_random,
    held_as_now,
    is_users,
    seed_random,
)
from lightning_slt.sampling.stand_ins import LiveIterator
from lightning_slt.sampling.structures import attributes_of, in_slots

log = logging.getLogger(__name__)

MAX_COPIED = 2_000
"""Tensors, arrays, collections, modules and objects; those that are the deepest inside of others are left out."""
MAX_COPIED_BYTES = 2**24
"""Of tensors and arrays, the smallest first: more of them would be felt at each firing."""
_PLAIN = (str, bytes, int, float, complex, bool, type, types.NoneType)
_COLLECTIONS = (list, tuple, dict, set, frozenset, deque)
_MUTABLE = (list, dict, set, deque)
_OF_A_MODULE = set(vars(nn.Module()))
_SMALL = 2**16


class OwnContents:
    """Gives a second object its own of what the first one's attributes hold.

    Args:
        live: the first one, training's own.
        twin: the second one, which has the same attributes; a list, dict, set, generator or iterator among them may be
            its own already.
        told: whether it is asked for :meth:`changed`, for which large arrays are read once.
    """

    def __init__(self, live: Any, twin: Any, told: bool = False) -> None:
        self._memo: dict[int, Any] = {id(live): twin}  # what deepcopy has for each object that it meets
        self._shells: list[tuple[Any, Any]] = []
        made, attributes = vars(twin), vars(live)
        for name, value in attributes.items():
            is_long = type(value) in (list, dict, set) and len(value) > MAX_ITEMS
            if is_long or isinstance(value, RANDOM) or isinstance(made[name], LiveIterator):
                self._memo[id(value)] = made[name]
        nodes = self._find(attributes)
        for holder, shell in self._shells:
            where = type(holder).__name__
            for name, value in getattr(holder, "__dict__", {}).items():
                vars(shell)[name] = self._copied(value, f"{where}.{name}")
            for name, value in in_slots(holder).items():
                object.__setattr__(shell, name, self._copied(value, f"{where}.{name}"))
        for name, value in attributes.items():
            made[name] = self._copied(value, name)
        self._randoms = [value for value in made.values() if isinstance(value, RANDOM)]
        self._restores: list[Callable[[], None]] = []
        shared: list[tuple[str, Any]] = []
        for name, node in nodes:
            own = self._memo.get(id(node), node)
            if own is node:
                shared.append((name, node))
            elif isinstance(own, RANDOM) and all(own is not other for other in self._randoms):
                self._randoms.append(own)
            else:
                self._restores += _restores_of(own, node)
        # what is shared is held, so that no other object has its number meanwhile
        self._prints = [(name, node, _print_of(node)) for name, node in _within(shared)] if told else []

    def put_back(self) -> None:
        """Make it what the first one's is; its generators begin with numbers of the global one."""
        for source in self._randoms:
            seed_random(source, int(torch.randint(2**62, (), device="cpu")))
        with torch.no_grad():
            for restore in self._restores:
                try:
                    restore()
                except Exception as error:  # of another shape by now, or a class that does not let itself be filled
                    log.debug(f"not put back: {type(error).__name__}: {error}")

    def changed(self) -> list[str]:
        """The attributes of the first object in which something that both have is not what it was, as far as shows."""
        return list(dict.fromkeys(name for name, node, before in self._prints if _print_of(node) != before))

    def _find(self, attributes: dict[str, Any]) -> list[tuple[str, Any]]:
        """What can be changed in place, with the attribute that it was met in; what is to be shared is in the memo."""
        nodes: list[tuple[str, Any]] = []
        data: list[Any] = []
        keys: list[Any] = []
        seen = {id(attributes), *self._memo}
        waiting = deque(attributes.items())
        left = MAX_COPIED
        while waiting:
            name, value = waiting.popleft()
            if isinstance(value, _PLAIN) or id(value) in seen:
                continue
            seen.add(id(value))
            nodes.append((name, value))
            left -= 1
            members = _members(value)
            if left < 0 or members is None:
                self._memo[id(value)] = value
            elif isinstance(value, RANDOM):
                self._memo[id(value)] = copy_of_random(value)
            elif isinstance(value, (Tensor, np.ndarray, *BYTES)):
                data.append(value)
            elif len(members) > left:  # the members of a long one are shared
                self._memo[id(value)] = copy.copy(value) if isinstance(value, _MUTABLE) else value
                nodes += [(name, member) for member in members if isinstance(member, (Tensor, np.ndarray))]
            else:
                waiting += [(name, member) for member in members]
                if isinstance(value, (dict, set, frozenset)):
                    keys += [key for key in value if not isinstance(key, (*_PLAIN, tuple, frozenset))]
                if not isinstance(value, (nn.Module, functools.partial, types.MethodType, *_COLLECTIONS)):
                    self._add_shell(value)
        size = 0
        for value in sorted(data, key=_size):
            size += _size(value)
            if size > MAX_COPIED_BYTES:
                self._memo[id(value)] = value
            elif isinstance(value, Tensor) and value.grad_fn is not None:
                self._memo[id(value)] = value.detach().clone()
        for key in keys:  # which is found by what it is
            self._memo[id(key)] = key
        return nodes

    def _add_shell(self, value: Any) -> None:
        """A user's object without its attributes, which come when the others are known as well."""
        try:
            shell = object.__new__(type(value))
        except TypeError:  # a class in C, which makes its objects itself
            shell = value
        else:
            self._shells.append((value, shell))
        self._memo[id(value)] = shell

    def _copied(self, value: Any, called: str) -> Any:
        known = len(self._memo)
        try:
            return copy.deepcopy(value, self._memo)
        except Exception as error:
            log.debug(f"{called} is shared with training: {type(error).__name__}: {error}")
            for half_made in list(self._memo)[known:]:
                del self._memo[half_made]
            self._memo[id(value)] = value
            return value


def _members(value: Any) -> Optional[list[Any]]:
    """What an object holds; None for one that is shared, whatever it holds."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        return [] if plain and not value.is_inference() else None
    if isinstance(value, np.ndarray):
        return [] if type(value) is np.ndarray and value.flags.writeable and not value.dtype.hasobject else None
    if isinstance(value, (*BYTES, *RANDOM)):
        return []
    if isinstance(value, _COLLECTIONS):
        members = value.values() if isinstance(value, dict) else value
        return [*members, *attributes_of(value).values()] if len(value) <= MAX_ITEMS else None
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, (torch.jit.ScriptModule, LightningModule)) or not (
        isinstance(value, nn.Module) or is_users(value)
    ):
        return None
    if _has_a_life(value):
        return None
    # a module has a dozen dicts of hooks
    return [held for name, held in attributes_of(value).items() if name not in _OF_A_MODULE or held]


def _has_a_life(value: Any) -> bool:
    """Whether an object is data, is there only once, has something open, or would not be copied by its attributes."""
    kind = type(value)
    if isinstance(value, (Dataset, DataLoader, Sampler, io.IOBase)) or not attributes_of(value):
        return True
    if isinstance(value, nn.Module):
        return False
    own_way = kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__
    return own_way or any(hasattr(kind, name) for name in ("__deepcopy__", "__del__", "__enter__", "close"))


def _size(value: Any) -> int:
    if isinstance(value, Tensor):  # a part of a tensor is copied with all of it, and is a part again
        return value.untyped_storage().nbytes()
    return memoryview(value).nbytes if isinstance(value, BYTES) else int(value.nbytes)


def _restores_of(own: Any, live: Any) -> list[Callable[[], None]]:
    """What makes the twin's own what training's is."""
    if isinstance(own, Tensor):
        return [_TensorRestored(own, live)]
    if isinstance(own, np.ndarray):
        return [functools.partial(np.copyto, own, live)]
    if isinstance(own, BYTES):
        return [functools.partial(operator.setitem, own, slice(None), live)]
    if isinstance(own, (tuple, frozenset, functools.partial, types.MethodType)):
        return []
    return [held_as_now(own)]


class _TensorRestored:
    """A tensor that is what another one is. A large one is written to where it has changed, which torch counts."""

    def __init__(self, own: Tensor, live: Tensor) -> None:
        self._own, self._live, self._version = own, live, own._version

    def __call__(self) -> None:
        if self._own._version != self._version or self._own.numel() <= _SMALL:
            self._own.copy_(self._live)
            self._version = self._own._version


def _within(shared: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What can be looked at in a moment."""
    left = MAX_BYTES
    for name, node in shared:
        if isinstance(node, np.ndarray):
            left -= node.nbytes
            if type(node) is not np.ndarray or not node.flags.c_contiguous or node.dtype.hasobject or left < 0:
                continue
        if isinstance(node, nn.Module):
            yield from ((name, tensor) for tensor in (*node.parameters(), *node.buffers()))
        yield name, node


def _print_of(node: Any) -> Any:
    """What tells a shared object from itself at another time, without looking at what it holds in turn."""
    with suppress(Exception):
        if isinstance(node, Tensor):
            return None if node.is_inference() else node._version
        if isinstance(node, np.ndarray):
            return zlib.crc32(node.view(np.uint8).reshape(-1).data)
        if isinstance(node, _MUTABLE):
            return len(node)
        if is_users(node) and not isinstance(node, (Dataset, DataLoader, Sampler)):
            return [(name, repr(held)) for name, held in attributes_of(node).items() if isinstance(held, _PLAIN)]
    return None


__all__ = ["MAX_COPIED", "MAX_COPIED_BYTES", "OwnContents"]
