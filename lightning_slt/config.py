"""Structured configs that build the callbacks: a YAML file, a dict or a Hydra node, checked before anything is built.

The schema is a dataclass, so that OmegaConf refuses a typo or a wrong type by the field's name. :class:`RunConfig` is
what a whole run measures; :class:`MonitorConfig` and :class:`TransitionMonitorConfig` are one callback each;
:class:`LLCConfig`, :class:`InfluenceConfig` and :class:`DetectorConfig` are for what works without a trainer. To have
one of them in a schema of your own, make it the type of a field there and pass that schema to :func:`load`. What each
field means is said where the argument is: ``lightning-slt config`` prints it beside the defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional, TypeVar, Union, overload

from lightning.pytorch import Callback

from lightning_slt.callbacks import SLTMonitor, TransitionMonitor
from lightning_slt.estimate import estimate_llc
from lightning_slt.influence import estimate_influence
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.record import Estimate
from lightning_slt.sampling.samplers import (
    BY_NAME,
    MALA,
    SGLD,
    SGNHT,
    KineticLangevin,
    LeimkuhlerMatthews,
    RMSpropSGLD,
    sampler_from,
)
from lightning_slt.schema import Source, checked
from lightning_slt.transitions import Transition, TransitionDetector, detect_transitions

S = TypeVar("S")


class SamplerName(Enum):
    """The samplers that a monitor may use."""

    LeimkuhlerMatthews = "LeimkuhlerMatthews"
    SGLD = "SGLD"
    RMSpropSGLD = "RMSpropSGLD"
    SGNHT = "SGNHT"


@dataclass
class SamplerConfig:
    """Which sampler, and its arguments.

    Args:
        name: LeimkuhlerMatthews, SGLD, RMSpropSGLD or SGNHT.
        lr: the step size; None has it calibrated.
        kappa: of RMSpropSGLD: how far its metric may go, the smaller the further; None for its default.
        diffusion_factor: of SGNHT: the noise injected in a step, also the friction to begin with; None for its default.
    """

    name: SamplerName = SamplerName.SGLD
    lr: Optional[float] = None
    kappa: Optional[float] = None
    diffusion_factor: Optional[float] = None

    def build(self) -> Union[LeimkuhlerMatthews, SGLD, RMSpropSGLD, SGNHT]:
        """The sampler.

        Raises:
            ValueError: for an argument out of range, or that this sampler does not have.
        """
        return sampler_from({"name": self.name.value, "lr": self.lr, **_given(self)}, BY_NAME)  # type: ignore[no-any-return]


@dataclass
class MonitorConfig:
    """Arguments of :class:`~lightning_slt.SLTMonitor` that are plain data, under its names and with its defaults.

    A loss function or a module to restrict to is no plain data: give those to ``SLTMonitor`` in Python.

    Example:
        >>> MonitorConfig(log_spaced=12, sampler=SamplerConfig(lr=1e-5)).build().estimates
        []
    """

    every_n_train_steps: Optional[int] = None
    every_n_epochs: Optional[int] = None
    at_steps: Optional[list[int]] = None
    log_spaced: Optional[int] = None
    max_overhead: Optional[float] = None
    sampler: Optional[SamplerConfig] = None
    num_chains: int = 4
    num_draws: int = 100
    num_burnin_steps: Optional[int] = None
    num_steps_bw_draws: Optional[int] = None
    batch_size: Optional[int] = None
    nbeta: Optional[float] = None
    localization: Optional[float] = None
    restrict: Optional[list[str]] = None
    on_failure: str = "warn"
    seed: int = 0
    warm_start: bool = True
    num_samples: Optional[int] = None
    name: Optional[str] = None
    dirpath: Optional[str] = None
    method: str = "auto"
    probe: Optional[Union[bool, int]] = None
    query: Optional[Union[bool, int]] = None
    execution: str = "inline"
    devices: Optional[list[str]] = None
    max_pending: int = 2
    when_full: str = "skip"
    max_wait: float = 600.0
    measures: Optional[list[Any]] = None

    def build(self) -> SLTMonitor:
        """The callback.

        Raises:
            ValueError: for an argument out of range.
        """
        return SLTMonitor(**_arguments(self))


@dataclass
class TransitionMonitorConfig:
    """Arguments of :class:`~lightning_slt.TransitionMonitor` that are plain data, under its names and defaults.

    ``on_transition`` is no plain data: give it to ``TransitionMonitor`` in Python.

    Example:
        >>> TransitionMonitorConfig(min_change=2.0).build().transitions
        []
    """

    monitor: str = "slt/llc/mean"
    pin_checkpoints: bool = True
    alert: bool = True
    false_alarms: float = 0.05
    min_change: float = 0.0
    at_boundary: str = "annotate"
    saddles: bool = True
    max_snapshots: int = 12
    dirpath: Optional[str] = None

    def build(self) -> TransitionMonitor:
        """The callback.

        Raises:
            ValueError: for an argument out of range.
        """
        return TransitionMonitor(**_arguments(self))


@dataclass
class RunConfig:
    """What a run measures: the whole model, parts of it by name, and what to watch for in their curves.

    Args:
        monitor: the curve of the whole model; None for none.
        components: further curves by name, logged under ``slt_<name>/``; what they measure is theirs to say, such as
            ``restrict: [encoder.*]``.
        transitions: watches the curve that its ``monitor`` names; None for none.
        watch_components: watch the curve of every component as well, with the settings of ``transitions``.

    Example:
        >>> config = load({"components": {"head": {"restrict": "head.*"}}}, schema=RunConfig)
        >>> [type(callback).__name__ for callback in config.build()]
        ['SLTMonitor', 'SLTMonitor', 'TransitionMonitor']
    """

    monitor: Optional[MonitorConfig] = field(default_factory=MonitorConfig)
    components: dict[str, MonitorConfig] = field(default_factory=dict)
    transitions: Optional[TransitionMonitorConfig] = field(default_factory=TransitionMonitorConfig)
    watch_components: bool = False

    def build(self) -> list[Callback]:
        """The callbacks, for ``Trainer(callbacks=[...])``.

        Raises:
            ValueError: for an argument out of range; for a component whose ``name`` is another than its key; where
                ``transitions`` watches a curve that nothing here measures.
        """
        monitors = [] if self.monitor is None else [self.monitor]
        for name, component in self.components.items():
            if component.name not in (None, name):
                raise ValueError(
                    f"components.{name}.name={component.name!r}: a component's name is its key; leave name out."
                )
            monitors.append(dataclasses.replace(component, name=name))
        curves = [f"slt_{monitor.name}/llc/mean" if monitor.name else "slt/llc/mean" for monitor in monitors]
        watched: list[TransitionMonitorConfig] = []
        if self.transitions is not None:
            if self.transitions.monitor not in curves:
                raise ValueError(
                    f"transitions.monitor={self.transitions.monitor!r}: nothing here measures that curve; there is "
                    f"{', '.join(curves) or 'none'}. transitions: null watches none."
                )
            keys = [self.transitions.monitor]
            keys += [f"slt_{name}/llc/mean" for name in self.components if self.watch_components]
            watched = [dataclasses.replace(self.transitions, monitor=key) for key in dict.fromkeys(keys)]
        return [*(monitor.build() for monitor in monitors), *(watch.build() for watch in watched)]


class EstimateSamplerName(Enum):
    """The samplers of a single call: those of a monitor, and two that want all the data at every step."""

    LeimkuhlerMatthews = "LeimkuhlerMatthews"
    SGLD = "SGLD"
    RMSpropSGLD = "RMSpropSGLD"
    SGNHT = "SGNHT"
    KineticLangevin = "KineticLangevin"
    MALA = "MALA"


@dataclass
class EstimateSamplerConfig:
    """As :class:`SamplerConfig`, for one call without a trainer.

    Args:
        name: LeimkuhlerMatthews, SGLD, RMSpropSGLD, SGNHT, KineticLangevin (which wants ``full_batch``) or MALA.
        lr: the step size; None has it calibrated.
        kappa: of RMSpropSGLD: how far its metric may go, the smaller the further; None for its default.
        diffusion_factor: of SGNHT: the noise injected in a step, also the friction to begin with; None for its default.
        friction: of KineticLangevin, in units of the inverse time; None for its default.
    """

    name: EstimateSamplerName = EstimateSamplerName.SGLD
    lr: Optional[float] = None
    kappa: Optional[float] = None
    diffusion_factor: Optional[float] = None
    friction: Optional[float] = None

    def build(self) -> Union[LeimkuhlerMatthews, SGLD, RMSpropSGLD, SGNHT, KineticLangevin, MALA]:
        """The sampler.

        Raises:
            ValueError: for an argument out of range, or that this sampler does not have.
        """
        return sampler_from({"name": self.name.value, "lr": self.lr, **_given(self)})  # type: ignore[no-any-return]


@dataclass
class LLCConfig:
    """Arguments of :func:`~lightning_slt.estimate_llc` that are plain data, under its names and with its defaults.

    Example:
        >>> import torch
        >>> data = torch.utils.data.TensorDataset(torch.ones(50, 2))
        >>> config = LLCConfig(num_draws=10, num_burnin_steps=5, sampler=EstimateSamplerConfig(lr=1e-3))
        >>> net = torch.nn.Linear(2, 1)
        >>> config.estimate(net, data, lambda module, batch: module(batch[0]).square().mean()).num_draws
        10
    """

    sampler: Optional[EstimateSamplerConfig] = None
    nbeta: Optional[float] = None
    localization: Optional[float] = None
    num_chains: int = 8
    num_draws: int = 200
    num_burnin_steps: Optional[int] = None
    num_steps_bw_draws: Optional[int] = None
    batch_size: Optional[int] = None
    restrict: Optional[list[str]] = None
    seed: int = 0
    device: Optional[str] = None
    full_batch: bool = False
    num_samples: Optional[int] = None
    method: str = "auto"
    tolerance: Optional[Union[int, float, str]] = None

    def estimate(self, module: Any, data: Any, loss_fn: Any = None, weights: Any = None) -> Estimate:
        """The estimate; arguments and errors are those of :func:`~lightning_slt.estimate_llc`."""
        return estimate_llc(module, data, loss_fn, weights=weights, **_arguments(self))


@dataclass
class InfluenceConfig:
    """Arguments of :func:`~lightning_slt.estimate_influence` that are plain data, under its names and defaults."""

    sampler: Optional[EstimateSamplerConfig] = None
    nbeta: Optional[float] = None
    localization: Optional[float] = None
    num_chains: int = 16
    num_draws: int = 20
    num_burnin_steps: int = 6
    num_steps_bw_draws: int = 2
    batch_size: Optional[int] = None
    restrict: Optional[list[str]] = None
    seed: int = 0
    device: Optional[str] = None
    full_batch: Optional[bool] = None
    max_train: Optional[int] = 10_000
    max_query: Optional[int] = None
    per_token: bool = False
    shrinkage: Optional[float] = None
    control_variates: bool = True
    num_samples: Optional[int] = None
    method: str = "auto"

    def estimate(
        self,
        module: Any,
        train_data: Any,
        query_data: Any = None,
        loss_fn: Any = None,
        weights: Any = None,
        group_fn: Any = None,
    ) -> InfluenceEstimate:
        """The estimate; arguments and errors are those of :func:`~lightning_slt.estimate_influence`."""
        others = {"weights": weights, "group_fn": group_fn}
        return estimate_influence(module, train_data, query_data, loss_fn, **others, **_arguments(self))


@dataclass
class DetectorConfig:
    """Arguments of :class:`~lightning_slt.TransitionDetector` and :func:`~lightning_slt.detect_transitions`.

    Example:
        >>> [t.kind for t in DetectorConfig().detect(range(40), [10] * 20 + [20] * 20, [1] * 40, [2] * 20 + [1] * 20)]
        ['A']
    """

    false_alarms: float = 0.05
    min_change: float = 0.0
    at_boundary: str = "annotate"

    def build(self) -> TransitionDetector:
        """The detector for points that come one by one.

        Raises:
            ValueError: for an argument out of range.
        """
        return TransitionDetector(**_arguments(self))

    def detect(self, steps: Any, llc: Any, llc_se: Any, loss: Any, valid: Any = None) -> list[Transition]:
        """Of a whole curve; arguments and errors are those of :func:`~lightning_slt.detect_transitions`."""
        return detect_transitions(steps, llc, llc_se, loss, valid, **_arguments(self))


def _given(sampler: Any) -> dict[str, float]:
    """The arguments that not every sampler has, of those that were given."""
    finer = [f.name for f in dataclasses.fields(sampler) if f.name not in ("name", "lr")]
    return {k: getattr(sampler, k) for k in finer if getattr(sampler, k) is not None}


def _arguments(config: Any) -> dict[str, Any]:
    """The fields of a config as arguments of what it configures, its sampler built."""
    arguments = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if arguments.get("sampler") is not None:
        arguments["sampler"] = arguments["sampler"].build()
    return arguments


@overload
def load(source: Source, overrides: Sequence[str] = ()) -> MonitorConfig: ...
@overload
def load(source: Source, overrides: Sequence[str] = (), *, schema: type[S]) -> S: ...
def load(source: Source, overrides: Sequence[str] = (), *, schema: type[Any] = MonitorConfig) -> Any:
    """Settings from a file or a mapping, with overrides on top, checked against the schema.

    Args:
        source: path of a YAML file, a dict, or an OmegaConf node.
        overrides: ``key=value`` items, nested keys with dots, as from a command line.
        schema: a dataclass with typed fields and defaults.

    Returns:
        An instance of ``schema``.

    Raises:
        ValueError: for an unknown key, a wrong type or a missing value, naming the key, the value and the keys that
            exist there; for an override that is not ``key=value``; for a file that is no YAML mapping; for a folder.
        FileNotFoundError: where there is no such file.
        TypeError: for a source that is neither a path nor a mapping.

    Example:
        >>> load({"num_chains": 8}, ["num_draws=50", "sampler.lr=1e-5"]).sampler
        SamplerConfig(name=<SamplerName.SGLD: 'SGLD'>, lr=1e-05, kappa=None, diffusion_factor=None)
        >>> load({"num_chain": 8})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: num_chain=8: no such setting (did you mean num_chains?). MonitorConfig has every_n_train_steps, ...
    """
    return checked(source, overrides, schema)
