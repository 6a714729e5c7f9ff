"""What :func:`torch.vmap` gives, without what it does anew at every call.

Each call of it flattens its inputs, checks them and puts them together again, and :func:`torch.func.functional_call`
looks for tied weights and swaps each by its name, every time. Of the 220 microseconds of a forward pass of eight chains
of a small model these are 80 each (torch 2.13, 64 weights): more than its products.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn

try:  # what torch.vmap is made of; where a version of torch has it no more, it is called itself
    from torch._C._functorch import _add_batch_dim, _remove_batch_dim, _vmap_decrement_nesting, _vmap_increment_nesting
except ImportError:  # pragma: no cover
    _add_batch_dim = None  # type: ignore[assignment]


@contextmanager
def without_advice() -> Iterator[None]:
    """torch asks for a report of operations without a batching rule: nothing that a user of chains can do about.

    By its own switch, which is on where nobody has touched it and cannot be read: a filter of Python's, set and taken
    away, has the user's warnings shown again at every call.
    """
    show = getattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", lambda shown: None)
    show(False)
    try:
        yield
    finally:
        show(True)


class Vmapped:
    """A function for many rows at once, called many times with inputs of the same kind.

    The first call is one of :func:`torch.vmap`, with all its checks; the others batch the inputs and do no more.

    Args:
        function: of tensors and other things, to a tuple of tensors.

    Example:
        >>> rows = Vmapped(lambda a, b: ((a * b).sum(),))
        >>> for _ in range(2):
        ...     print(rows([torch.arange(6.0).view(2, 3), torch.ones(3)], [0, None]))
        (tensor([ 3., 12.]),)
        (tensor([ 3., 12.]),)
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._checked = False

    def __call__(self, inputs: Sequence[Any], dims: Sequence[Optional[int]]) -> tuple[Tensor, ...]:
        """The outputs, with the rows as a first dimension.

        Args:
            inputs: of the function; the first one has rows.
            dims: which dimension of each has the rows: 0, or None where it is the same for all.
        """
        with without_advice():
            return self._rows(inputs, dims)

    def _rows(self, inputs: Sequence[Any], dims: Sequence[Optional[int]]) -> tuple[Tensor, ...]:
        if not self._checked or _add_batch_dim is None:
            found: tuple[Tensor, ...] = torch.vmap(self._function, in_dims=tuple(dims), randomness="different")(*inputs)
            self._checked = True
            return found
        rows = len(inputs[0])
        level = _vmap_increment_nesting(rows, "different")
        try:
            outputs = self._function(
                *[x if dim is None else _add_batch_dim(x, dim, level) for x, dim in zip(inputs, dims, strict=True)]
            )
            return tuple(_remove_batch_dim(output, level, rows, 0) for output in outputs)
        finally:
            _vmap_decrement_nesting()


class Slots:
    """Where weights are in a module: they are put there by name, tied ones everywhere.

    What is put in stays in until it is emptied, as batched tensors that are dead after the call: for a module of one's
    own, which is never called otherwise.

    Args:
        module: holds the weights.
        names: of them, each of the tied ones once.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        by_name = dict(module.named_parameters())
        self._own = [by_name[name] for name in names]
        numbers = {id(parameter): k for k, parameter in enumerate(self._own)}
        self._slots = [
            (held._parameters, name, numbers[id(parameter)])
            for held in module.modules()
            for name, parameter in held._parameters.items()
            if id(parameter) in numbers
        ]

    def put(self, weights: Sequence[Tensor]) -> None:
        """One for each name, as tensors of any kind."""
        for parameters, name, k in self._slots:
            parameters[name] = weights[k]  # type: ignore[assignment]

    def empty(self) -> None:
        """The module's own weights are back in it, and nothing of others is held."""
        self.put(self._own)


_MEANT = (
    ("either (1) calling .item()", "calling .item(), or an if on a tensor, for which chains have one value each"),
    ("calling .item()", "calling .item(), which gives one Python number for several chains"),
    ("data-dependent control flow", "data-dependent control flow, in which chains would part ways"),
    ("indexing with a boolean mask", "indexing with a boolean mask, which gives another length in each chain"),
    ("aten::nonzero", "aten::nonzero, which gives another number of rows in each chain"),
    ("inplace arithmetic", "inplace arithmetic on a tensor that is one for all chains"),
)
"""What torch says of steps that vmap cannot take, and the words of docs/compatibility.md for it."""
_PLEA = re.compile(r"\. ((?!\. ).)*\bplease (file|open|submit|report)\b", re.IGNORECASE)


def what_failed(error: Exception) -> str:
    """An error under vmap in one line, without torch's plea for a bug report: the step is what it is about.

    Example:
        >>> what_failed(RuntimeError("vmap: It looks like you're calling .item() on a Tensor. We don't support that"))
        'calling .item(), which gives one Python number for several chains'
        >>> what_failed(RuntimeError("vmap: It looks like you're either (1) calling .item() on a Tensor or (2) else"))
        'calling .item(), or an if on a tensor, for which chains have one value each'
        >>> what_failed(RuntimeError("vmap: no rule. If it is inside of PyTorch, please file a bug report."))
        'RuntimeError: vmap: no rule'
    """
    line = str(error).splitlines()[0] if str(error) else ""
    meant = next((words for mark, words in _MEANT if mark in line), None)
    if meant is not None:
        return meant
    found = _PLEA.search(line)
    return f"{type(error).__name__}: {line[: found.start()] if found else line}"
