"""Which of all the weights are on this rank: all of them, or the shards of a model that is spread over several.

Chains move a flat vector. Where a model is sharded, each rank holds a part of that vector and moves it as if it were
the whole; what must not depend on the cut are sums over the weights and the noise.

**Sums** run over this rank's part and then over the ranks. A weight that several ranks hold counts once in total.

**Noise** of the whole vector comes from one stream a chain, in blocks of fixed size; each rank draws all the blocks one
after another and keeps what is its own. A chain then meets the same noise on any number of shards, and the very noise
that it meets when the model is not sharded, while no more than one block is ever held beyond the shard. The price is
time: each rank draws d numbers a step and not d / ranks, about two nanoseconds a number on a CPU core, against the
several hundred operations a weight that a forward and a backward pass of a minibatch take. A counter-based generator
(a number from its position) would not draw what it does not keep, but written in tensor operations it takes some
hundred passes over the shard, and what hardware offers ties the numbers to the shape of the launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

from lightning_slt.sampling.noise import WINDOW, NormalStream

BLOCK = {"cpu": WINDOW, "cuda": 2**24}
"""Weights that are moved together: their noise needs no buffer of the size of the model, and stays in the cache."""


class Layout:
    """All the weights are here.

    Args:
        num_weights: d.

    Attributes:
        num_weights: d, over all ranks.
        sharded: this rank has a part of them.
    """

    sharded = False

    def __init__(self, num_weights: int) -> None:
        self.num_weights = num_weights

    def blocks(self, size: int) -> list[tuple[slice, float]]:
        """This rank's vector in pieces of at most ``size``, each with the share that it has in sums: 1 where no other
        rank holds these weights, 1/k where k ranks do."""
        d = self.num_weights
        return [(slice(start, min(start + size, d)), 1.0) for start in range(0, d, size)]

    def normal_(self, out: Tensor, stream: NormalStream) -> None:
        """Fill this rank's vector with standard normal numbers of a stream.

        Args:
            out: ``[own d]``, contiguous.
        """
        size = BLOCK.get(out.device.type, 2**24)
        for start in range(0, len(out), size):
            stream.fill_(out[start : start + size])

    def sum(self, values: Tensor) -> Tensor:
        """Sums over this rank's weights, added over the ranks; on the device that they came from."""
        return values

    def dot(self, a: Tensor, b: Tensor) -> float:
        """The inner product of two vectors ``[own d]``, over all the weights."""
        return float(torch.dot(a, b))

    def norm(self, vector: Tensor) -> float:
        """Of a vector ``[own d]``, over all the weights."""
        return float(vector.norm())

    def total(self, vector: Tensor) -> float:
        """The sum of a vector ``[own d]``, over all the weights."""
        return float(vector.double().sum())

    def all_finite(self, values: Tensor) -> bool:
        """Whether every number is finite, on all ranks."""
        return _is_finite(values)


@dataclass(frozen=True, eq=False)
class Piece:
    """A rank's part of one parameter.

    Attributes:
        place: where its elements are in the flat vector of all the weights, in their order here, which is ascending: a
            range, or ``[size]`` long.
        size: elements here.
        share: one over the number of ranks that hold each of them.
    """

    place: Union[range, Tensor]
    size: int
    share: float


class ShardLayout(Layout):
    """A part of the weights is here.

    Args:
        pieces: in the order of this rank's vector.
        num_weights: d, over all ranks.
        add: adds a tensor on the CPU over the ranks.
    """

    sharded = True

    def __init__(self, pieces: Sequence[Piece], num_weights: int, add: Callable[[Tensor], Tensor]) -> None:
        super().__init__(num_weights)
        self.pieces = list(pieces)
        self.size = sum(piece.size for piece in pieces)
        self._add = add
        self._plans: dict[torch.device, list[list[tuple[Union[slice, Tensor], slice]]]] = {}

    def blocks(self, size: int) -> list[tuple[slice, float]]:
        regions: list[tuple[int, int, float]] = []
        start = 0
        for piece in self.pieces:
            if regions and regions[-1][2] == piece.share:
                regions[-1] = (regions[-1][0], start + piece.size, piece.share)
            else:
                regions.append((start, start + piece.size, piece.share))
            start += piece.size
        cut = [
            (slice(at, min(at + size, stop)), share)
            for start, stop, share in regions
            for at in range(start, stop, size)
        ]
        return cut or [(slice(0, 0), 1.0)]  # a rank with no weights takes part in every sum

    def normal_(self, out: Tensor, stream: NormalStream) -> None:
        size = BLOCK.get(out.device.type, 2**24)
        if out.device not in self._plans:
            self._plans[out.device] = self._plan(size, out.device)
        buffer = out.new_empty(min(size, self.num_weights))
        for number, copies in enumerate(self._plans[out.device]):
            # drawn also where nothing of it is kept: the stream must go on at the same place on every rank
            block = stream.fill_(buffer[: min(size, self.num_weights - number * size)])
            for source, target in copies:
                out[target] = block[source]

    def _plan(self, size: int, device: torch.device) -> list[list[tuple[Union[slice, Tensor], slice]]]:
        """For each block of the whole vector, which of it goes where in this rank's."""
        plan: list[list[tuple[Union[slice, Tensor], slice]]] = [[] for _ in range(0, self.num_weights, size)]
        offset = 0
        for piece in self.pieces:
            if piece.size:
                first, last = int(piece.place[0]), int(piece.place[-1])
                for number in range(first // size, last // size + 1):
                    start, stop = number * size, (number + 1) * size
                    if isinstance(piece.place, range):
                        a, b = max(start, first) - first, min(stop, last + 1) - first
                        source: Union[slice, Tensor] = slice(first + a - start, first + b - start)
                    else:
                        ends = torch.searchsorted(piece.place, torch.tensor([start, stop], device="cpu"))
                        a, b = int(ends[0]), int(ends[1])
                        source = (piece.place[a:b] - start).to(device)
                    plan[number].append((source, slice(offset + a, offset + b)))
            offset += piece.size
        return plan

    def sum(self, values: Tensor) -> Tensor:
        return self._add(values.detach().double().cpu()).to(values)

    def dot(self, a: Tensor, b: Tensor) -> float:
        # in double precision: the cut must not show in the result
        parts = [share * torch.dot(a[block].double(), b[block].double()) for block, share in self.blocks(BLOCK["cuda"])]
        return float(self._add(torch.stack(parts).sum().cpu()))

    def norm(self, vector: Tensor) -> float:
        return math.sqrt(self.dot(vector, vector))

    def total(self, vector: Tensor) -> float:
        parts = [share * vector[block].double().sum() for block, share in self.blocks(BLOCK["cuda"])]
        return float(self._add(torch.stack(parts).sum().cpu()))

    def all_finite(self, values: Tensor) -> bool:
        return (
            float(self._add(torch.tensor(0.0 if _is_finite(values) else 1.0, dtype=torch.float64, device="cpu"))) == 0.0
        )


def _is_finite(values: Tensor) -> bool:
    """Block by block: ``torch.isfinite`` makes almost two more vectors of the size of what it is given."""
    blocks = values.reshape(-1).split(BLOCK.get(values.device.type, 2**24))
    return all(bool(torch.isfinite(block).all()) for block in blocks)
