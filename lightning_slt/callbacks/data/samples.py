"""The samples that a monitor looks at at every firing: which ones, read once, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional, Union

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset

from lightning_slt.callbacks.data.structure import collate_of
from lightning_slt.callbacks.data.training import datamodule_of
from lightning_slt.influence import ProbeSet, probe_set
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.kinds import check_callable
from lightning_slt.publish.render import Rendered, render_sample, rendered_by
from lightning_slt.sampling.batches import DatasetSource, MinibatchSource
from lightning_slt.sampling.given_data import uniform_samples
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.samples import MAX_SAMPLES, GroupFn
from lightning_slt.warned import speaker, warn

Probed = Union[None, bool, int, "Dataset[Any]"]
"""No samples; True or a number of them from the data at hand; or a dataset of their own."""
SHOWN = 20


class ProbedSamples:
    """What was asked for as ``probe=`` and ``query=``, and what came of it.

    Args:
        probe: None for no influence; True for the training set up to 1,000 samples; a number for another limit; or a
            Dataset, all of it.
        query: None for the probed samples themselves; a number of samples of the validation data, True for up to
            1,000; or a Dataset.
        group_fn: the group of a sample; None for its class where it has one.
        render: how a sample is shown; None for the defaults.
        seed: which samples.

    Raises:
        ValueError: for a number below 1; for queries or groups without ``probe``.
        TypeError: for a ``group_fn`` or ``render`` that cannot be called.
    """

    def __init__(
        self,
        probe: Probed = None,
        query: Probed = None,
        group_fn: Optional[GroupFn] = None,
        render: Optional[Callable[[Any], Any]] = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("probe", probe), ("query", query)):
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1, a Dataset, or None for none.")
            if value is not None and not isinstance(value, (bool, int)) and not _is_map_style(value):
                raise ValueError(
                    f"{name}: expected a number of samples or a map-style Dataset (with __len__ and __getitem__), got "
                    f"{type(value).__name__}."
                )
        check_callable("group_fn", group_fn, "sample")
        check_callable("render", render, "sample")
        if probe is None or probe is False:
            for name, other in (("query", query), ("group_fn", group_fn), ("render", render)):
                if other is not None and other is not False:
                    shown = repr(other) if isinstance(other, (bool, int)) else type(other).__name__
                    raise ValueError(f"{name}={shown}: is given without probe: probe=True looks at the training data.")
        self._probe = None if probe is False else probe
        self._query = None if query is False else query
        self._group_fn, self._render, self._seed = group_fn, render, seed
        self._set: Optional[ProbeSet] = None
        self._train_source: Optional[DatasetSource] = None
        self._tokenizer: Any = None
        self._shown: dict[int, Rendered] = {}
        self.failed = False
        """Whether influence could not be measured in this run; it is then left out."""

    def __getstate__(self) -> dict[str, Any]:
        """For strategies that spawn: what was read belongs to the process that read it."""
        return {**self.__dict__, "_set": None, "_train_source": None, "_tokenizer": None, "_shown": {}}

    @property
    def wanted(self) -> bool:
        return self._probe is not None

    def describe(self) -> Optional[dict[str, Any]]:
        """For the run's settings."""
        if not self.wanted:
            return None
        return {name: _name(value) for name, value in (("probe", self._probe), ("query", self._query))}

    def forget(self) -> None:
        """A new run, maybe on other data."""
        self._set, self._train_source, self._tokenizer, self._shown, self.failed = None, None, None, {}, False

    def leave_out(self) -> bool:
        """No more influence in this run: what fails on the samples would fail at every firing. Whether that is news."""
        before, self.failed = self.failed, True
        return not before

    def check(self, indexed: bool) -> None:
        """Before training: whether the training data has what is asked of it.

        Args:
            indexed: it can be asked for a sample by number.

        Raises:
            ValueError: naming ``probe`` or ``query`` and the remedy.
        """
        for name, value in (("probe", self._probe), ("query", self._query)):
            if value is not None and not isinstance(value, (bool, int)) and len(value) == 0:  # type: ignore[arg-type]
                raise ValueError(f"{name}: the dataset is empty. Give one with samples, or a number of those at hand.")
        if isinstance(self._probe, (bool, int)) and not indexed:
            raise ValueError(
                f"probe={self._probe}: the training data cannot be asked for a sample by number (an iterable dataset, "
                "a sampler of its own, or several loaders). Give probe=Dataset, with the samples to look at."
            )

    def read(
        self, trainer: Trainer, source: MinibatchSource, transfer: Callable[[Any], Any], prefix: str = "slt"
    ) -> ProbeSet:
        """The samples; read once, so that every firing looks at the same ones.

        Args:
            trainer: gives the validation data.
            source: the chains' minibatches: their dataset is used.
            transfer: what the trainer does to a collated batch before its step.
            prefix: of the monitor, for what is said.
        """
        if self._set is not None:
            return self._set
        train = self._train(trainer, source, transfer)
        query = self._queries(trainer, transfer, prefix)
        limit = self._probe if isinstance(self._probe, int) and not isinstance(self._probe, bool) else None
        limit = MAX_SAMPLES if self._probe is True else limit
        most = self._query if isinstance(self._query, int) and not isinstance(self._query, bool) else None
        most = MAX_SAMPLES if self._query is True else most
        self._set = probe_set(train, query, limit, most, self._seed, self._group_fn)
        self._train_source = train
        owners = (datamodule_of(trainer), trainer.lightning_module, train.dataset)
        self._tokenizer = next((t for t in map(tokenizer_of, owners) if t is not None), None)
        return self._set

    def _train(self, trainer: Trainer, source: MinibatchSource, transfer: Callable[[Any], Any]) -> DatasetSource:
        if self._probe is not None and not isinstance(self._probe, (bool, int)):
            return DatasetSource(self._probe, 1, collate_of(trainer.train_dataloader), None, transfer)
        assert isinstance(source, DatasetSource), "checked before training"
        return source

    def _queries(self, trainer: Trainer, transfer: Callable[[Any], Any], prefix: str) -> Optional[DatasetSource]:
        if self._query is None:
            return None
        if not isinstance(self._query, (bool, int)):
            return DatasetSource(self._query, 1, collate_of(trainer.train_dataloader), None, transfer)
        loader = _validation_loader(trainer)
        if not isinstance(loader, DataLoader) or not _is_map_style(loader.dataset):
            warn(
                f"{speaker(prefix, f'query={self._query}')}: there is no validation data that can be asked for a "
                "sample by number, so the probed samples are the queries. Give query=Dataset."
            )
            return None
        return DatasetSource(loader.dataset, 1, loader.collate_fn, uniform_samples(loader)[1], transfer)

    def rendered(self, estimate: InfluenceEstimate, count: int = SHOWN) -> dict[int, Rendered]:
        """The suspects of an estimate, ready to be shown; each sample is read and drawn once."""
        suspects = [int(estimate.train_index[column]) for column in estimate.suspects(count)]
        fresh = [index for index in suspects if index not in self._shown]
        if fresh and self._train_source is not None:
            hook, tokenizer = self._render, self._tokenizer
            with preserve_rng():
                for index, sample in zip(fresh, self._train_source.read_items(fresh), strict=True):
                    self._shown[index] = (
                        render_sample(sample, tokenizer) if hook is None else rendered_by(hook, sample, tokenizer)
                    )
        return {index: self._shown[index] for index in suspects if index in self._shown}


