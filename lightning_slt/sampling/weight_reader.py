"""What is read off the weights of moving chains beside their losses, such as the losses of many samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_slt.sampling.samplers import SamplerState

MAX_WAITING = 16
MAX_WAITING_NUMBERS = 2**22
"""Rows of weights, and numbers in them, that are kept until a reader is asked about all of them."""

WeightReader = Callable[[Tensor, "Tensor | None"], Tensor]
"""``[chains, d]`` weights, and the gradients of the mean loss of the chains' minibatches there (None where they are
not known, or the reader has no true ``wants_gradients``), to ``[chains, n]`` numbers that are read off them, such as
the losses of n samples."""


class Readout:
    """What a reader makes of the weights of one chunk of chains.

    Several draws are read at once: a call costs more than the losses of a small model.

    Args:
        reader: asked; None for nothing to read.
        every: steps between two of its draws.
        before: steps of the same stretch that went before, on other windows: draws go on as if there were one.
    """

    def __init__(self, reader: WeightReader | None, every: int, before: int = 0) -> None:
        self._reader, self._every, self._before = reader, every, before
        self._waiting: list[tuple[Tensor, Tensor | None]] = []
        self._seen: list[Tensor] = []

    def offer(self, step: int, weights: Tensor, grad: Tensor | None, state: SamplerState) -> None:
        """The weights that a step begins with: kept, where they are to be read."""
        if self._reader is None or (self._before + step) % self._every:
            return
        here = _settled(weights, state)
        wanted = here is weights and getattr(self._reader, "wants_gradients", False)
        self._waiting.append((here.clone(), grad.clone() if wanted and grad is not None else None))
        count = len(self._waiting)
        if count * len(weights) >= MAX_WAITING or here.numel() * count > MAX_WAITING_NUMBERS:
            self._ask(self._reader)

    def table(self, steps: int, weights: Tensor) -> Tensor | None:
        """``[chains, reads of so many steps, n]``, NaN from where the chains have diverged; None without a reader."""
        if self._reader is None:
            return None
        self._ask(self._reader)
        seen, count = self._seen, num_reads(steps, self._every, self._before)
        if not seen:
            of_none = self._reader(weights[:0], weights[:0]).float().cpu()
            seen = [of_none.new_full((len(weights), *of_none.shape[1:]), torch.nan)]
        return torch.stack(seen + [torch.full_like(seen[0], torch.nan)] * (count - len(seen)), dim=1)[:, :count]

    def _ask(self, reader: WeightReader) -> None:
        if not self._waiting:
            return
        with torch.no_grad():
            slopes = [slope for _, slope in self._waiting if slope is not None]
            read = reader(
                torch.cat([weights for weights, _ in self._waiting]),
                torch.cat(slopes) if len(slopes) == len(self._waiting) else None,
            )
            self._seen += list(read.float().cpu().split(len(self._waiting[0][0])))
        self._waiting.clear()


def num_reads(steps: int, every: int, before: int = 0) -> int:
    """How many of so many steps are read, ``before`` of the same stretch having gone before them."""
    return len(range(-before % every, steps, every))


def join_reads(reader: WeightReader | None, parts: Sequence[Tensor], reads: int, weights: Tensor) -> Tensor | None:
    """The tables of a rank's chunks as one, ``[chains, reads, n]``; None without a reader.

    Of a rank without chains (``weights`` of no row) it has no row: it is joined with those of the others all the same.
    """
    if reader is None:
        return None
    if parts:
        return torch.cat(list(parts))
    return reader(weights, weights).float().cpu().unsqueeze(1).repeat(1, reads, 1)


def _settled(weights: Tensor, state: SamplerState) -> Tensor:
    """Where the chains are: not at a proposal that may be rejected."""
    if "accepted_weights" in state.tensors and bool(state.tensors["started"].all()):
        return state.tensors["accepted_weights"]
    return weights
