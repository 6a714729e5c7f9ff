"""The batch hooks of a DataModule as chains call them: what they write to its attributes is not kept."""

from __future__ import annotations

import operator
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_slt.callbacks.apart import loosened
from lightning_slt.sampling.belongings import MAX_ITEMS, RANDOM, seed_random

BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_COLLECTIONS = (list, dict, set)


class DataHooks:
    """A second DataModule for the hooks of a firing, as training has left the first one at every minibatch.

    It is made once: lists and dicts of a DataModule may be long. The longer ones are put back at each minibatch once
    hooks have been seen to change them. They are looked through for that more and more seldom (after 1, 3, 7, 15
    minibatches), since it takes as long as to copy them; a change of their length is seen at once.

    Args:
        live: training's own, which waits while the firing lasts; None for none. One without batch hooks is not copied.
    """

    def __init__(self, live: Any) -> None:
        self._live = live
        self._twin = live
        if live is not None and any(is_overridden(name, live) for name in BATCH_HOOKS):
            self._twin = loosened(live)
        self._made = dict(getattr(self._twin, "__dict__", {}))
        self._count = 0
        self._changing: set[str] = set()

    def for_a_batch(self) -> Any:
        """The second one with what the first one has; its generators begin with numbers of the global one: as they
        are, every minibatch would have the same numbers."""
        if self._twin is self._live:
            return self._live
        self._count += 1
        own, before = vars(self._twin), vars(self._live)
        own.clear()
        own.update(self._made)
        for name, value in own.items():
            if isinstance(value, RANDOM):
                seed_random(value, int(torch.randint(2**62, ())))
            elif type(value) in _COLLECTIONS and self._may_differ(name, value, before[name]):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(before[name])
            elif isinstance(value, Tensor) and value is not before[name]:
                own[name] = before[name].clone()
        return self._twin

    def _may_differ(self, name: str, value: Any, before: Any) -> bool:
        if name in self._changing or len(value) <= MAX_ITEMS:
            return True
        is_looked_at = self._count & (self._count - 1) == 0
        if len(value) != len(before) or (is_looked_at and not _same(value, before)):
            self._changing.add(name)
            return True
        return False


def _same(value: Any, before: Any) -> bool:
    """Whether two collections of one length hold the same things, in the same order where they have one."""
    if isinstance(value, set):
        return bool(value == before)
    values = map(operator.is_, value.values(), before.values()) if isinstance(value, dict) else ()
    return all(map(operator.is_, value, before)) and all(values)


__all__ = ["BATCH_HOOKS", "DataHooks"]
