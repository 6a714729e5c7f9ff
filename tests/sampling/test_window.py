"""Minibatches that are held together: stacked for several chains, or alone."""

from __future__ import annotations

import re
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_slt.sampling.anchor import measure_anchor
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.window import Window
from tests.sampling.batching_models import Pair
from tests.sampling.helpers import numbered


def test_batches_that_lie_side_by_side_are_stacked_without_a_copy() -> None:
    window = DatasetSource(numbered(100), 10).window(0)
    columns, dims = window.gather(torch.tensor([3, 1]))
    stacked = window.whole(columns)
    assert dims == [0, 0]
    assert torch.equal(stacked[0], torch.stack([window[3][0], window[1][0]]))
    assert torch.equal(stacked[1], torch.stack([window[3][1], window[1][1]]))
    held = {batch[k].untyped_storage().data_ptr() for batch in window.batches for k in range(2)}
    assert len(held) == 2


@pytest.mark.parametrize(
    "batches",
    [
        [torch.arange(3.0), torch.arange(3.0)],
        list(torch.arange(12.0).view(4, 3).t().unsqueeze(1)),
        list(torch.arange(12.0).view(4, 3).flip(0))[::-1],
        list(torch.arange(12.0).view(4, 3))[::2],
        [torch.arange(3.0), torch.arange(3)],
    ],
    ids=["apart", "strided", "backwards", "gaps", "dtypes"],
)
def test_any_other_batches_are_stacked_as_torch_does(batches: list[Tensor]) -> None:
    (found,), _ = Window(batches).gather(torch.arange(len(batches)))
    assert torch.equal(found, torch.stack(batches))


class Items(Dataset[Any]):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        x, y = torch.full((3,), float(index)), index
        if self.kind == "dict":
            return {"x": x, "y": {"label": y, "name": "n"}}
        return (x, y) if self.kind == "tuple" else [x, y]


@pytest.mark.parametrize("kind", ["dict", "tuple", "list"])
def test_structures_of_batches_survive_and_stack(kind: str) -> None:
    window = DatasetSource(Items(kind), 4, num_workers=0).window(0)
    first = window[0]
    x, y = (first["x"], first["y"]["label"]) if kind == "dict" else first
    assert x.shape == (4, 3) and torch.equal(x[:, 0].long(), y)
    assert window.unlike == ""
    expected = [window[i] for i in (2, 0, 2)]
    columns, flat_dims = window.gather(torch.tensor([2, 0, 2]))
    stacked, dims = window.whole(columns), window.whole(flat_dims)
    sx, dx = (stacked["x"], dims["x"]) if kind == "dict" else (stacked[0], dims[0])
    ex = [e["x"] if kind == "dict" else e[0] for e in expected]
    assert dx == 0 and torch.equal(sx, torch.stack(ex))
    if kind == "dict":
        assert stacked["y"]["name"] == ["n"] * 4 and dims["y"]["name"] == [None] * 4
        assert torch.equal(window[1]["x"][:, 0].long(), window[1]["y"]["label"])


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ((torch.zeros(4, 2),), (torch.zeros(3, 2),), "differ in shape"),
        ((torch.zeros(4),), (torch.zeros(4, dtype=torch.long),), "differ in shape"),
        ({"x": torch.zeros(4)}, {"y": torch.zeros(4)}, "differ in structure"),
        ((torch.zeros(4), "a"), (torch.zeros(4), "b"), "other values beside their tensors"),
        (("a",), ("a",), "hold no tensor"),
        (*([torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])] for _ in range(2)), "hold nested tensors"),
        ((Pair(torch.zeros(4), torch.zeros(4)),) * 2 + (r"hold a Pair, .*torch\.export\.register_dataclass\(Pair\)",)),
    ],
)
def test_batches_that_do_not_stack(a: Any, b: Any, why: str) -> None:
    window = Window([a, b])
    assert re.search(why, window.unlike)


def test_nested_tensors_have_as_many_samples_as_parts() -> None:
    one, two = (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)] * k) for k in (1, 2))
    shares = Window([[one], [two], [two]]).shares
    assert shares is not None and torch.allclose(shares, torch.tensor([0.2, 0.4, 0.4], dtype=torch.float64))


def test_shares_are_those_of_the_samples_unless_batches_are_of_many_sizes() -> None:
    """What is left at the end of an epoch is smaller; of batches of about as many tokens few are alike."""

    def shares(*lengths: int) -> Optional[list[float]]:
        found = Window([(torch.zeros(length, 2),) for length in lengths]).shares
        return None if found is None else found.tolist()

    assert shares(4, 4, 4, 2) == pytest.approx([4 / 14, 4 / 14, 4 / 14, 2 / 14])
    assert shares(4, 4, 3, 2) == pytest.approx([4 / 13, 4 / 13, 3 / 13, 2 / 13])
    assert shares(4, 4, 4) is None and shares(4, 4, 3, 2, 1) is None


def test_a_batch_without_a_loss_at_some_weights_is_asked_again_at_others() -> None:
    def some(module: nn.Module, batch: Any) -> Any:
        return None if float(module.weight.detach().sum() * batch[0][0, 0]) < 0 else module(batch[0]).square().mean()

    weight = nn.Linear(1, 1, bias=False)
    nn.init.constant_(weight.weight, 1.0)
    window = Window([(torch.tensor([[1.0]]),), (torch.tensor([[-1.0]]),)])
    both = torch.tensor([[0, 1]])
    for value, kept in ((1.0, 0), (-1.0, 1)):
        nn.init.constant_(weight.weight, value)
        objective = Objective(weight, some)
        objective.adapt(window[kept])
        window.forget()
        with objective.active():
            assert measure_anchor(objective, window, both).tolist() == [[kept, kept]]
        assert set(window.anchor_loss) == {kept} and window.without_loss == {1 - kept}


def test_batches_without_a_loss_have_different_ones_in_their_place() -> None:
    def some(module: nn.Module, batch: Any) -> Any:
        return None if int(batch[0][0, 0]) % 2 else module(batch[0]).square().mean()

    window = Window([(torch.full((1, 1), float(k)),) for k in range(6)])
    objective = Objective(nn.Linear(1, 1, bias=False), some)
    objective.adapt(window[0])
    with objective.active():
        picked = measure_anchor(objective, window, torch.tensor([[0, 1, 2], [3, 4, 5]]))
    assert picked.tolist() == [[0, 2, 2], [0, 4, 4]] and window.without_loss == {1, 3, 5}
