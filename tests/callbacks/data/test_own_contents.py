"""What a DataModule holds is the chains' own where its hooks may change it, and large data is not copied."""

from __future__ import annotations

import enum
import functools
import threading
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric

from lightning_slt.callbacks.data.hooks import DataHooks
from lightning_slt.callbacks.data.own_contents import MAX_COPIED, MAX_COPIED_BYTES

Pair = namedtuple("Pair", "a b")


class Kind(enum.Enum):
    ONE = 1


class Slots:
    __slots__ = ("later", "numbers")

    def __init__(self) -> None:
        self.numbers = np.zeros(2)


class Held:
    def __init__(self) -> None:
        self.count, self.lock, self.rows = 0, threading.Lock(), [np.zeros(2)]


class Closes(Held):
    """Such as a reader with a file."""

    def close(self) -> None:
        pass


class Hooked(LightningDataModule):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        vars(self).update(attributes)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def add_one(value: Any) -> None:
    value += 1


CHANGES = {
    "tensor": (lambda: torch.zeros(3), add_one, lambda v: v.tolist()),
    "its data": (lambda: torch.zeros(3), lambda v: v.data.add_(1), lambda v: v.tolist()),
    "a large tensor": (lambda: torch.zeros(2**20), add_one, lambda v: float(v.sum())),
    "parameter": (lambda: nn.Parameter(torch.ones(2)), lambda v: v.data.add_(1), lambda v: v.tolist()),
    "with a graph": (lambda: torch.ones(2, requires_grad=True) * 2, lambda v: v.data.add_(1), lambda v: v.tolist()),
    "array": (lambda: np.zeros(3), add_one, lambda v: v.tolist()),
    "bytes": (lambda: bytearray(b"ab"), lambda v: v.extend(b"c"), bytes),
    "BatchNorm": (lambda: nn.BatchNorm1d(2), lambda v: v(torch.ones(4, 2)), lambda v: v.running_mean.tolist()),
    "its attributes": (lambda: nn.Linear(1, 1), lambda v: setattr(v, "new", 1), lambda v: hasattr(v, "new")),
    "metric": (MeanMetric, lambda v: v.update(torch.tensor(3.0)), lambda v: (v._update_count, float(v.mean_value))),
    "object": (Held, lambda v: setattr(v, "count", v.count + 1), lambda v: v.count),
    "in an object": (Held, lambda v: add_one(v.rows[0]), lambda v: v.rows[0].tolist()),
    "in slots": (Slots, lambda v: add_one(v.numbers), lambda v: v.numbers.tolist()),
    "a new slot": (Slots, lambda v: setattr(v, "later", 1), lambda v: hasattr(v, "later")),
    "nested dict": (lambda: {"a": {"k": np.zeros(1)}}, lambda v: add_one(v["a"]["k"]), lambda v: v["a"]["k"].tolist()),
    "named tuple": (lambda: Pair(0, [np.zeros(1)]), lambda v: add_one(v.b[0]), lambda v: v.b[0].tolist()),
    "counter": (lambda: Counter("ab"), lambda v: v.update("a"), dict),
    "ordered": (lambda: OrderedDict(a=[1]), lambda v: v["a"].append(2), dict),
    "default": (lambda: defaultdict(list), lambda v: v["a"].append(2), dict),
    "deque": (lambda: deque([[1]], maxlen=2), lambda v: (v[0].append(2), v.append(3)), list),
    "partial": (
        lambda: functools.partial(torch.add, torch.zeros(2), out=torch.zeros(2)),
        lambda v: v(torch.ones(2)),
        lambda v: v.keywords["out"].tolist(),
    ),
    "method": (lambda: nn.BatchNorm1d(2).forward, lambda v: v(torch.ones(4, 2)), lambda v: v.__self__.running_mean[0]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_hooks_change_in_place_is_their_own_and_put_back_for_each_minibatch(case: str) -> None:
    make, change, shown = CHANGES[case]
    live = Hooked(held=make())
    hooks, before = DataHooks(live), shown(live.held)
    for _ in range(2):
        twin = hooks.for_a_batch()
        assert shown(twin.held) == before
        change(twin.held)
        assert shown(twin.held) != before and shown(live.held) == before
    assert hooks.changed() == []


def test_it_is_training_s_as_of_now() -> None:
    live = Hooked(mean=torch.zeros(2), norm=nn.BatchNorm1d(2))
    for step in range(1, 4):
        live.mean += 1
        live.norm(torch.ones(4, 2))
        twin = DataHooks(live).for_a_batch()
        assert twin.mean.tolist() == [step, step] and twin.norm.num_batches_tracked == step


def test_what_is_there_twice_is_one_thing_there_as_well() -> None:
    """A list with a module of the DataModule, its bound method, a part of a tensor, the DataModule itself."""
    norm, base, key = nn.BatchNorm1d(2), torch.zeros(4), Held()
    live = Hooked(norm=norm, steps=[norm, norm.forward], base=base, part=base[1:3], key=key, of={key: [1]})
    live.me, live.hook = live, live.on_after_batch_transfer
    twin = DataHooks(live).for_a_batch()
    assert twin.norm is twin.steps[0] is twin.steps[1].__self__ is not norm
    assert twin.me is twin.hook.__self__ is twin and twin.of[twin.key] == [1]
    twin.base += 1
    assert twin.part.tolist() == [1, 1] and float(base.sum()) == 0


def test_generators_inside_others_draw_for_the_chains_alone() -> None:
    live = Hooked(held={"a": [torch.Generator().manual_seed(1), np.random.default_rng(1)]})
    hooks, drawn = DataHooks(live), []
    for _ in range(3):
        first, second = hooks.for_a_batch().held["a"]
        drawn += [float(torch.rand((), generator=first)), second.random()]
    assert len(set(drawn)) == 6
    untouched = float(torch.rand((), generator=torch.Generator().manual_seed(1))), np.random.default_rng(1).random()
    assert (float(torch.rand((), generator=live.held["a"][0])), live.held["a"][1].random()) == untouched


LARGE = MAX_COPIED_BYTES // 4


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.zeros(LARGE + 1), id="tensor"),
        pytest.param(lambda: np.zeros(LARGE + 1, dtype=np.float32), id="array"),
        pytest.param(lambda: TensorDataset(torch.zeros(2)), id="dataset"),
        pytest.param(Closes, id="open"),
        pytest.param(threading.Lock, id="lock"),
        pytest.param(lambda: Kind.ONE, id="enum"),
        pytest.param(lambda: np.broadcast_to(np.zeros(1), 3), id="read only"),
        pytest.param(lambda: torch.eye(2).to_sparse(), id="sparse"),
    ],
)
def test_large_data_and_what_is_there_once_are_shared(make: Any) -> None:
    live = Hooked(held=make(), inside=[make()])
    twin = DataHooks(live).for_a_batch()
    assert twin.held is live.held and twin.inside[0] is live.inside[0] and twin.inside is not live.inside


