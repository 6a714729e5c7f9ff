"""What of the firings beside training is kept, and for how long: results, snapshots, and the data that they are of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_slt.callbacks.background.firings import BackgroundFirings
from lightning_slt.callbacks.background.pool import Result
from lightning_slt.callbacks.background.worker import data_path, kit_path, probes_path, result_path, snapshot_path
from lightning_slt.durable import save_tensors


class Still:
    """A pool without workers: what comes back is said by the test."""

    broken = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.pending, self.back, self.waited = folder, [], [], 0
        self.kept: Any = None

    def take(self) -> list[Result]:
        back, self.back = self.back, []
        self.pending = [step for step in self.pending if step not in {result.step for result in back}]
        return back

    def wait(self, seconds: float, enough: Any, progress: Any) -> Iterator[Result]:
        self.waited += 1
        yield from self.take()

    def close(self) -> None:
        pass

    def clear(self, keep: Any = ()) -> None:
        self.kept = keep


def firings(folder: Path, *out: int, **settings: Any) -> tuple[BackgroundFirings, Still]:
    """With snapshots of these steps out, and a file of a result for each."""
    beside, pool = BackgroundFirings(["cpu"], **settings), Still(folder)
    beside._folder, beside._pool = folder, pool  # type: ignore[assignment]
    beside._data_files._folder = folder
    for step in out:
        beside._notes[step] = {"step": step, "x": step - 1}
        pool.pending.append(step)
        finish(folder, step)
    return beside, pool


def finish(folder: Path, step: int, **state: Any) -> None:
    save_tensors(
        {"estimate": None, "influence": None, "course": None, "error": None, **state}, result_path(folder, step)
    )


def there(folder: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("_")[2]) for path in folder.glob("result_*.pt"))


def taken(beside: BackgroundFirings, pool: Still, *steps: int) -> list[Any]:
    pool.back = [Result(step) for step in steps]
    return [(late.result.step, dict(late.notes)) for late in beside.take()]


def test_a_result_that_a_checkpoint_waits_for_stays_until_the_one_after_the_next(tmp_path: Path) -> None:
    beside, pool = firings(tmp_path, 5, 8)
    assert [(n["step"], n["x"]) for n in beside.state_dict()] == [(5, 4), (8, 7)]
    assert taken(beside, pool, 5) == [(5, {"step": 5, "x": 4})] and beside.awaited == [8]
    assert there(tmp_path) == [5, 8]
    beside.state_dict()
    assert there(tmp_path) == [5, 8], "the checkpoint before may be the last whole one"
    assert taken(beside, pool, 8) == [(8, {"step": 8, "x": 7})]
    beside.state_dict()
    assert there(tmp_path) == [8]
    beside.state_dict()
    assert there(tmp_path) == []


def test_a_result_that_no_checkpoint_knows_of_goes_when_it_is_taken(tmp_path: Path) -> None:
    beside, pool = firings(tmp_path, 5, 8)
    taken(beside, pool, 5)
    assert there(tmp_path) == [8]


def test_a_resumed_run_keeps_what_its_checkpoint_waits_for(tmp_path: Path) -> None:
    before, _ = firings(tmp_path, 5)
    before._data_files.remember(5, 3)
    state = before.state_dict()
    assert state == [{"step": 5, "x": 4, "data": 3}]
    beside, pool = firings(tmp_path)
    beside.load_state_dict(state)
    assert beside.awaited == [5] and beside._data_files.number_of(5) == 3
    assert taken(beside, pool, 5) == [(5, {"step": 5, "x": 4})]
    assert there(tmp_path) == [5] and beside._data_files.number_of(5) is None
    beside.close(finished=True)
    assert pool.kept == [5]


@pytest.mark.parametrize("waits", [True, False])
def test_an_earlier_process_leaves_what_is_still_to_come(waits: bool, tmp_path: Path) -> None:
    beside, _ = firings(tmp_path)
    paths = [snapshot_path(tmp_path, 5), result_path(tmp_path, 5), probes_path(tmp_path), data_path(tmp_path, 3)]
    others = [snapshot_path(tmp_path, 8), result_path(tmp_path, 8), kit_path(tmp_path), data_path(tmp_path, 2)]
    for path in (*paths, *others):
        path.touch()
    if waits:
        beside.load_state_dict([{"step": 5, "data": 3}])
    beside._tidy(tmp_path)
    assert sorted(tmp_path.iterdir()) == (sorted(paths) if waits else [])


def test_what_was_out_is_taken_up_measured_again_or_lost(tmp_path: Path) -> None:
    """Known from the record, there as a result, an error with its snapshot, and nothing at all."""
    beside, _ = firings(tmp_path, 3, 5)
    finish(tmp_path, 8, error="its worker died")
    snapshot_path(tmp_path, 8).touch()
    beside._notes |= {step: {"step": step} for step in (8, 9)}
    late, lost = beside.recover({3})
    assert [(found.result.step, dict(found.notes)) for found in late] == [(5, {"step": 5, "x": 4})]
    assert lost == [9] and beside.awaited == [8] and beside.last_step == 8


def test_so_many_snapshots_may_be_out_and_no_more(tmp_path: Path) -> None:
    beside, pool = firings(tmp_path, 5, max_pending=2)
    assert not beside.full
    pool.pending.append(8)
    assert beside.full and list(beside.make_room(lambda steps: None)) == [] and pool.waited == 0
    waits, pool = firings(tmp_path, 5, 8, max_pending=2, when_full="wait")
    assert list(waits.make_room(lambda steps: None)) == [] and pool.waited == 1
    pool.back = [Result(5)]
    assert [late.result.step for late in waits.make_room(lambda steps: None)] == [5] and pool.waited == 1


def test_another_run_waits_for_nothing(tmp_path: Path) -> None:
    beside, _ = firings(tmp_path, 5)
    beside._data_files.remember(5, 3)
    beside.state_dict()
    beside.last_step = 5
    beside.forget()
    assert beside.state_dict() == [] and beside.last_step == -1 and beside._data_files.number_of(5) is None
