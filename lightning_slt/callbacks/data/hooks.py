"""The batch hooks of a DataModule as chains call them: what they write to its attributes is not kept."""

from __future__ import annotations

import operator
from typing import Any, Optional

from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_slt.callbacks.apart import loosened
from lightning_slt.callbacks.data.own_contents import OwnContents
from lightning_slt.sampling.belongings import MAX_ITEMS

BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_COLLECTIONS = (list, dict, set)


class DataHooks:
    """A second DataModule for the hooks of a firing, as training has left the first one at every minibatch.

    It is made once: lists and dicts of a DataModule may be long. The longer ones are put back at each minibatch once
    hooks have been seen to change them. They are looked through for that more and more seldom (after 1, 3, 7, 15
    minibatches), since it takes as long as to copy them; a change of their length is seen at once. What the others
    hold, and tensors, arrays, modules and objects, is the second one's own as well, within the limits of
    :class:`~lightning_slt.callbacks.data.own_contents.OwnContents`.

    Args:
        live: training's own, which waits while the firing lasts; None for none. One without batch hooks is not copied.
        told: whether it is asked for :meth:`changed`.
    """

    def __init__(self, live: Any, told: bool = False) -> None:
        self._live = live
        self._twin = live
        self._contents: Optional[OwnContents] = None
        if live is not None and any(is_overridden(name, live) for name in BATCH_HOOKS):
            self._twin = loosened(live)
            self._contents = OwnContents(live, self._twin, told)
        self._made = dict(getattr(self._twin, "__dict__", {}))
        self._long = [name for name, v in self._made.items() if type(v) in _COLLECTIONS and len(v) > MAX_ITEMS]
        self._count = 0
        self._changing: set[str] = set()

    def for_a_batch(self) -> Any:
        """The second one with what the first one has; its generators begin with numbers of the global one: as they
        are, every minibatch would have the same numbers."""
        if self._contents is None:
            return self._live
        self._count += 1
        own, before = vars(self._twin), vars(self._live)
        own.clear()
        own.update(self._made)
        self._contents.put_back()
        for name in self._long:
            value = own[name]
            if self._may_differ(name, value, before[name]):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(before[name])
        return self._twin

    def changed(self) -> list[str]:
        """The attributes in which hooks have changed what is training's own too: it was too large to be copied, or of
        a kind that is not."""
        return self._contents.changed() if self._contents is not None else []

    def _may_differ(self, name: str, value: Any, before: Any) -> bool:
        is_looked_at = self._count & (self._count - 1) == 0
        if name in self._changing:
            return True
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
