"""What the attributes of a module hold: iterators that a chain must not read, services, contents that a step changes.

A copy has its own. Where a module is called in place, putting its attributes back is not enough: a step that appends
its loss to a list changes what the list holds, and the list is still the same one.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import operator
import random
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_slt.sampling.services import method_of, stand_in
from lightning_slt.sampling.stand_ins import LiveIterator
from lightning_slt.sampling.structures import attributes_of, in_slots

log = logging.getLogger(__name__)

MAX_ITEMS = 10_000
"""Items of a longer list or dict are not looked into; which they are is kept all the same."""
MAX_DEPTH = 8
"""What lies deeper is left alone."""
MAX_BYTES = 2**28
"""Larger tensors and arrays are data: a second copy of them at every firing could cost training its memory."""
RANDOM = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
"""Sources of random numbers."""
BYTES = (bytearray, array)
"""Numbers of one kind, in memory that Python itself can change."""
_OWN = ("_parameters", "_buffers", "_modules", "_trainer", "_fabric")
_FOREIGN = (
    "torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "lightning_slt", "wandb", "mlflow",
    "comet_ml", "tensorboard", "tensorboardX", "logging", "threading", "multiprocessing", "concurrent", "queue",
    "asyncio", "tqdm", "rich",
)  # fmt: skip
"""Packages whose objects may have a life beside the step (threads, connections): these are left alone."""


def is_live_iterator(value: Any) -> bool:
    """Whether it gives what it has only once; files, which a step may write to, are none."""
    return isinstance(value, Iterator) and not isinstance(value, (io.IOBase, nn.Module, LiveIterator))


def services_of(module: nn.Module) -> dict[int, Any]:
    """A deepcopy memo for the services (:mod:`~lightning_slt.sampling.services`) that attributes of a module lead to.

    What a copy puts into a copied queue, nobody takes out: once it is full, the next ``put`` would wait for ever.
    """
    memo: dict[int, Any] = {}
    seen = {id(part) for part in module.modules()}
    for name, part in module.named_modules():
        where = f"{type(module).__name__}.{name}" if name else type(module).__name__
        for key, value in list(vars(part).items()):
            if key not in _OWN:
                _find_services(value, f"{where}.{key}", memo, seen)
    return memo


def _find_services(value: Any, path: str, memo: dict[int, Any], seen: set[int], depth: int = MAX_DEPTH) -> None:
    if depth == 0 or id(value) in seen or isinstance(value, (str, bytes, int, float, bool, type, Tensor, NoneType)):
        return
    seen.add(id(value))
    if isinstance(value, (types.MethodType, types.BuiltinMethodType)):  # of the same stand-in as the queue itself
        _find_services(value.__self__, path, memo, seen, depth)
        bound = method_of(memo.get(id(value.__self__)), value)
        if bound is not None:
            memo[id(value)] = bound
        return
    found = stand_in(value, path)
    if found is not None:
        memo[id(value)] = found
        return
    members: Any = ()
    if isinstance(value, dict):
        members = [(f"[{key!r}]", member) for key, member in value.items()]
    elif isinstance(value, (list, tuple, set, deque)):
        members = [(f"[{index}]", member) for index, member in enumerate(value)]
    elif isinstance(value, functools.partial):
        members = [("", member) for member in (value.func, *value.args, *value.keywords.values())]
    elif isinstance(value, nn.Module) or is_users(value):
        held = attributes_of(value).items()
        members = [(f".{name}", member) for name, member in held if name not in ("_trainer", "_fabric")]
    for name, member in members if len(members) <= MAX_ITEMS else ():
        _find_services(member, f"{path}{name}", memo, seen, depth - 1)


@contextmanager
def contents_kept(module: nn.Module) -> Iterator[None]:
    """Put back what the attributes of a module hold, in the same objects, and let no iterator among it be read."""
    with ExitStack() as undo:
        seen = {id(own) for own in (*module.parameters(), *module.buffers(), *module.modules())}
        for name, part in module.named_modules():
            where = f"{type(module).__name__}.{name}" if name else type(module).__name__
            for key, value in list(vars(part).items()):
                if key not in _OWN:
                    try:
                        _keep(value, f"{where}.{key}", _setter(vars(part), key), seen, undo)
                    except Exception as error:  # an object that does not let itself be looked at is left as it was
                        log.debug(f"{where}.{key} is not put back: {type(error).__name__}: {error}")
        yield


def _setter(holder: Any, key: Any) -> Callable[[Any], None]:
    return lambda value: holder.__setitem__(key, value)


def _keep(
    value: Any, path: str, put: Callable[[Any], None], seen: set[int], undo: ExitStack, depth: int = MAX_DEPTH
) -> None:
    """Note how ``value`` is put back; ``put`` writes another value to where it is."""
    if value is None or isinstance(value, (str, bytes, int, float, bool, type)) or id(value) in seen:
        return
    if depth == 0:
        return
    seen.add(id(value))
    service = _partial_of(value, path) if isinstance(value, functools.partial) else stand_in(value, path)
    if service is not None:
        undo.callback(put, value)
        put(service)
    elif isinstance(value, Tensor):
        if _can_be_kept(value):
            undo.callback(_restore_tensor, value, value.detach().clone(), value._version)
    elif isinstance(value, np.ndarray):
        if value.flags.writeable and value.nbytes <= MAX_BYTES:
            undo.callback(np.copyto, value, value.copy())
    elif isinstance(value, BYTES):
        if memoryview(value).nbytes <= MAX_BYTES:
            undo.callback(operator.setitem, value, slice(None), value[:])
    elif isinstance(value, RANDOM):
        undo.callback(set_random_state, value, random_state(value))
    elif isinstance(value, list):
        undo.callback(held_as_now(value))
        _keep_items(list(enumerate(value)), value, path, seen, undo, depth)
    elif isinstance(value, dict):
        undo.callback(held_as_now(value))
        _keep_items(list(value.items()), value, path, seen, undo, depth)
    elif isinstance(value, (set, deque)):
        undo.callback(held_as_now(value))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            _keep(item, f"{path}[{index}]", _nowhere, seen, undo, depth - 1)
    elif is_live_iterator(value) and not is_users(value):
        undo.callback(put, value)
        put(LiveIterator(path))
    elif isinstance(value, nn.Module):
        _keep_module(value, path, seen, undo, depth)
    elif is_users(value):
        own, slots = getattr(value, "__dict__", {}), in_slots(value)
        undo.callback(held_as_now(value))
        for name, item in list(own.items()):
            _keep(item, f"{path}.{name}", _setter(own, name), seen, undo, depth - 1)
        for name, item in slots.items():
            _keep(item, f"{path}.{name}", functools.partial(object.__setattr__, value, name), seen, undo, depth - 1)


def _partial_of(value: functools.partial[Any], path: str) -> Any:
    """The same of stand-ins; None where there are none."""
    parts = {id(part): stand_in(part, path) for part in (value.func, *value.args, *value.keywords.values())}
    if all(part is None for part in parts.values()):
        return None

    def other(part: Any) -> Any:
        found = parts[id(part)]
        return part if found is None else found

    arguments = {name: other(part) for name, part in value.keywords.items()}
    return functools.partial(other(value.func), *map(other, value.args), **arguments)


def _keep_module(module: nn.Module, path: str, seen: set[int], undo: ExitStack, depth: int) -> None:
    """One that is kept where torch does not know of it (a teacher in a list): its tensors and attributes."""
    parts = [part for part in module.modules() if part is module or id(part) not in seen]
    tensors = [t for part in parts for t in (*part.parameters(recurse=False), *part.buffers(recurse=False))]
    if sum(t.numel() * t.element_size() for t in tensors) > MAX_BYTES or isinstance(module, torch.jit.ScriptModule):
        return
    for part in parts:
        seen.add(id(part))
        for holder in (part._parameters, part._buffers):
            undo.callback(_restore_dict, holder, dict(holder))
        own = vars(part)
        undo.callback(_restore_dict, own, dict(own))
        for name, item in [(name, item) for name, item in own.items() if name not in _OWN]:
            _keep(item, f"{path}.{name}", _setter(own, name), seen, undo, depth - 1)
    for tensor in tensors:
        _keep(tensor, path, _nowhere, seen, undo, depth)


def _keep_items(
    items: list[tuple[Any, Any]], holder: Any, path: str, seen: set[int], undo: ExitStack, depth: int
) -> None:
    if len(items) <= MAX_ITEMS:
        for key, item in items:
            _keep(item, f"{path}[{key!r}]", _setter(holder, key), seen, undo, depth - 1)


def _can_be_kept(tensor: Tensor) -> bool:
    """A plain one of memory of its own: an inference tensor cannot be changed here, and what a sharding strategy has
    put in the place of a weight may have no memory at the moment."""
    if tensor.is_inference() or tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return False
    size = tensor.numel() * tensor.element_size()
    return size <= MAX_BYTES and tensor.untyped_storage().nbytes() > 0


@torch.no_grad()
def _restore_tensor(tensor: Tensor, before: Tensor, version: int) -> None:
    if tensor._version != version or not torch.equal(tensor, before):  # through .data the version stays
        tensor.copy_(before)


def held_as_now(value: Any) -> Callable[[], None]:
    """What makes a collection or an object hold again what it holds now; these things themselves may have changed."""
    if isinstance(value, list):
        return functools.partial(_restore_list, value, list(value))
    if isinstance(value, dict):
        return functools.partial(_restore_dict, value, dict(value))
    if isinstance(value, (set, deque)):
        return functools.partial(_restore_members, value, list(value))
    own = getattr(value, "__dict__", {})
    attributes = functools.partial(_restore_dict, own, dict(own))
    if not hasattr(value, "__slots__"):
        return attributes
    slots = in_slots(value)

    def restore() -> None:
        attributes()
        _restore_slots(value, slots)

    return restore


def _restore_list(value: list[Any], before: list[Any]) -> None:
    if len(value) != len(before) or any(a is not b for a, b in zip(value, before, strict=True)):
        value[:] = before


def _restore_dict(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    # only where it differs: a class derived from dict may not let itself be filled
    if list(value) != list(before) or any(value[key] is not item for key, item in before.items()):
        value.clear()
        value.update(before)


def _restore_slots(value: Any, before: dict[str, Any]) -> None:
    # past the class's own __setattr__, which a frozen dataclass refuses with
    for name in in_slots(value).keys() - before.keys():
        object.__delattr__(value, name)
    for name, item in before.items():
        if getattr(value, name, None) is not item:
            object.__setattr__(value, name, item)


def _restore_members(value: Any, before: list[Any]) -> None:
    value.clear()
    (value.extend if isinstance(value, deque) else value.update)(before)


def random_state(source: Any) -> Any:
    """Where one of :data:`RANDOM` stands."""
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    if isinstance(source, random.Random):
        return source.getstate()
    return source.get_state()


def set_random_state(source: Any, state: Any) -> None:
    """Put one of :data:`RANDOM` back to where it stood."""
    if isinstance(source, np.random.Generator):
        source.bit_generator.state = state
    elif isinstance(source, random.Random):
        source.setstate(state)
    else:
        source.set_state(state)


def copy_of_random(source: Any) -> Any:
    """A second one of :data:`RANDOM`, which stands where the first one does."""
    twin = torch.Generator(source.device) if isinstance(source, torch.Generator) else copy.deepcopy(source)
    set_random_state(twin, random_state(source))
    return twin


def seed_random(source: Any, seed: int) -> None:
    """Begin one of :data:`RANDOM` anew."""
    if isinstance(source, np.random.Generator):
        source.bit_generator.state = type(source.bit_generator)(seed).state
    elif isinstance(source, torch.Generator):
        source.manual_seed(seed)
    else:
        source.seed(seed % 2**32)


def generators_in(value: Any, depth: int = MAX_DEPTH) -> list[Any]:
    """Those of :data:`RANDOM` that an attribute is or holds."""
    if isinstance(value, RANDOM):
        return [value]
    members: Any = ()
    if depth and isinstance(value, dict):
        members = value.values()
    elif depth and isinstance(value, (list, tuple)):
        members = value
    elif depth and not isinstance(value, Tensor) and (is_users(value) or isinstance(value, nn.Module)):
        members = attributes_of(value).values()
    return [found for member in list(members)[:MAX_ITEMS] for found in generators_in(member, depth - 1)]


def _nowhere(_: Any) -> None:
    """What a tuple holds cannot be exchanged."""


def is_users(value: Any) -> bool:
    """An object with attributes or slots, of a class of the user's own, which may have a ``__call__``: no function, no
    class, no Python module, and nothing with a life beside the step."""
    if isinstance(value, (types.ModuleType, type)):
        return False
    package = type(value).__module__.partition(".")[0]
    return (hasattr(value, "__dict__") or hasattr(value, "__slots__")) and package not in (
        "builtins",
        "functools",
        *_FOREIGN,
    )


__all__ = [
    "BYTES",
    "RANDOM",
    "LiveIterator",
    "contents_kept",
    "copy_of_random",
    "generators_in",
    "held_as_now",
    "is_live_iterator",
    "is_users",
    "random_state",
    "seed_random",
    "services_of",
    "set_random_state",
]
