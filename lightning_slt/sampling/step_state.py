"""Python state that a step changes: counters, running means, lists that it appends to.

A loss that depends on how often it was asked for is no function of the weights. What the attributes of the private copy
show to change from one call to the next is found once a firing, and put back before every call.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_slt.sampling.belongings import (
    BYTES,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_ITEMS,
    RANDOM,
    generators_in,
    is_users,
    random_state,
    seed_random,
    services_of,
)
from lightning_slt.sampling.services import SHARED_NUMBERS, numbers_in, renewed
from lightning_slt.sampling.shadow import stand_ins_for, without_compile
from lightning_slt.sampling.step_tensors import fingerprint
from lightning_slt.sampling.structures import attributes_of

log = logging.getLogger(__name__)

MAX_COMPARED_BYTES = 2**20
"""Arrays up to this size are compared by what they hold, larger ones by identity."""
_OWN = {*vars(nn.Module()), "_trainer", "_fabric"}
_ABSENT = object()
_Place = tuple[str, str]
"""A module's name and an attribute's."""


class StepState:
    """The attributes that a step changes, as they were.

    Args:
        live: the module that trains; what it holds is what the copy had.
        shadow: its private copy.
        changed: where the step changes something, and whether a shallow copy of what is there will do.
    """

    def __init__(self, live: nn.Module, shadow: nn.Module, changed: dict[_Place, bool]) -> None:
        originals = {without_compile(name): module for name, module in live.named_modules()}
        # what an attribute says of the module itself is said of the copy
        parts, own = dict(shadow.named_modules()), _tensors(shadow)
        memo: dict[int, Any] = {id(module): parts[name] for name, module in originals.items() if name in parts}
        memo |= {id(tensor): own[name] for name, tensor in _tensors(live).items() if name in own}
        services = services_of(live)
        memo |= services
        self._services = list(services.values())
        self._values: dict[_Place, Any] = {}
        self._shared: dict[int, Any] = {}  # such as a lock: all copies have the one
        self._owners: dict[nn.Module, tuple[list[tuple[nn.Module, _Place]], dict[int, Any]]] = {}
        self._shallow = {place for place, shallow in changed.items() if shallow}
        for place in changed:
            owner = originals.get(place[0])
            if owner is None:
                continue
            value = vars(owner).get(place[1], _ABSENT)
            # such as a hidden state that the step detaches when it goes on from it
            outputs = {id(output): output.detach().clone() for output in _outputs_in(value, MAX_DEPTH, set(memo))}
            known = {**memo, id(_ABSENT): _ABSENT, **outputs}
            try:
                self._values[place] = self._copied(value, known)
            except Exception as error:
                log.debug(f"{_called(place)} is not put back: {type(error).__name__}: {error}")
        self._drawn_from = {place for place, value in self._values.items() if generators_in(value)}

    def _copied(self, value: Any, known: dict[int, Any]) -> Any:
        """A copy from which others can be made."""
        try:
            return copy.deepcopy(value, dict(known))
        except Exception as error:
            memo = stand_ins_for(value, error, known)
        copied = copy.deepcopy(value, dict(memo))
        shared = {key: held for key, held in memo.items() if id(held) == key}
        copy.deepcopy(copied, dict(shared))
        self._shared |= shared
        return copied

    def __bool__(self) -> bool:
        return bool(self._values)

    @property
    def names(self) -> list[str]:
        """What is put back."""
        return sorted(map(_called, self._values))

    def put_back(self, module: nn.Module) -> None:
        """Make the attributes of ``module``, a private copy, what they were; but generators begin with a number of the
        global one, which has been seeded for the step: as they were, every minibatch would have the same numbers."""
        if module not in self._owners:
            parts = dict(module.named_modules())
            places = [place for place in self._values if place[0] in parts]
            shared = {id(part): part for part in (*parts.values(), *_tensors(module).values())}
            self._owners[module] = [(parts[place[0]], place) for place in places], shared
        owners, memo = self._owners[module]
        for owner, place in owners:
            attributes, key, value = owner.__dict__, place[1], self._values[place]
            if value is _ABSENT:
                attributes.pop(key, None)
            elif value is None or isinstance(value, (bool, int, float, str)):
                attributes[key] = value
            elif isinstance(value, Tensor):
                attributes[key] = value.clone()
            elif place in self._shallow:
                attributes[key] = copy.copy(value)
            else:
                attributes[key] = copy.deepcopy(value, {**memo, **self._shared, **self._renewed()})
            for source in generators_in(attributes[key]) if place in self._drawn_from else ():
                seed_random(source, int(torch.randint(2**62, (), device="cpu")))

    def _renewed(self) -> dict[int, Any]:
        return {id(service): renewed(service) for service in self._services}

    def forget(self, module: nn.Module) -> None:
        """A private copy that is given up."""
        self._owners.pop(module, None)


def look(module: nn.Module) -> dict[_Place, Any]:
    """What tells each attribute from what it is at another time."""
    known = {id(part) for part in module.modules()}
    return {
        (name, key): _print_of(value, MAX_DEPTH, known)
        for name, part in module.named_modules()
        if not isinstance(part, (Metric, MetricCollection))
        for key, value in list(vars(part).items())
        if key not in _OWN
    }


def changed_between(before: dict[_Place, Any], after: dict[_Place, Any]) -> dict[_Place, bool]:
    """The attributes that differ between two looks, and for each whether it is a collection whose members did not.

    Between two calls of a step, and not before the first: a cache that is filled once is no state.
    """
    return {
        place: _same_members(before.get(place), after.get(place))
        for place in {**before, **after}
        if before.get(place) != after.get(place)
    }


def _print_of(value: Any, depth: int, known: set[int]) -> Any:
    """What tells ``value`` from another, or from itself at another time; collections are tuples that end in their
    members. The modules in ``known`` are looked at by themselves."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)  # NaN is NaN
    if isinstance(value, Tensor):
        if value.is_inference() or value.numel() * value.element_size() > MAX_BYTES:
            return id(value), 0 if value.is_inference() else value._version
        return id(value), fingerprint(value)
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes() if value.nbytes <= MAX_COMPARED_BYTES and not value.dtype.hasobject else None
    if isinstance(value, BYTES):
        return id(value), bytes(value) if memoryview(value).nbytes <= MAX_COMPARED_BYTES else None
    if isinstance(value, SHARED_NUMBERS):
        return id(value), numbers_in(value)
    if isinstance(value, RANDOM):
        return id(value), repr(random_state(value))
    members: list[Any] | None = None
    if depth and isinstance(value, dict):
        members = [*value, *value.values()]
    elif depth and isinstance(value, (list, tuple, set, deque)):
        members = list(value)
    elif depth and isinstance(value, nn.Module):
        members = _held_by(value, known)
    elif depth and is_users(value):
        members = list(attributes_of(value).values())
    if members is None:
        return id(value)
    return id(value), len(members), tuple(_print_of(member, depth - 1, known) for member in members[:MAX_ITEMS])


