"""Buffers and weights that do not move, where a step writes to them: running statistics, averages of weights.

Found by looking at all of them before and after one call, and put back before every other; attributes in Python are
:mod:`~lightning_slt.sampling.step_state`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn


class StepTensors:
    """What a step writes to, as it was.

    Args:
        module: whose step it is; None for nothing written to.
        values: by owner and name.
    """

    def __init__(
        self, module: Optional[nn.Module] = None, values: Sequence[tuple[nn.Module, str, Tensor]] = ()
    ) -> None:
        self._module, self._values = module, list(values)

    def __bool__(self) -> bool:
        return bool(self._values)

    @property
    def names(self) -> list[str]:
        """What is put back."""
        return sorted({name for _, name, _ in self._values})

    def put_back(self, module: nn.Module) -> None:
        """Make all of it what it was, before a call of ``module``; nothing for another copy than that looked at."""
        if module is not self._module or not self._values:
            return
        with torch.no_grad():
            for owner, name, value in self._values:
                if name in owner._buffers:
                    owner._buffers[name] = value.clone()
                else:
                    owner._parameters[name].copy_(value)  # type: ignore[union-attr]


class TensorLook:
    """A module's buffers and frozen weights before a call.

    Args:
        module: a private copy.
        moving: its weights that move.
    """

    def __init__(self, module: nn.Module, moving: Sequence[nn.Parameter]) -> None:
        numbers = {id(p) for p in moving}
        self._module = module
        self._buffers = [
            (owner, name, buffer, buffer._version, buffer.detach().clone())
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        # no copies of these: they may be most of the model, and are hardly ever written to
        self._frozen = [(name, p, fingerprint(p)) for name, p in module.named_parameters() if id(p) not in numbers]

    def written(self, given: Callable[[str], Tensor]) -> StepTensors:
        """What has been written to since.

        Args:
            given: a frozen weight as it was, by its name.
        """
        values = [
            (owner, name, value)
            for owner, name, buffer, version, value in self._buffers
            if owner._buffers.get(name) is not buffer or buffer._version != version
        ]
        for name, parameter, before in self._frozen:
            if fingerprint(parameter) != before:
                path, _, last = name.rpartition(".")
                values.append((self._module.get_submodule(path), last, given(name).to(parameter)))
        return StepTensors(self._module, values)


def fingerprint(parameter: Tensor) -> tuple[Any, ...]:
    """What changes where a weight is written to, through ``.data`` too, which leaves its version as it was."""
    try:
        # of a shard what is here
        local = getattr(parameter, "_local_tensor", parameter).detach()
        total = float(local.sum(dtype=torch.float64))
    except (RuntimeError, TypeError):  # a dtype that cannot be added up
        return parameter._version, 0, 0.0
    return parameter._version, local.data_ptr(), total if total == total else math.inf
