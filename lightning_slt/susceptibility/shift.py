"""What the data is shifted to: the samples of both sides, and their losses at the chains' weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.probe import Probe
from lightning_slt.sampling.rng import CHOICE, generator
from lightning_slt.sampling.samples import ALL_AT_ONCE, LARGE_BATCH, Samples, choose_samples

PARTS = 32
"""Random parts of such a subset: how the answers differ between them says what another subset would give."""
MAX_BASE = ALL_AT_ONCE
"""Samples of the original data whose loss is read at every draw; more are represented by two random subsets."""


@dataclass(frozen=True)
class Shift:
    """The samples that are read: those of the original data, and those it is shifted to.

    Attributes:
        observed, base: original samples behind the integrand and behind the loss difference. The same ones where all
            are read; else two disjoint random subsets, since one would have its own sampling error squared.
        shifted: samples of the shifted data.
        group: of each shifted sample, None where there are none.
    """

    observed: Samples
    base: Optional[Samples]
    shifted: Samples
    group: Optional[list[Optional[str]]] = None

    @staticmethod
    def of(source: DatasetSource, shifted: Samples, seed: int, group: Optional[list[Optional[str]]] = None) -> Shift:
        """With samples of the original data chosen from ``source``."""
        n = source.num_indexed
        chosen = choose_samples(n, MAX_BASE, seed)
        if n <= MAX_BASE:
            return Shift(Samples.of(source, chosen), None, shifted, group)
        # in order of position, which may carry meaning, every second one: two samples of the whole
        return Shift(Samples.of(source, chosen[::2]), Samples.of(source, chosen[1::2]), shifted, group)

    def groups_of(self, index: Tensor) -> Optional[list[Optional[str]]]:
        """The groups of shifted samples, None where there are none."""
        if self.group is None:
            return None
        group = dict(zip(self.shifted.index, self.group, strict=True))
        return [group[int(i)] for i in index]


class ShiftReader:
    """``[chains, d]`` weights to ``[chains, 2 + m + 2 k]``: mean losses of both original sets, losses of m samples, and
    those of the k parts of either subset.

    Attributes:
        parts: k; 0 where all the original data is read.
    """

    def __init__(
        self, objective: Objective, shift: Shift, seed: int, progress: Optional[Callable[[int], None]] = None
    ) -> None:
        def probe(samples: Samples) -> Probe:
            return Probe(objective, samples, seed=seed, progress=progress)

        self._observed = probe(shift.observed)
        self._base = probe(shift.base) if shift.base is not None else None
        self.shifted = probe(shift.shifted)
        self.parts = 0
        self._orders: list[Tensor] = []
        if self._base is not None:
            least = min(self._observed.n, self._base.n)
            self.parts = min(PARTS, least) if least > 1 else 0
            numbers = generator(seed, CHOICE)  # the order of the data may carry meaning
            self._orders = [
                torch.randperm(probe.n, generator=numbers, device="cpu") for probe in (self._observed, self._base)
            ]

    @property
    def slow(self) -> str:
        """What a user should know where losses are computed one by one; empty for other ways."""
        return self._observed.slow or self.shifted.slow

    def __call__(self, weights: Tensor, slopes: Optional[Tensor] = None) -> Tensor:
        observed = self._observed(weights).double()
        mean, shifted = observed.mean(dim=1, keepdim=True), self.shifted(weights).double()
        if self._base is None:
            return torch.cat([mean, mean, shifted], dim=1)
        base = self._base(weights).double()
        parts = [
            part.mean(dim=1, keepdim=True)
            for losses, order in zip((observed, base), self._orders, strict=True)
            for part in losses[:, order].tensor_split(max(self.parts, 1), dim=1)[: self.parts]
        ]
        return torch.cat([mean, base.mean(dim=1, keepdim=True), shifted, *parts], dim=1)


def chain_batch(n: int) -> int:
    """Minibatch of the chains: all the data where that is not much, for momentum keeps the minibatches' noise.

    Example:
        >>> chain_batch(100), chain_batch(50_000)
        (100, 512)
    """
    return max(n, 1) if n <= ALL_AT_ONCE else LARGE_BATCH
