"""Draws of chains that come in stretches, put one after another."""

from __future__ import annotations

import torch
from torch import Tensor


def joined(name: str, before: list[Tensor], new: Tensor) -> list[Tensor]:
    """The draws so far and those that are new, as the one tensor of a list state.

    Args:
        name: of the argument that ``new`` is.
        before: the state: empty, or ``[num_chains, draws, ...]``.
        new: ``[num_chains, draws, ...]``.

    Raises:
        ValueError: where they are of other chains or samples than those before.
    """
    for known in before:
        if (len(known), *known.shape[2:]) != (len(new), *new.shape[2:]):
            raise ValueError(
                f"{name} {tuple(new.shape)}: the draws before are {tuple(known.shape)}. Give all chains of this "
                "process at every update, with the same samples, or reset()."
            )
    return [torch.cat([*before, new], dim=1)]
