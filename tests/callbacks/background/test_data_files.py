"""Files of training data: a snapshot that waits keeps the one that it is of, and no other file is kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import LightningDataModule

from lightning_slt.callbacks.background.data_files import DataFiles, RunData
from lightning_slt.callbacks.background.travel import CannotTravelError, read_pickled
from lightning_slt.callbacks.background.worker import data_path


def training(plan: Any, replays: bool = False) -> Any:
    return SimpleNamespace(replays=replays, plan=lambda: plan)


TRAINER: Any = SimpleNamespace(datamodule=None)


def there(folder: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("_")[2]) for path in folder.glob("data_*.pt"))


def test_a_file_stays_while_a_snapshot_of_it_waits(tmp_path: Path) -> None:
    files = DataFiles()
    files.open(tmp_path)
    assert files.stale
    for number, step in enumerate((5, 8)):
        files.write(TRAINER, training(f"data {number}"))
        assert not files.stale and files.give(step) == number == files.number_of(step)
    files.write(TRAINER, training("data 2"))
    assert there(tmp_path) == [0, 1, 2]
    files.release(5)
    assert there(tmp_path) == [1, 2] and files.number_of(5) is None
    assert read_pickled(data_path(tmp_path, 1)) == RunData("data 1", None)
    files.forget()
    files.write(TRAINER, training("data 3"))
    assert there(tmp_path) == [3]


def test_the_files_of_an_earlier_process_are_of_its_snapshots(tmp_path: Path) -> None:
    first = DataFiles()
    first.open(tmp_path)
    first.write(TRAINER, training("old"))
    first.give(5)
    second = DataFiles()
    second.remember(5, first.number_of(5))
    second.remember(6, None)
    second.open(tmp_path)
    second.write(TRAINER, training("new"))
    assert second.give(9) == 1 and there(tmp_path) == [0, 1]
    assert second.needed == {"data_000000.pt", "data_000001.pt"}
    second.release(5)
    assert there(tmp_path) == [1] and second.number_of(6) is None


def test_data_that_cannot_travel_leaves_the_file_of_before(tmp_path: Path) -> None:
    files, cannot = DataFiles(), training(lambda: None)
    files.open(tmp_path)
    with pytest.raises(CannotTravelError, match="cannot be pickled"):
        files.write(TRAINER, cannot)
    assert not files.go_on(cannot) and files.stale and there(tmp_path) == []
    files.write(TRAINER, training("data"))
    files.stale = True
    with pytest.raises(CannotTravelError):
        files.write(TRAINER, cannot)
    assert there(tmp_path) == [0] and files.go_on(cannot) and not files.stale and files.give(5) == 0


def test_replayed_batches_leave_no_data_to_go_on_with(tmp_path: Path) -> None:
    """They come with their snapshots, and the file has none."""
    files = DataFiles()
    files.open(tmp_path)
    files.write(TRAINER, training("no plan", replays=True))
    assert read_pickled(data_path(tmp_path, 0)).plan is None
    assert files.go_on(training("no plan", replays=True)) and not files.go_on(training("data"))


class Plain(LightningDataModule):
    pass


class Hooked(LightningDataModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def test_a_datamodule_travels_without_its_trainer_and_where_it_can_or_must(tmp_path: Path) -> None:
    files = DataFiles()
    files.open(tmp_path)
    for kind in (Plain, Hooked):
        module = kind()
        module.trainer = trainer = SimpleNamespace(datamodule=module, open_file=lambda: None)  # type: ignore[assignment]
        files.write(trainer, training("data"))  # type: ignore[arg-type]
        (number,) = there(tmp_path)
        found = read_pickled(data_path(tmp_path, number)).datamodule
        assert type(found) is kind and found.trainer is None and module.trainer is trainer
        module.open_file = lambda: None  # type: ignore[union-attr]
        if kind is Plain:
            files.write(trainer, training("data"))  # type: ignore[arg-type]
            (number,) = there(tmp_path)
            assert read_pickled(data_path(tmp_path, number)).datamodule is None
        else:
            with pytest.raises(CannotTravelError, match="open_file"):
                files.write(trainer, training("data"))  # type: ignore[arg-type]