def test_the_smallest_are_copied_first_up_to_a_limit() -> None:
    live = Hooked(held=[torch.zeros(LARGE // 2 + 1), torch.zeros(LARGE // 4), torch.zeros(LARGE // 4)])
    twin = DataHooks(live).for_a_batch()
    assert [a is b for a, b in zip(live.held, twin.held, strict=True)] == [True, False, False]


def test_the_members_of_a_long_list_are_shared() -> None:
    live = Hooked(held={"a": [torch.zeros(1) for _ in range(MAX_COPIED)]}, other=torch.zeros(1))
    twin = DataHooks(live).for_a_batch()
    assert twin.held["a"] is not live.held["a"] and all(map(lambda a, b: a is b, twin.held["a"], live.held["a"]))
    assert twin.other is not live.other


class Refuses(Held):
    """Makes a copy of what holds it fail half way."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(1, 1)
        self.module.refuses = NoCopy()


class NoCopy(nn.Module):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copy")


def test_what_cannot_be_copied_is_shared_and_the_rest_is_not() -> None:
    live = Hooked(held=Refuses(), other=torch.zeros(1))
    twin = DataHooks(live).for_a_batch()
    assert twin.held is not live.held and twin.held.module is live.held.module
    assert twin.held.rows[0] is not live.held.rows[0] and twin.other is not live.other


@pytest.mark.parametrize(
    ("make", "change"),
    [
        pytest.param(lambda: torch.zeros(LARGE + 1), add_one, id="tensor"),
        pytest.param(lambda: np.zeros(LARGE + 1), lambda v: v.__setitem__(7, 1), id="one number"),
        pytest.param(lambda: [[torch.zeros(1)] * MAX_COPIED, [0] * 20_000], lambda v: v[1].append(1), id="nested list"),
        pytest.param(Closes, lambda v: setattr(v, "count", 1), id="open"),
        pytest.param(lambda: torch.jit.script(nn.BatchNorm1d(2)), lambda v: v(torch.ones(4, 2)), id="scripted"),
    ],
)
def test_it_is_seen_where_hooks_change_what_is_shared(make: Any, change: Any) -> None:
    hooks = DataHooks(Hooked(held=make(), other=torch.zeros(LARGE + 1)), told=True)
    twin = hooks.for_a_batch()
    assert hooks.changed() == []
    change(twin.held)
    assert hooks.changed() == ["held"]
