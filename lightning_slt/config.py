"""Structured configs that build the callbacks: a YAML file, a dict or a Hydra node, checked before anything is built.

The schema is a dataclass, so that OmegaConf refuses a typo or a wrong type by the field's name. To have the monitor in
a schema of your own, make :class:`MonitorConfig` the type of one of its fields and pass that schema to :func:`load`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Optional, TypeVar, Union, cast, get_type_hints, overload

import yaml  # OmegaConf's own parser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_slt.callbacks import SLTMonitor, TransitionMonitor
from lightning_slt.sampling.samplers import SGLD, SGNHT, RMSpropSGLD, sampler_from

Source = Union[str, os.PathLike[str], Mapping[str, Any], DictConfig]
"""A YAML file, or what such a file holds."""

S = TypeVar("S")


class SamplerName(Enum):
    """The samplers that a monitor may use."""

    SGLD = "SGLD"
    RMSpropSGLD = "RMSpropSGLD"
    SGNHT = "SGNHT"


@dataclass
class SamplerConfig:
    """Which sampler, and its step size; finer arguments of a sampler are given in Python.

    Args:
        name: SGLD, RMSpropSGLD or SGNHT.
        lr: the step size; None has it calibrated.
    """

    name: SamplerName = SamplerName.SGLD
    lr: Optional[float] = None

    def build(self) -> Union[SGLD, RMSpropSGLD, SGNHT]:
        """The sampler."""
        return sampler_from({"name": self.name.value, "lr": self.lr})


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

    def build(self) -> SLTMonitor:
        """The callback.

        Raises:
            ValueError: for an argument out of range.
        """
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.sampler is not None:
            arguments["sampler"] = self.sampler.build()
        return SLTMonitor(**arguments)


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
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return TransitionMonitor(**arguments)


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
            exist there; for an override that is not ``key=value``; for a file that is no YAML mapping.
        FileNotFoundError: where there is no such file.

    Example:
        >>> load({"num_chains": 8}, ["num_draws=50", "sampler.lr=1e-5"]).sampler
        SamplerConfig(name=<SamplerName.SGLD: 'SGLD'>, lr=1e-05)
        >>> load({"num_chain": 8})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: num_chain=8: no such setting (did you mean num_chains?). MonitorConfig has every_n_train_steps, ...
    """
    given = _read(source)
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not (equals and key.strip()):
            raise ValueError(f"override {item!r}: write it as key=value, such as num_chains=8.")
    try:
        given = cast(DictConfig, OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides))))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"overrides {list(overrides)}: {error}") from error
    _list_single_patterns(given, schema)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error, given, schema)) from error


def _read(source: Source) -> DictConfig:
    """The source as a config of its own, without a schema."""
    where = "the configuration"
    if isinstance(source, DictConfig):
        # resolved here: a node of a larger config may refer to its siblings
        raw: Any = OmegaConf.create(OmegaConf.to_container(source, resolve=True))
    elif isinstance(source, Mapping):
        raw = OmegaConf.create(dict(source))
    else:
        where = str(Path(source))
        try:
            raw = OmegaConf.load(Path(source))
        except yaml.YAMLError as error:
            raise ValueError(f"{where}: not a YAML file: {error}") from error
    if not isinstance(raw, DictConfig):
        raise ValueError(f"{where}: expected settings as 'key: value', got a {type(raw).__name__}.")
    return raw


def _list_single_patterns(node: DictConfig, schema: type[Any]) -> None:
    """``restrict: fc.*`` as ``restrict: [fc.*]``, wherever the schema has a monitor: the callback takes both."""
    if schema is MonitorConfig:
        if isinstance(node.get("restrict"), str):
            node["restrict"] = [node["restrict"]]
        return
    for name, inner in _sections(schema).items():
        if name in node and isinstance(node.get(name), DictConfig):
            _list_single_patterns(node[name], inner)


def _sections(schema: type[Any]) -> dict[str, type[Any]]:
    """The fields that are dataclasses themselves, an ``Optional`` around them taken off."""
    found: dict[str, type[Any]] = {}
    for name, hint in get_type_hints(schema).items():
        options = [t for t in getattr(hint, "__args__", (hint,)) if dataclasses.is_dataclass(t)]
        if options:
            found[name] = cast("type[Any]", options[0])
    return found


def _explain(error: OmegaConfBaseException, given: DictConfig, schema: type[Any]) -> str:
    """One line: which key, which value, what is wrong, and what there is."""
    what = str(error.msg or error).splitlines()[0].rstrip(".")
    plain = OmegaConf.to_container(given, resolve=False)
    full_key = str(error.full_key or error.key or "") or _not_a_section(plain, schema)
    *sections, last = full_key.split("[")[0].split(".")
    owner: Optional[type[Any]] = schema
    value: Any = plain
    for section in sections:
        owner = _sections(owner).get(section) if owner is not None else None
        value = _item(value, section)
    value = _item(value, last)
    if owner is None:
        return f"{full_key}={value!r}: {what}."
    names = [f.name for f in dataclasses.fields(owner)]
    if last not in names:
        near = difflib.get_close_matches(last, names, n=1)
        what = "no such setting" + (f" (did you mean {near[0]}?)" if near else "")
    elif last in _sections(owner) and not isinstance(value, Mapping):
        what = f"expected the settings of a {_sections(owner)[last].__name__}"
    return f"{full_key}={value!r}: {what}. {owner.__name__} has {', '.join(names)}."


def _item(value: Any, key: str) -> Any:
    """``value[key]``, None where there is none; a key that YAML read as a number is found too."""
    return next((v for k, v in value.items() if str(k) == key), None) if isinstance(value, Mapping) else None


def _not_a_section(plain: Any, schema: type[Any]) -> str:
    """The section that was given as something else: OmegaConf does not name it."""
    for name in _sections(schema):
        if name in plain and not isinstance(plain[name], Mapping):
            return name
    return ""