def _called(place: _Place) -> str:
    return ".".join(filter(None, place))


def _outputs_in(value: Any, depth: int, seen: set[int]) -> list[Tensor]:
    """The tensors that have a graph, of which deepcopy makes no copy."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value] if value.grad_fn is not None else []
    members: list[Any] = []
    if depth and isinstance(value, dict):
        members = list(value.values())
    elif depth and isinstance(value, (list, tuple, set, deque)):
        members = list(value)
    elif depth and is_users(value):
        members = list(attributes_of(value).values())
    return [output for member in members for output in _outputs_in(member, depth - 1, seen)]


def _held_by(hidden: nn.Module, known: set[int]) -> list[Any]:
    """What the parts of a module hold that is kept where torch does not know of it, in a list or an object."""
    held: list[Any] = []
    for part in hidden.modules():
        if id(part) not in known:
            held += [*part.parameters(recurse=False), *part.buffers(recurse=False)]
            held += [value for key, value in list(vars(part).items()) if key not in _OWN]
    return held


def _same_members(before: Any, after: Any) -> bool:
    """Whether a collection holds what it held, beside what was added or taken away."""
    if not (isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after) == 3):
        return False
    kept = set(before[2]) & set(after[2])
    return len(kept) == min(len(set(before[2])), len(set(after[2])))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {without_compile(name): t for name, t in (*module.named_parameters(), *module.named_buffers())}
