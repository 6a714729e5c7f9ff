"""What a sweep needs to know, as plain data: a file says it, and a process on another machine reads the same file."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING

from lightning_slt.config import SamplerConfig
from lightning_slt.estimate import ChainSettings
from lightning_slt.firing import firing_settings
from lightning_slt.kinds import check_count
from lightning_slt.transitions.settings import threshold_of

RAW, AVERAGED = "raw", "averaged"


@dataclass
class SweepConfig:
    """How the checkpoints of a run are measured.

    Args:
        module: what was trained, as ``package.module:Name`` or ``file.py:Name``: a LightningModule, made from the
            hyperparameters in the checkpoint, or a function that returns a module.
        data: the training data, in the same form: a function or class that returns a Dataset, a DataLoader or a
            LightningDataModule (whose ``train_dataloader`` is used).
        module_args, data_args: keyword arguments of those.
        loss_fn: ``loss_fn(module, batch)`` in the same form; None for the module's own ``training_step``.
        weights: ``"raw"``, the weights that trained, or ``"averaged"``, those that an averaging callback (EMA, SWA)
            keeps in the same checkpoint.
        folder: of results and record.
        devices: one process each; None for every GPU, or the CPU. Names as of ``SLTMonitor(devices=...)``.
        sampler, num_chains, num_draws, num_burnin_steps, num_steps_bw_draws, batch_size, nbeta, restrict, seed,
            num_samples, method: as of :class:`~lightning_slt.SLTMonitor`.
        localization: gamma; None for that of the first checkpoint of the sweep, and kept.
        probe: training samples whose influence is measured as well; None for none.
        query_data: samples that they influence, as ``data``, but of a LightningDataModule its ``val_dataloader``; None
            for the probed samples themselves.
        query: how many of those at the most; None for all.
        false_alarms: of the transitions that are looked for, in 100 points.

    Example:
        >>> from lightning_slt.config import load
        >>> load({"module": "net.py:Net", "data": "net.py:data", "num_chains": 2}, schema=SweepConfig).weights
        'raw'
    """

    module: str = MISSING
    data: str = MISSING
    module_args: dict[str, Any] = field(default_factory=dict)
    data_args: dict[str, Any] = field(default_factory=dict)
    loss_fn: Optional[str] = None
    weights: str = RAW
    folder: str = "slt_sweep"
    devices: Optional[list[str]] = None
    sampler: Optional[SamplerConfig] = None
    num_chains: int = 4
    num_draws: int = 100
    num_burnin_steps: Optional[int] = None
    num_steps_bw_draws: Optional[int] = None
    batch_size: Optional[int] = None
    nbeta: Optional[float] = None
    localization: Optional[float] = None
    restrict: Optional[list[str]] = None
    seed: int = 0
    num_samples: Optional[int] = None
    method: str = "auto"
    probe: Optional[int] = None
    query_data: Optional[str] = None
    query: Optional[int] = None
    false_alarms: float = 0.05

    def check(self) -> SweepConfig:
        """This, where nothing is out of range.

        Raises:
            ValueError: naming the argument, its value and what to do.
            TypeError: for one of another kind, likewise.
        """
        if self.weights not in (RAW, AVERAGED):
            raise ValueError(f"weights={self.weights!r}: must be 'raw' or 'averaged'.")
        for name, least in (("probe", 1), ("query", 1), ("batch_size", 1), ("num_samples", 2)):
            check_count(name, getattr(self, name), least, ", or left out")
        if self.probe is None and (self.query is not None or self.query_data is not None):
            raise ValueError("query_data or query is given without probe: set probe to a number of training samples.")
        threshold_of(self.false_alarms)  # not after all has been measured
        self.settings()
        return self

    def settings(self) -> ChainSettings:
        """What is asked of the chains: the same as of a monitor's."""
        return firing_settings(
            sampler=self.sampler.build() if self.sampler is not None else None,
            num_chains=self.num_chains,
            num_draws=self.num_draws,
            num_burnin_steps=self.num_burnin_steps,
            num_steps_bw_draws=self.num_steps_bw_draws,
            nbeta=self.nbeta,
            localization=self.localization,
            seed=self.seed,
            method=self.method,
        )

    def decides(self) -> dict[str, Any]:
        """The fields that a result depends on, as plain types."""
        values = dataclasses.asdict(self)
        for name in ("folder", "devices", "localization", "false_alarms"):
            values.pop(name)
        if self.sampler is not None:
            values["sampler"]["name"] = self.sampler.name.value
        return values


def find(name: str, argument: str) -> Callable[..., Any]:
    """What ``package.module:Name`` or ``file.py:Name`` stands for; modules are looked for in the working directory too.

    Args:
        name: where it is.
        argument: whose value it is, for errors.

    Raises:
        ValueError: naming the argument, the value and what is wrong.

    Example:
        >>> find("collections:OrderedDict", "data").__name__
        'OrderedDict'
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ValueError(f"{argument}={name!r}: write it as package.module:Name or file.py:Name.")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else _from_path(where)
        found = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"{argument}={name!r}: cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"{argument}={name!r}: is a {type(found).__name__}, and no function or class to call.")
    return found


def _from_path(where: str) -> Any:
    # a console script does not look into the directory that it is called in
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(where)


def _from_file(path: Path) -> Any:
    """A script as a module; imported once, under its own name where it can be, so that a pickle finds its classes."""
    path = path.resolve()
    known = next((m for m in sys.modules.values() if _same_file(getattr(m, "__file__", None), path)), None)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _same_file(name: Optional[str], path: Path) -> bool:
    return name is not None and Path(name).name == path.name and Path(name).resolve() == path


__all__ = ["AVERAGED", "RAW", "SweepConfig", "find"]
