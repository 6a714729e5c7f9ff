"""Rows of batches of several loaders: a loader that has ended gives None for its share of the epoch."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
from torch.utils._pytree import tree_flatten
from torch.utils.data import TensorDataset

from lightning_slt.callbacks.data import combined as module
from lightning_slt.callbacks.data.combined import Combined, batches_of_epoch
from lightning_slt.callbacks.data.training import LoaderPart, SourcePlan

LARGE = 2**20


def combined(
    sizes: tuple[int, int],
    ends: Optional[tuple[int, int]],
    batch_size: int = 4,
    max_bytes: tuple[int, int] = (LARGE,) * 2,
    shortest: bool = False,
    transfer: Callable[[Any], Any] = lambda batch: batch,
) -> Combined:
    """Loaders ``a`` and ``b`` over the numbers below ``sizes``, whose epoch has ``ends`` batches of each."""
    parts = tuple(
        LoaderPart(TensorDataset(torch.arange(n)), batch_size, None, None, 1, None, most, None)
        for n, most in zip(sizes, max_bytes, strict=True)
    )
    source = SourcePlan(parts, tree_flatten({"a": 0, "b": 0})[1], max(sizes), shortest, ends).build(transfer)
    assert isinstance(source, Combined)
    return source


def present(source: Combined, index: int = 0) -> list[bool]:
    return [row["b"] is not None for row in source.window(index).batches]


def uses(source: Combined, name: str, windows: int = 1) -> Counter[int]:
    rows: list[Any] = [row for index in range(windows) for row in source.window(index).batches]
    return Counter(i for row in rows if row[name] is not None for i in row[name][0].tolist())


def test_a_window_of_one_epoch_is_the_epoch() -> None:
    source = combined((24, 8), (6, 2))
    assert present(source) == [True, True, False, False, False, False]
    assert uses(source, "a") == Counter(range(24)) and uses(source, "b") == Counter(range(8))


@pytest.mark.parametrize(
    ("sizes", "ends", "batch_size"),
    [
        ((26, 10), (7, 3), 4),
        ((24, 8), (6, 2), 5),
        ((24, 8), (6, 2), 24),
        ((24, 24), (4, 2), 4),
        ((400, 4), (100, 1), 100),
    ],
    ids=["a smaller last batch", "chains of other batches", "all at once", "an epoch cut short", "a small share"],
)
def test_the_share_without_a_batch_is_that_of_training(
    sizes: tuple[int, int], ends: tuple[int, int], batch_size: int
) -> None:
    source = combined(sizes, ends, batch_size)
    there = present(source)
    assert source.resident and len(there) % ends[0] == 0
    assert sum(there) * ends[0] == ends[1] * len(there)
    assert set(uses(source, "a")) == set(range(sizes[0])) and set(uses(source, "b")) == set(range(sizes[1]))
    # there is one window only, whichever is asked for first
    assert [present(combined(sizes, ends, batch_size), 3)] == [there]


@pytest.mark.parametrize("held", [(10 * 32, LARGE), (10 * 32, 32)], ids=["the short one is held", "none is held"])
def test_windows_of_less_than_an_epoch_keep_the_share(held: tuple[int, int]) -> None:
    """Windows of 10 of an epoch's 100 batches, of which 25 have the second loader: 2 or 3 in each."""
    source = combined((400, 100), (100, 25), max_bytes=held)
    there = [present(source, index) for index in range(40)]
    assert not source.resident and {len(rows) for rows in there} == {10}
    assert {sum(rows) for rows in there} == {2, 3}
    assert sum(sum(rows) for rows in there) == pytest.approx(100, abs=2)
    used = uses(source, "a", 40)
    counts = torch.tensor([used[i] for i in range(400)]).double()
    assert float(counts.sum()) == 1600  # 4 of each
    # batches are draws by themselves: a variance of 4, and five standard deviations of that of 400 numbers each way
    assert abs(float(counts.var()) / 4 - 1) < 5 * (2 / 400) ** 0.5
    if held[1] == LARGE:
        short = uses(source, "b", 40)
        assert max(short.values()) <= 6 and len(short) == 100


@pytest.mark.parametrize(
    ("sizes", "ends", "batch_size", "fits", "rows"),
    [((400, 100), (100, 25), 40, 100, (100, 10)), ((24, 24), (4, 2), 4, 8, (8, 4))],
    ids=["one epoch", "two epochs of three"],
)
@pytest.mark.parametrize("of", ["batches", "bytes"])
def test_as_many_whole_epochs_are_held_as_fit(
    sizes: tuple[int, int],
    ends: tuple[int, int],
    batch_size: int,
    fits: int,
    rows: tuple[int, int],
    of: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row has a batch of each loader, of 8 bytes a sample. Where not one epoch fits, rows are from all over it."""
    limit, each = ("MAX_RESIDENT_BYTES", 16 * batch_size) if of == "bytes" else ("MAX_RESIDENT_BATCHES", 1)
    for most, expected in zip((fits * each, fits * each - 1), rows, strict=True):
        monkeypatch.setattr(module, limit, most)
        there = present(combined(sizes, ends, batch_size))
        assert len(there) == expected
        assert abs(sum(there) * ends[0] - ends[1] * expected) < ends[0]
        # there is one window only, whichever is asked for first
        assert [present(combined(sizes, ends, batch_size), index) for index in (1, 2)] == [there] * 2


@pytest.mark.parametrize("ends", [None, (100, 25)])
@pytest.mark.parametrize("held", [LARGE, 10 * 32])
def test_a_window_is_kept_until_another_is_asked_for_and_is_gone_then(
    held: int, ends: Optional[tuple[int, int]]
) -> None:
    """With what is known of its minibatches; it does not stand beside the next one's batches."""
    seen: list[bool] = []
    source = combined((400, 100), ends, max_bytes=(held, held), transfer=lambda batch: seen.append(old() is None))
    old: Callable[[], Any] = lambda: None  # noqa: E731
    first = source.window(3)
    assert source.window(3) is first and (source.window(4) is first) is source.resident is (held == LARGE)
    first = source.window(4)
    assert source.window(4) is first
    if not source.resident:
        old = weakref.ref(first)
        del first
        seen.clear()
        source.window(5)
        assert seen == [True] * 10


def test_the_shortest_loader_ends_the_rows_where_it_ends_the_epoch() -> None:
    source = combined((24, 8), None, shortest=True)
    assert present(source) == [True] * 2 and len(uses(source, "a")) == 8 and len(uses(source, "b")) == 8


def test_a_loader_that_starts_again_is_always_there() -> None:
    source = combined((24, 8), None)
    assert present(source) == [True] * 6
    assert set(uses(source, "b").values()) == {3}


def test_a_minibatch_of_several_loaders_has_the_samples_of_all() -> None:
    assert combined((24, 8), (6, 2)).batch_size == 8


def test_an_epoch_of_training_that_is_cut_short_ends_for_every_loader() -> None:
    def ends(*lengths: int, batches: float = float("inf"), fast: bool = False) -> Optional[tuple[int, ...]]:
        loaders: list[Any] = [range(length) for length in lengths]
        return batches_of_epoch(loaders, SimpleNamespace(num_training_batches=batches, fast_dev_run=fast))  # type: ignore[arg-type]

    assert ends(6, 2) == (6, 2) == ends(6, 2, batches=1, fast=True)
    assert ends(6, 2, batches=4) == (4, 2) and ends(6, 2, batches=2) is None and ends(6, 6) is None
    assert ends(6, 0) is None  # nothing of it at any place
