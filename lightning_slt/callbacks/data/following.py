"""The training data of a monitor's chains: followed where it is loaded anew or changed in place, or as it was seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from lightning.pytorch import Trainer
from torch import nn

from lightning_slt.callbacks.asked import Asked
from lightning_slt.callbacks.data.hooks import DataHooks
from lightning_slt.callbacks.data.training import TrainingData, datamodule_of, training_transfer
from lightning_slt.callbacks.said import Voice
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.collective import Collective
from lightning_slt.warned import warn


class FollowedData:
    """Keeps the chains of a monitor on the data that training is on.

    Args:
        asked: what the monitor was asked for.
        voice: of the monitor.

    Attributes:
        source: the chains' minibatches; None until they have been asked for, and where the data is other data since.
    """

    def __init__(self, asked: Asked, voice: Voice) -> None:
        self._asked, self._voice = asked, voice
        self._data: Optional[TrainingData] = None
        self.source: Optional[MinibatchSource] = None
        self._module: Optional[nn.Module] = None
        self._hooks: Optional[DataHooks] = None
        self._hooks_looked_at = False

    def __getstate__(self) -> dict[str, Any]:
        """For strategies that spawn: what was read belongs to the process that read it."""
        return {**self.__dict__, "_data": None, "source": None, "_module": None, "_hooks": None}

    @property
    def hooks_of(self) -> Optional[nn.Module]:
        """The module whose hooks move batches to its device; None where no measurement goes on."""
        return self._module

    @hooks_of.setter
    def hooks_of(self, module: Optional[nn.Module]) -> None:
        self._module = module
        if module is None:
            hooks, self._hooks = self._hooks, None  # at the next firing training will have moved its own on
            if hooks is not None:
                self._say_what_changed(hooks)

    @property
    def data(self) -> TrainingData:
        """That of the run that goes on."""
        assert self._data is not None, "asked for between two runs"
        return self._data

    @property
    def num_samples(self) -> Optional[int]:
        """n of the run that goes on; between two runs what was asked for."""
        return self._data.num_samples if self._data is not None else self._asked.num_samples

    def open(self, trainer: Trainer) -> TrainingData:
        """A fit begins."""
        self.close()
        self._data = data = self._data_of(trainer)
        return data

    def close(self) -> None:
        """A fit is over: nothing of its data is held."""
        self._data, self.source, self.hooks_of = None, None, None
        self._hooks_looked_at = False

    def _data_of(self, trainer: Trainer) -> TrainingData:
        asked = self._asked
        return TrainingData(trainer, asked.batch_size, asked.num_samples, asked.settings.seed, self._voice.prefix)

    def follow_loaders(self, trainer: Trainer) -> bool:
        """Go on with what ``reload_dataloaders_every_n_epochs`` has loaded; whether that is other data."""
        before = self._data
        if before is None or before.is_of(trainer):
            return False
        data = self._data_of(trainer)
        if data.replays and before.replays:
            before.follow(trainer)  # what training has seen stays seen
            return False
        same = data.has_the_samples_of(before)
        if same:
            data.keep_marks_of(before)
        else:
            self.source = None
        self._data = data
        return not same

    def follow_changes(self, trainer: Trainer, collective: Collective) -> bool:
        """At a firing, on all ranks: whether the data has been changed in place; it is then read anew."""
        # ranks that read their data together must read it anew together
        if not any(collective.exchange(self.data.is_changed)):
            return False
        self._data, self.source = self._data_of(trainer), None
        return True

    def see(self, batch: Any) -> None:
        """A batch that training is given, which is all there is of data that cannot be asked for."""
        if self._data is not None and self._data.replays:
            self._data.see(batch)

    @property
    def is_read(self) -> bool:
        """Whether the minibatches of an earlier firing are those of now."""
        return self.source is not None and not self.data.replays

    def read(self, trainer: Trainer) -> MinibatchSource:
        """The minibatches as of now: those of earlier firings where they are kept."""
        if self.source is None or self.data.replays:
            self.source = self.data.source(self.transfer(trainer))
        else:
            self.source.forget()
        return self.source

    def transfer(self, trainer: Trainer) -> Callable[[Any], Any]:
        """What the trainer does to a batch, with the hooks of the private copy there is when it is read."""

        def moved(batch: Any) -> Any:
            if self._hooks is None:
                self._hooks = DataHooks(datamodule_of(trainer), told=not self._hooks_looked_at)
            return training_transfer(trainer, self.hooks_of, self._hooks)(batch)  # type: ignore[arg-type]

        return moved

    def _say_what_changed(self, hooks: DataHooks) -> None:
        """After the first firing, of attributes that hooks change and chains could not have for their own."""
        changed, self._hooks_looked_at = hooks.changed(), True
        if changed:
            names = " and ".join(f"self.{name}" for name in changed)
            warn(
                f"{self._voice.who}: the batch hooks of the DataModule change {names} in place, and so did their calls "
                "for the chains: what is there is too large to be copied for these, or of a kind that is not, and "
                "training goes on from other values. Keep what hooks change in an attribute of its own, or set it anew "
                "in place of changing it."
            )


__all__ = ["FollowedData"]
