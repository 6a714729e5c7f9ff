"""Workers beside training follow data that is loaded anew: the numbers are those of firings inside training."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.integration.background_runs import (  # noqa: F401 - the fixture is for all tests here
    Stalled,
    _no_process_is_left,
    assert_same_estimates,
    beside,
)
from tests.integration.harness import Scenario, assert_same, quiet_trainer, seed_everything, steps_of, tiny_monitor
from tests.integration.models import BATCH, CLASSES, IN, Net, Plain, Stream

pytestmark = pytest.mark.timeout(240)

EPOCHS: dict[str, Any] = {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}


def points(number: int) -> TensorDataset:
    """``8 * number`` points, others for every number."""
    g = torch.Generator().manual_seed(number)
    n = 8 * number
    return TensorDataset(torch.randn(n, IN, generator=g) * number, torch.arange(n) % CLASSES)


class Curriculum(LightningDataModule):
    """Its train set is that of the epoch."""

    def __init__(self, make: Callable[[int], Any] = points) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self) -> DataLoader[Any]:
        self.train_set = self.make(1 + self.trainer.current_epoch)
        return DataLoader(self.train_set, BATCH)


class Standardised(Curriculum):
    """Its batches are scaled by what it knows of the train set of the epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        loader = super().train_dataloader()
        self.scale = self.train_set.tensors[0].std()
        return loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / self.scale, batch[1]


class Relabels(Curriculum):
    """One dataset, changed in place for every epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        epoch = self.trainer.current_epoch
        self.train_set = points(3) if epoch == 0 else self.train_set
        self.train_set.tensors[1].fill_(epoch % CLASSES)
        return DataLoader(self.train_set, BATCH)


def stream_then_points(number: int) -> Any:
    return Stream() if number == 1 else points(number)


def curriculum(make: Callable[[int], Any] = points, module: Any = Net, data: Any = Curriculum) -> Scenario:
    return Scenario(module, lambda: {"datamodule": data(make)}, lambda: dict(EPOCHS))


@pytest.mark.parametrize(
    ("scenario", "changes", "sizes"),
    [
        pytest.param(curriculum(), {}, [8, 16, 24], id="other data at every epoch", marks=pytest.mark.slow),
        pytest.param(
            curriculum(),
            {"devices": ["cpu", "cpu"]},
            [8, 16, 24],
            id="two workers share the chains",
            marks=pytest.mark.slow,
        ),
        pytest.param(curriculum(), {"probe": 6, "num_draws": 20}, [8, 16, 24], id="influence", marks=pytest.mark.slow),
        pytest.param(curriculum(data=Standardised), {}, [8, 16, 24], id="hooks that know the data"),
        pytest.param(curriculum(data=Relabels), {}, [24, 24, 24], id="data that is changed in place"),
        pytest.param(curriculum(stream_then_points), {}, [None, 16, 24], id="a stream, then tables"),
    ],
)
def test_workers_follow_data_that_is_loaded_anew(
    scenario: Scenario, changes: dict[str, Any], sizes: list[Any], tmp_path: Path
) -> None:
    """Bit for bit what firings inside training say, n with it; and training is the same."""
    settings = {"every_n_epochs": 1, "nbeta": 5.0, **changes}
    inline = tiny_monitor(**{k: v for k, v in settings.items() if k != "devices"})
    background = beside(**settings)
    without = scenario.run(tmp_path / "inline", inline)
    assert_same(without, scenario.run(tmp_path / "background", background))
    assert [e.num_samples for e in inline.estimates] == sizes
    assert [e.num_samples for e in background.estimates] == sizes
    assert_same_estimates(background, inline)
    assert len(background.influences) == len(inline.influences)
    for a, b in zip(background.influences, inline.influences, strict=True):
        torch.testing.assert_close(a.tensors(), b.tensors(), rtol=0.0, atol=0.0, equal_nan=True)


class CountsDataFiles(Callback):
    """How many files of data there are when an epoch ends; to stand after the monitor."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, []

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seen.append(len(list(self.folder.glob("background/data_*.pt"))))


