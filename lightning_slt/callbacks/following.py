"""Training data that a monitor follows: data that is loaded anew or changed in place, and batches that were seen."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_slt.callbacks.component_firings import ComponentFirings
from lightning_slt.callbacks.data import TrainingData


class DataFollowing(ComponentFirings):
    """The part of a monitor that keeps its chains on the data that training is on."""

    def _data_of(self, trainer: Trainer) -> TrainingData:
        return TrainingData(trainer, self._batch_size, self._num_samples, self._settings.seed, self._prefix)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chains follow the data where ``reload_dataloaders_every_n_epochs`` has loaded it anew."""
        before = self._data
        if before is None or before.is_of(trainer):
            return
        data = self._data_of(trainer)
        if data.replays and before.replays:
            before.follow(trainer)  # what training has seen stays seen
            return
        same = data.has_the_samples_of(before)
        if same:
            data.keep_marks_of(before)
        self._data = data
        if not same:
            self._read_anew()

    def _follow_changes(self, trainer: Trainer) -> None:
        """At a firing, on all ranks: data that has been changed in place is read anew."""
        data = self._data
        assert data is not None
        # ranks that read their data together must read it anew together
        if any(self._collective.exchange(data.is_changed)):
            self._data = self._data_of(trainer)
            self._read_anew()

    def _read_anew(self) -> None:
        self._source = None
        if self._beside is not None:
            self._beside.data_is_other()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # where a run is resumed Lightning's count is one behind until here
        self._last_step = max(self._last_step, trainer.fit_loop.epoch_loop._batches_that_stepped)
        if self._data is not None and self._data.replays:
            self._data.see(batch)


__all__ = ["DataFollowing"]
