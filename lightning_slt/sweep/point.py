"""One point of the curve: a checkpoint in, a result on disk out, on whatever device and machine this runs."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from torch.utils.data import DataLoader

from lightning_slt.callbacks.background.travel import StillTrainer
from lightning_slt.callbacks.data.training import BatchTransfer, LoaderPart, SourcePlan, check_num_samples
from lightning_slt.config import load
from lightning_slt.durable import DamagedFileError, read_checked, write_checked
from lightning_slt.firing import Course
from lightning_slt.influence import ProbeSet, probe_set
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.record import Estimate
from lightning_slt.sampling.batches import MAX_RESIDENT_BYTES, DatasetSource, MinibatchSource
from lightning_slt.sampling.counting import batch_size_of
from lightning_slt.sampling.given_data import source_of, uniform_samples
from lightning_slt.sampling.objective import Objective, WrongWeightsError
from lightning_slt.sampling.rng import derive_seed, preserve_rng
from lightning_slt.sweep.checkpoint import Checkpoint, read_state, unwrapped, weights_in
from lightning_slt.sweep.settings import SweepConfig, find

POINTS_FOLDER = "points"
"""Of the results of a sweep, one file a point."""
NOT_LOADED = "in loading state_dict"
"""What PyTorch says where weights are of other names or shapes."""


class MisfitError(ValueError):
    """The weights of a checkpoint are of another module."""


@dataclass(frozen=True)
class Task:
    """One checkpoint to be measured; plain types, for another process or machine.

    Attributes:
        path, step, epoch, content: see :class:`~lightning_slt.sweep.checkpoint.Checkpoint`.
        decides: see :meth:`~lightning_slt.sweep.settings.SweepConfig.decides`.
        localization: gamma of the curve.
        folder: of results.
    """

    path: str
    step: int
    epoch: Optional[int]
    content: str
    decides: dict[str, Any]
    localization: float
    folder: str

    @staticmethod
    def of(checkpoint: Checkpoint, config: SweepConfig, localization: float) -> Task:
        """The task of a checkpoint in a sweep."""
        where = str(checkpoint.path.resolve())
        folder = str(Path(config.folder).resolve())
        return Task(
            where, checkpoint.step, checkpoint.epoch, checkpoint.content, config.decides(), localization, folder
        )

    @property
    def result_path(self) -> Path:
        """The file of its result; another one where the weights or what was asked are others."""
        asked = json.dumps([self.content, self.decides, self.localization], sort_keys=True)
        key = hashlib.sha256(asked.encode()).hexdigest()[:16]
        return Path(self.folder) / POINTS_FOLDER / f"step_{self.step:09d}_{key}.pt"


Point = tuple[Estimate, Optional[InfluenceEstimate]]


def measure_point(task: Task, device: torch.device | str = "cpu") -> None:
    """Measure a checkpoint and write what was found; what is on disk afterwards is whole, or is not there.

    Chains of a point know nothing of other points, so that the curve depends neither on the order nor on the devices.

    Raises:
        Exception: where it cannot be measured; nothing is written then.
    """
    config = load(task.decides, schema=SweepConfig)
    estimate, influence = measure_weights(
        read_state(Path(task.path)), config, task.localization, torch.device(device), Path(task.path), task.step
    )
    estimate = estimate.replace(step=task.step, x=task.step, epoch=task.epoch)
    state: dict[str, Any] = {"estimate": estimate.state_dict(), "influence": None}
    if influence is not None:
        placed = influence.replace(step=task.step, x=task.step, epoch=task.epoch, seconds=estimate.seconds)
        state["influence"] = placed.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_checked(task.result_path, buffer.getvalue())


def read_point(task: Task) -> Optional[Point]:
    """The result of a task; None where there is none that can be trusted."""
    try:
        state = torch.load(io.BytesIO(read_checked(task.result_path)), weights_only=False)
        influence = state["influence"]
        return (
            Estimate.from_state_dict(state["estimate"]),
            InfluenceEstimate.from_state_dict(influence) if influence is not None else None,
        )
    except (FileNotFoundError, DamagedFileError):
        return None


def measure_weights(
    state: Mapping[str, Any],
    config: SweepConfig,
    localization: float,
    device: torch.device,
    path: Path,
    step: int = 0,
) -> Point:
    """The estimate at the weights of a checkpoint: a function of its arguments and of the data alone.

    Raises:
        ValueError: where module, data or weights cannot be had or do not fit.
        NonFiniteLossError, NoLossError: as :func:`~lightning_slt.estimate.measure_llc`.
    """
    with preserve_rng(config.seed):
        opened = open_point(state, config, device, path, step)
        course = Course(localization, config.method, warm_start=False)
        return course.measure(opened.objective, opened.source, config.settings(), opened.probes)


@dataclass(frozen=True, eq=False)
class OpenedPoint:
    """What a firing at the weights of a checkpoint needs.

    Attributes:
        objective: the loss at those weights.
        source: the chains' minibatches.
        probes: samples whose influence is read off the same chains; None for none.
        loader: the training data as it was given: a Dataset, a DataLoader, or batches.
        transfer: what becomes of a batch before the step.
    """

    objective: Objective
    source: MinibatchSource
    probes: Optional[ProbeSet]
    loader: Any
    transfer: BatchTransfer


def open_point(
    state: Mapping[str, Any], config: SweepConfig, device: torch.device, path: Path, step: int = 0
) -> OpenedPoint:
    """Module, data and weights put together; nothing is measured yet.

    Raises:
        ValueError: where one of them cannot be had, or they do not fit.
        MisconfigurationException: where nbeta cannot be derived from the data.
    """
    objective, datamodule = make_objective(state, config, device, path, step)
    module = objective.module
    # a plain module has no hooks for a batch on its way: those that a LightningModule has if it says nothing
    hooks = module if isinstance(module, LightningModule) else LightningModule()
    transfer = BatchTransfer(Precision(), datamodule, hooks, device)
    loader = datamodule.train_dataloader() if datamodule is not None else _data_of(config)
    source = make_source(loader, config, transfer)
    check_num_samples(source.num_samples, config.nbeta, "sweep")
    return OpenedPoint(objective, source, _probes(source, config, device), loader, transfer)


def make_objective(
    state: Mapping[str, Any], config: SweepConfig, device: torch.device, path: Path, step: int = 0
) -> tuple[Objective, Any]:
    """The loss at the weights of a checkpoint, and the datamodule where the data is one.

    Raises:
        ValueError: where the module cannot be made.
        MisfitError: where the weights do not fit it.
    """
    try:
        module = make_module(config, path, state)
    except RuntimeError as error:
        if NOT_LOADED not in str(error):
            raise
        raise _misfit(path, config, error) from error
    data = _data_of(config)
    datamodule = data if isinstance(data, LightningDataModule) else None
    view = StillTrainer(_as_stored(state, step), datamodule, device)
    loss_fn = find(config.loss_fn, "loss_fn") if config.loss_fn is not None else None
    try:
        weights = unwrapped(weights_in(state, config.weights, path), module)
        return Objective(module, loss_fn, config.restrict, device, trainer=view, weights=weights), datamodule
    except (RuntimeError, WrongWeightsError) as error:
        raise _misfit(path, config, error) from error


def _misfit(path: Path, config: SweepConfig, error: Exception) -> MisfitError:
    return MisfitError(f"{path}: its weights do not fit module={config.module!r}: {error}")


def make_module(config: SweepConfig, path: Path, state: Mapping[str, Any]) -> nn.Module:
    """The module, with whatever weights."""
    made = find(config.module, "module")
    arguments = dict(config.module_args)
    # a pinned snapshot, or a file of the user's own, has no hyperparameters: then the arguments are all there is
    by_lightning = "pytorch-lightning_version" in state
    if by_lightning and isinstance(made, type) and issubclass(made, LightningModule):
        return _from_checkpoint(made, path, state, config)
    module = callable_with(config.module, "module", arguments)(**arguments)
    if not isinstance(module, nn.Module):
        raise ValueError(f"module={config.module!r}: gave a {type(module).__name__}, and no torch module.")
    return module


def callable_with(name: str, argument: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """What a name stands for, where it can be called with these keyword arguments.

    Args:
        name: as of :func:`~lightning_slt.sweep.settings.find`.
        argument: whose value it is, for errors; its keyword arguments are those of ``<argument>_args``.
        arguments: these.

    Raises:
        ValueError: where it cannot be had, or lacks one of the arguments, or is given one that it does not know.
    """
    made = find(name, argument)
    try:
        signature = inspect.signature(made)
    except ValueError:  # of what is written in C
        return made
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{argument}_args={dict(arguments)}: do not fit {argument}={name!r}: {error}") from error
    return made


def _from_checkpoint(
    made: type[LightningModule], path: Path, state: Mapping[str, Any], config: SweepConfig
) -> LightningModule:
    arguments = dict(config.module_args)
    try:
        with warnings.catch_warnings():
            # names inside wrappers are put right afterwards, and what does not fit then is an error
            warnings.filterwarnings("ignore", message="Found keys that are")
            return made.load_from_checkpoint(path, map_location="cpu", strict=False, weights_only=False, **arguments)
    except TypeError as error:
        if "__init__()" not in str(error):
            raise
        held = ", ".join(sorted(state.get(made.CHECKPOINT_HYPER_PARAMS_KEY) or ())) or "none"
        raise ValueError(
            f"module_args={arguments}: do not fit module={config.module!r}: {error}. Hyperparameters in {path}: {held} "
            "(save_hyperparameters() in the module puts them there). Give the others as module_args."
        ) from error


def _as_stored(state: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What a step may ask its trainer, as far as the checkpoint says it."""
    return {
        "current_epoch": int(state.get("epoch") or 0),
        "global_step": int(state.get("global_step", step)),
        "world_size": 1,
        "global_rank": 0,
        "local_rank": 0,
        "is_global_zero": True,
        "training": True,
        "validating": False,
        "sanity_checking": False,
        "callback_metrics": {},
        "logged_metrics": {},
        "progress_bar_metrics": {},
        "fast_dev_run": False,
        "num_devices": 1,
        "num_nodes": 1,
        "logger": SimpleNamespace(),
    }