def _validation_loader(trainer: Trainer) -> Any:
    """The first validation loader; None where there is none.

    Lightning has not asked for it yet where the sanity check is left out (with ``num_sanity_val_steps=0``, and whenever
    a run is resumed) and the first validation is epochs away. A resumed run would then have other queries than before.
    """
    loaders = trainer.val_dataloaders
    if loaders is None:
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        if source.instance is None or not source.is_defined():
            return None
        # asked of the hook itself: trainer's own call would take note of it
        loaders = source.instance.val_dataloader() if source.is_module() else source.instance  # type: ignore[union-attr]
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.iterables
    while isinstance(loaders, (list, tuple, Mapping)) and loaders:
        loaders = next(iter(loaders.values() if isinstance(loaders, Mapping) else loaders))
    return loaders


def tokenizer_of(owner: Any) -> Any:
    """Its ``tokenizer``, where that can ``decode``; of a subset, that of the dataset it is of; else None."""
    seen = 0
    while owner is not None and seen < 8:
        tokenizer = getattr(owner, "tokenizer", None)
        if callable(getattr(tokenizer, "decode", None)):
            return tokenizer
        owner, seen = getattr(owner, "dataset", None) if isinstance(owner, Dataset) else None, seen + 1
    return None


def _is_map_style(data: Any) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (str, bytes, dict))


def _name(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int)) else f"{type(value).__name__} of {len(value)}"
