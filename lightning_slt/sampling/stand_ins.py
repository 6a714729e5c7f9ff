"""Stand-ins for what a step reaches beside its module: they show what the real thing has, and nothing gets through."""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

MOST_HELD = 16
"""Things that a queue of chains holds: they may hold graphs."""
_PLAIN = (str, int, float, bool, Path, type(None))


class ReadThrough:
    """An object's attributes to read; writes stay here.

    Args:
        live: the object.
        local: what is answered in its place.
    """

    def __init__(self, live: Any, local: dict[str, Any]) -> None:
        self.__dict__["_live"] = live
        self.__dict__["_local"] = local

    def __getattr__(self, name: str) -> Any:
        local = self.__dict__["_local"]
        return local[name] if name in local else getattr(self.__dict__["_live"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_local"][name] = value


class Silent:
    """Takes every call, attribute, item and ``with``, holds nothing, and does nothing."""

    def __getattr__(self, name: str) -> Silent:
        if name.startswith("__"):
            raise AttributeError(name)
        return SILENT

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Silent:
        return SILENT

    def __getitem__(self, _: Any) -> Silent:
        return SILENT

    def __setitem__(self, *_: Any) -> None:
        pass

    def __delitem__(self, _: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> Silent:
        return SILENT

    def __exit__(self, *_: Any) -> None:
        pass

    def __reduce__(self) -> str:
        return "SILENT"


SILENT = Silent()


class Silenced(ReadThrough, Silent):
    """A logger or a profiler with its class and its plain values (a folder, a name), and silent in all else.

    What is written to it stays here. A copy of it, and what goes to another process, has its values as they are then,
    and not the real one.

    Args:
        live: the real one. Its ``experiment``, which may open a run, is not asked for.
    """

    def __init__(self, live: Any) -> None:
        inner = vars(live) if type(live) is Silenced else {"_live": live, "_local": {}}
        super().__init__(inner["_live"], dict(inner["_local"]))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # a step may ask which logger it has
        live = self.__dict__["_live"]
        return live.kind if type(live) is _Still else live.__class__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.__dict__["_local"]:
            return self.__dict__["_local"][name]
        value = SILENT if name == "experiment" else getattr(self.__dict__["_live"], name)
        if isinstance(value, (Tensor, np.ndarray)):  # of a logger of the user's own, which the step may read
            return copy.deepcopy(value.detach() if isinstance(value, Tensor) else value)
        return value if isinstance(value, _PLAIN) else SILENT

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        live = self.__dict__["_live"]
        still = live if type(live) is _Still else _Still(_importable(type(live)), _values(live))
        return _restored, (still.kind, still.values, self.__dict__["_local"])


class _Still:
    """A logger as it was: its class and its plain values."""

    def __init__(self, kind: type, values: dict[str, Any]) -> None:
        self.kind, self.values = kind, values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.values[name] if name in self.values else getattr(self.kind, name)


def _restored(kind: type, values: dict[str, Any], local: dict[str, Any]) -> Silenced:
    silenced = Silenced(_Still(kind, values))
    silenced.__dict__["_local"].update(local)
    return silenced


def _values(live: Any) -> dict[str, Any]:
    """What of a logger is plain, and by which names it has more: not its private attributes, which may be keys."""
    names = [name for name in getattr(live, "__dict__", {}) if not name.startswith("_") and name != "experiment"]
    values = {}
    for name in (*names, "name", "version", "save_dir", "root_dir", "log_dir"):
        with suppress(Exception):  # of a property, or a name that it does not have
            value = getattr(live, name)
            values[name] = value if isinstance(value, _PLAIN) else SILENT
    return values


def _importable(kind: type) -> type:
    """The class, or the nearest of those that it derives from, that another process can import by its name."""
    for base in kind.__mro__:
        found: Any = sys.modules.get(base.__module__) if base.__module__ != "__main__" else None
        for part in base.__qualname__.split("."):
            found = getattr(found, part, None)
        if found is base:
            return base
    return object


class LiveIterator:
    """Stands in for an iterator that training reads: what a chain took from it, training would miss.

    Args:
        path: where it is, for the message.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __iter__(self) -> LiveIterator:
        return self

    def __next__(self) -> NoReturn:
        raise ValueError(
            f"training_step takes from the iterator {self._path}, which chains must not: training would miss what they "
            "take. Give loss_fn(module, batch) -> loss, or the trainer several loaders (a dict or a CombinedLoader)."
        )

    def send(self, _: Any) -> NoReturn:
        """As a generator's."""
        next(self)


class LiveQueue:
    """Stands in for a queue, at whose other end training is: out comes what chains have put in, of which the newest are
    kept, and nothing waits.

    Args:
        path: where it is, for the message.
        maxsize: that of the queue.
    """

    def __init__(self, path: str, maxsize: int = 0) -> None:
        self.path, self.maxsize = path, maxsize
        self._held: deque[Any] = deque(maxlen=MOST_HELD)

    def put(self, item: Any, *_: Any, **__: Any) -> None:
        """As a queue's."""
        self._held.append(item)

    put_nowait = put

    def get(self, *_: Any, **__: Any) -> Any:
        """As a queue's.

        Raises:
            ValueError: where chains have put nothing in.
        """
        if not self._held:
            raise ValueError(
                f"training_step takes from the queue {self.path}, which chains must not: training would miss what they "
                "take. Give loss_fn(module, batch) -> loss."
            )
        return self._held.popleft()

    get_nowait = get

    def task_done(self) -> None:
        """As a queue's."""

    join = close = join_thread = cancel_join_thread = task_done

    def qsize(self) -> int:
        """As that of an empty queue."""
        return 0

    def empty(self) -> bool:
        """As that of an empty queue."""
        return True

    def full(self) -> bool:
        """As that of an empty queue."""
        return False


__all__ = ["SILENT", "LiveIterator", "LiveQueue", "ReadThrough", "Silenced"]