def _data_of(config: SweepConfig) -> Any:
    return _data(config.data, json.dumps(config.data_args, sort_keys=True))


@lru_cache(maxsize=1)
def _data(name: str, arguments: str) -> Any:
    """Dataset, loader or datamodule; read once by a process."""
    given = json.loads(arguments)
    data = callable_with(name, "data", given)(**given)
    if isinstance(data, LightningDataModule):
        data.prepare_data()
        data.setup("fit")
    return data


def make_source(data: Any, config: SweepConfig, transfer: BatchTransfer) -> MinibatchSource:
    """The chains' minibatches: those of a monitor where there is one loader over a dataset with an index.

    Raises:
        ValueError: for no data; TypeError for something that is no data.
    """
    loader = data
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (DataLoader, list, tuple)):
        loader = DataLoader(data, batch_size=64, shuffle=True)  # of fewer samples all are one batch
    if isinstance(loader, DataLoader):
        uniform, indices = uniform_samples(loader)
        if uniform:
            part = LoaderPart(
                loader.dataset,
                config.batch_size or batch_size_of(loader) or 1,
                loader.collate_fn,
                indices,
                derive_seed(config.seed, 0),
                loader.num_workers if loader.num_workers > 1 else None,
                MAX_RESIDENT_BYTES,
                loader.worker_init_fn,
            )
            n = config.num_samples or (len(indices) if indices is not None else len(loader.dataset))  # type: ignore[arg-type]
            return SourcePlan((part,), None, n, False).build(transfer)
    return source_of(data, config.batch_size, transfer.device, config.seed, config.num_samples)


def _probes(source: MinibatchSource, config: SweepConfig, device: torch.device) -> Optional[ProbeSet]:
    if config.probe is None:
        return None
    if not isinstance(source, DatasetSource):
        raise ValueError(
            f"probe={config.probe}: data={config.data!r} gives no samples that can be asked for by number."
        )
    query = None
    if config.query_data is not None:
        data = find(config.query_data, "query_data")()
        if isinstance(data, LightningDataModule):
            data.prepare_data()
            data.setup("fit")
            data = data.val_dataloader()
        try:
            found = source_of(data, config.batch_size, device, config.seed)
        except TypeError as error:
            raise ValueError(f"query_data={config.query_data!r}: {str(error).removeprefix('data: ')}") from error
        if not isinstance(found, DatasetSource):
            raise ValueError(f"query_data={config.query_data!r}: gives no samples that can be asked for by number.")
        query = found
    return probe_set(source, query, config.probe, config.query, config.seed)


__all__ = [
    "MisfitError",
    "OpenedPoint",
    "Point",
    "Task",
    "callable_with",
    "make_module",
    "make_objective",
    "make_source",
    "measure_point",
    "measure_weights",
    "open_point",
    "read_point",
]