def test_a_snapshot_late_in_the_queue_is_of_the_data_of_its_step(tmp_path: Path) -> None:
    """Workers that stand still until training has been through all its data; then nothing is on disk any more."""
    inline = tiny_monitor(every_n_train_steps=2)
    curriculum().run(tmp_path / "inline", inline)
    background = beside(every_n_train_steps=2, max_pending=6, dirpath=str(tmp_path / "slt"))
    counts = CountsDataFiles(tmp_path / "slt")
    curriculum().run(tmp_path / "background", Stalled(background), background, counts)
    assert [e.num_samples for e in background.estimates] == [8, 16, 16, 24, 24, 24]
    assert_same_estimates(background, inline)
    assert counts.seen == [1, 2, 3]
    assert not (tmp_path / "slt" / "background").exists()


def test_data_that_no_snapshot_waits_for_is_not_kept(tmp_path: Path) -> None:
    background = beside(every_n_train_steps=2, max_pending=1, dirpath=str(tmp_path / "slt"))
    counts = CountsDataFiles(tmp_path / "slt")
    curriculum().run(tmp_path, background, counts)
    assert len(background.estimates) == 6
    assert max(counts.seen) <= 2


class Breaks(Callback):
    """Training ends in the middle of the third epoch."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("the power is gone")


def test_a_resumed_run_measures_old_snapshots_on_the_data_of_their_step(tmp_path: Path) -> None:
    inline = tiny_monitor(every_n_epochs=1)
    curriculum(module=Plain).run(tmp_path / "inline", inline)
    settings: dict[str, Any] = {"every_n_epochs": 1, "max_pending": 4, "dirpath": str(tmp_path / "slt")}
    broken = beside(**settings)
    saver = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    scenario = Scenario(
        Plain,
        lambda: {"datamodule": Curriculum()},
        lambda: {**EPOCHS, "enable_checkpointing": True},
    )
    with pytest.raises(RuntimeError, match="the power is gone"):
        scenario.run(tmp_path / "a", Stalled(broken), broken, saver, Breaks())
    assert broken.estimates == []
    assert len(list((tmp_path / "slt" / "background").glob("data_*.pt"))) == 2
    resumed = beside(**settings)
    scenario.run(tmp_path / "b", resumed, saver, ckpt_path=str(tmp_path / "last.ckpt"))
    assert [e.num_samples for e in resumed.estimates] == [8, 16, 24]
    assert_same_estimates(resumed, inline)


class Holds(TensorDataset):
    """A dataset that holds something which no other process can have."""

    def __init__(self, number: int) -> None:
        super().__init__(*points(number).tensors)
        self.function = lambda x: x


def second_cannot_travel(number: int) -> Any:
    return Holds(number) if number == 2 else points(number)


def test_data_that_cannot_travel_is_named_and_the_data_of_before_is_used(tmp_path: Path) -> None:
    """And the data after it, which can, is followed again."""
    inline, background = tiny_monitor(every_n_train_steps=2), beside(every_n_train_steps=2)
    curriculum(second_cannot_travel).run(tmp_path / "inline", inline)
    expected = r"data\.plan\.parts\[0\]\.dataset\.function cannot be pickled .* loaded anew and is other data"
    with pytest.warns(UserWarning, match=expected) as caught:
        curriculum(second_cannot_travel).run(tmp_path / "background", background)
    assert sum("loaded anew" in str(w.message) for w in caught) == 1
    assert [e.num_samples for e in background.estimates] == [8, 8, 8, 24, 24, 24]
    assert [e.num_samples for e in inline.estimates] == [8, 16, 16, 24, 24, 24]
    assert [e.init_loss for e in background.estimates][3:] == [e.init_loss for e in inline.estimates][3:]


class Doubled(Dataset[Any]):
    """Of the script itself, where this file is run as one."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return 2 * x, y


def main(folder: str) -> None:
    from tests.integration.test_background_data import Curriculum as Imported

    seed_everything()
    data = Imported(lambda number: Doubled(points(number)) if number > 1 else points(number))
    monitor = beside(every_n_epochs=1, dirpath=folder)
    quiet_trainer(Path(folder), callbacks=[monitor], **EPOCHS).fit(Plain(), datamodule=data)
    print(steps_of(monitor), [e.num_samples for e in monitor.estimates])


@pytest.mark.slow
def test_data_of_the_running_script_that_comes_later_is_found(tmp_path: Path) -> None:
    """Workers did not need the script when they were started: they are started again, and import it."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip().endswith("[2, 6, 12] [8, 16, 24]"), done.stderr


if __name__ == "__main__":
    main(sys.argv[1])
