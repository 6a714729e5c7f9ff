"""Shards of a model: which weights a rank has, sums over all of them, and noise that does not depend on the cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_slt.sampling.layout import BLOCK, Layout, Piece, ShardLayout
from lightning_slt.sampling.noise import TableNormal
from lightning_slt.sampling.sharded import piece_of

SHAPES = ((700, 150), (150,), (3, 50, 7), (), (5,))
"""106,206 weights: more than are drawn at once."""


class Mesh:
    """What is asked of a device mesh, seen from one rank."""

    def __init__(self, shape: tuple[int, ...], rank: int) -> None:
        self.shape = shape
        self._rank = rank

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def get_coordinate(self) -> list[int]:
        return [int(i) for i in torch.unravel_index(torch.tensor(self._rank), self.shape)]


class Distributed(torch.Tensor):
    """A tensor of a given shape of which a rank has a part."""

    @staticmethod
    def of(whole: Tensor, local: Tensor, mesh: Mesh, placements: tuple[object, ...]) -> Distributed:
        made = whole.clone().as_subclass(Distributed)
        made._local_tensor, made.device_mesh, made.placements = local, mesh, placements  # type: ignore[attr-defined]
        made.to_local = lambda: local  # type: ignore[attr-defined]
        return made


def part_of(whole: Tensor, mesh: Mesh, placements: tuple[object, ...]) -> Tensor:
    """As ``distribute_tensor`` cuts: dimension by dimension of the mesh, from the left."""
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = whole.chunk(mesh.size(dim), dim=placement.dim)
            place = mesh.get_coordinate()[dim]
            whole = parts[place] if place < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


def layouts(mesh_shape: tuple[int, ...], placements: tuple[object, ...], whole: Tensor) -> list[tuple[Layout, Tensor]]:
    """For each rank of a mesh, its layout and its part of a flat vector; scalars are on every rank."""
    world = math.prod(mesh_shape)
    made = []
    for rank in range(world):
        pieces, own, start = [], [], 0
        for shape in SHAPES:
            size = math.prod(shape)
            tensor = whole[start : start + size].reshape(shape)
            if all(not isinstance(p, Shard) or p.dim < len(shape) for p in placements):
                mesh = Mesh(mesh_shape, rank)
                local = part_of(tensor, mesh, placements)
                pieces.append(piece_of(Distributed.of(tensor, local, mesh, placements), start, world))
            else:
                local = tensor
                pieces.append(piece_of(tensor, start, world))
            own.append(local.reshape(-1))
            start += size
        made.append((ShardLayout(pieces, len(whole), lambda values: values), torch.cat(own)))
    return made


CUTS = {
    "rows over two": ((2,), (Shard(0),)),
    "rows over six, more than some have": ((6,), (Shard(0),)),
    "columns": ((4,), (Shard(1),)),
    "copies of shards": ((2, 3), (Replicate(), Shard(0))),
    "rows and columns": ((2, 2), (Shard(0), Shard(1))),
    "rows of rows": ((2, 2), (Shard(0), Shard(0))),
}


@pytest.mark.parametrize(("mesh", "placements"), CUTS.values(), ids=CUTS)
def test_noise_is_that_of_the_whole_whatever_the_cut(mesh: tuple[int, ...], placements: tuple[object, ...]) -> None:
    """Two steps of a stream, to the last bit."""
    d = sum(math.prod(shape) for shape in SHAPES)
    assert d > BLOCK["cpu"]
    expected = torch.empty(2, d)
    stream = TableNormal(0)
    for row in expected:
        Layout(d).normal_(row, stream)
    numbers = layouts(mesh, placements, torch.arange(d, dtype=torch.float64))
    for layout, own in numbers:
        stream = TableNormal(0)
        for row in expected:
            noise = torch.empty(len(own))
            layout.normal_(noise, stream)
            assert torch.equal(noise, row[own.long()])


@pytest.mark.parametrize(("mesh", "placements"), CUTS.values(), ids=CUTS)
def test_sums_count_each_weight_once(mesh: tuple[int, ...], placements: tuple[object, ...]) -> None:
    d = sum(math.prod(shape) for shape in SHAPES)
    whole = torch.randn(d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = layouts(mesh, placements, whole)
    assert sum(layout.total(own) for layout, own in made) == pytest.approx(float(whole.sum()), rel=1e-12)
    assert sum(layout.dot(own, own) for layout, own in made) == pytest.approx(float(whole @ whole), rel=1e-12)
    for layout, own in made:
        blocks = layout.blocks(1000)
        assert [i for block, _ in blocks for i in range(block.start, block.stop)] == list(range(len(own)))
        assert max(block.stop - block.start for block, _ in blocks) <= 1000


def test_a_rank_without_any_weights_takes_part_in_sums_and_noise() -> None:
    layout = ShardLayout([Piece(range(0, 0), 0, 1.0)], 100, lambda values: values)
    empty, stream = torch.empty(0), TableNormal(0)
    layout.normal_(empty, stream)
    assert layout.total(empty) == layout.dot(empty, empty) == 0.0
    assert layout.blocks(10) == [(slice(0, 0), 1.0)]
    moved = TableNormal(0)
    moved.fill_(torch.empty(100))
    assert torch.equal(stream.fill_(torch.empty(8)), moved.fill_(torch.empty(8)))


def test_an_unsharded_vector_is_drawn_from_the_same_stream_as_in_one_draw() -> None:
    """In blocks that stay in the cache: on the CPU the numbers are those of one call."""
    d = 2 * BLOCK["cpu"] + 1600
    blocks, once = torch.empty(d), TableNormal(0).fill_(torch.empty(d))
    Layout(d).normal_(blocks, TableNormal(0))
    assert torch.equal(blocks, once)


def test_a_placement_that_is_not_understood_is_named() -> None:
    tensor = torch.zeros(4, 4)
    partial = Distributed.of(tensor, tensor, Mesh((2,), 0), (Partial(),))
    with pytest.raises(ValueError, match=r"Partial.*restrict="):
        piece_of(partial, 0, 2)


@pytest.mark.parametrize("rank", range(6))
def test_rows_of_rows_that_were_cut_from_the_right_are_where_they_were(rank: int) -> None:
    """As FSDP2 cuts what tensor parallelism has cut before: first over the three ranks of the right dimension."""
    whole, mesh = torch.arange(60).reshape(12, 5), Mesh((2, 3), rank)
    left, right = mesh.get_coordinate()
    local = whole.chunk(3)[right].chunk(2)[left]
    placements = (_StridedShard(0, split_factor=3), Shard(0))
    piece = piece_of(Distributed.of(whole, local, mesh, placements), 100, 6)
    assert [int(i) for i in piece.place] == (local.flatten() + 100).tolist()
    assert (piece.size, piece.share) == (10, 1.0)


def test_a_rank_that_is_not_where_its_placement_says_is_refused() -> None:
    """A part of another shape, and a rank that is no part of the mesh."""
    tensor = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"has \(3, 4\) here and not \(2, 4\).*Use restrict="):
        piece_of(Distributed.of(tensor, tensor[:3], Mesh((2,), 0), (Shard(0),)), 0, 2)
    outside = Mesh((2,), 0)
    outside.get_coordinate = lambda: None  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(ValueError, match="which chains do not know: use restrict="):
        piece_of(Distributed.of(tensor, tensor[:2], outside, (Shard(0),)), 0, 2)
