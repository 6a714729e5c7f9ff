"""What was found as settings of a monitor: what is worth fixing, and what is better found anew at each firing.

Fixed in any case is what decides *which number* is measured, and how well: what was given, the localization (else that
of the first firing's weights, another one in each run), chains and draws; and the cadence. Pinned where that is asked
for is what decides the digits: step size, nbeta, batch size and the path of the chains. Burn-in and steps between draws
are never pinned: given, they switch off the check that the chains have settled, and warm firings would burn in as long
as the first one.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any, Optional, Union

import yaml

from lightning_slt.calibrate.result import MAX_OVERHEAD, Calibration
from lightning_slt.config import MonitorConfig, SamplerConfig
from lightning_slt.sweep.settings import SweepConfig

GIVEN = ("num_burnin_steps", "num_steps_bw_draws", "batch_size", "nbeta", "restrict", "num_samples", "method", "seed")
"""Fields of a sweep that a monitor takes as they are."""
ALWAYS = ("every_n_train_steps", "num_chains", "num_draws", "localization")
"""Written also where they are the defaults."""


def monitor_settings(found: Calibration, pin: bool = False) -> MonitorConfig:
    """Settings of a monitor that measures what was measured.

    Args:
        found: by :func:`~lightning_slt.calibrate.calibrate`.
        pin: with the step size that was found, nbeta, batch size and the path of the chains: every run then has these.
    """
    config, estimate = found.config, found.estimate
    fields: dict[str, Any] = {name: getattr(config, name) for name in GIVEN}
    fields |= {"sampler": config.sampler, "probe": config.probe, "query": _query_of(config)}
    if pin:
        sampler = dataclasses.replace(config.sampler or SamplerConfig(), lr=estimate.step_size)
        fields |= {"sampler": sampler, "nbeta": estimate.nbeta, "batch_size": estimate.batch_size}
        fields |= {"method": estimate.method}
    return MonitorConfig(
        every_n_train_steps=found.every_n_train_steps,
        num_chains=config.num_chains,
        num_draws=config.num_draws,
        localization=estimate.localization,
        **fields,
    )


def _query_of(config: SweepConfig) -> Optional[Union[bool, int]]:
    """Of the validation data; None for the probed samples themselves."""
    if config.query_data is None:
        return None
    return config.query if config.query is not None else True


def settings_text(found: Calibration, pin: bool = False) -> str:
    """:func:`monitor_settings` as the YAML that :func:`lightning_slt.config.load` reads; arguments are those of it."""
    settings = monitor_settings(found, pin)
    default = MonitorConfig()
    given = {
        f.name: _plain(getattr(settings, f.name))
        for f in dataclasses.fields(settings)
        if f.name in ALWAYS or getattr(settings, f.name) != getattr(default, f.name)
    }
    return "".join(f"# {line}\n" for line in _remarks(found, pin)) + yaml.safe_dump(given, sort_keys=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: plain for name, plain in fields.items() if plain is not None}
    return value.value if isinstance(value, Enum) else value


def _remarks(found: Calibration, pin: bool) -> list[str]:
    lines = [
        f"lightning-slt calibrate: {found.of}".replace("\n", " "),
        f"every_n_train_steps: at most {MAX_OVERHEAD:.0%} of the wall-clock, on the machine that measured it",
    ]
    if pin:
        lines.append("pinned: the step size is the one that was found at these weights")
    if not found.estimate.valid:
        lines.append("the estimate that this is of was not valid")
    if found.config.loss_fn is not None:
        lines.append(f"no plain data, to be given in Python: SLTMonitor(loss_fn={found.config.loss_fn})")
    return lines


__all__ = ["monitor_settings", "settings_text"]
