"""Samplers, one algorithm a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Optional

from lightning_slt.sampling.samplers.base import MinibatchSampler, Sampler, SamplerState, empty_state
from lightning_slt.sampling.samplers.kinetic_langevin import KineticLangevin
from lightning_slt.sampling.samplers.leimkuhler_matthews import LeimkuhlerMatthews
from lightning_slt.sampling.samplers.mala import MALA
from lightning_slt.sampling.samplers.rmsprop_sgld import RMSpropSGLD
from lightning_slt.sampling.samplers.sgld import SGLD
from lightning_slt.sampling.samplers.sgnht import SGNHT

BY_NAME: dict[str, type[LeimkuhlerMatthews] | type[SGLD] | type[RMSpropSGLD] | type[SGNHT]] = {
    "LeimkuhlerMatthews": LeimkuhlerMatthews,
    "SGLD": SGLD,
    "RMSpropSGLD": RMSpropSGLD,
    "SGNHT": SGNHT,
}
"""Those that are at home on minibatches: what the configuration of a monitor may name."""

OF_A_CALL: dict[str, type[Any]] = {**BY_NAME, "KineticLangevin": KineticLangevin, "MALA": MALA}
"""Those that a call without a trainer may name: some want all the data at every step."""


def sampler_from(settings: Mapping[str, Any], among: Mapping[str, type[Any]] = OF_A_CALL) -> Any:
    """A sampler from plain settings: its ``name`` (SGLD where none is given), and its arguments.

    Args:
        settings: the name, and arguments that are numbers.
        among: the samplers that may be named.

    Raises:
        ValueError: for a name or an argument that is not there, naming it and those that are.

    Example:
        >>> sampler_from({"name": "SGNHT", "lr": 1e-4})
        SGNHT(lr=0.0001, diffusion_factor=0.01)
    """
    given = {str(key): value for key, value in settings.items()}
    name = given.pop("name", "SGLD")
    if name not in among:
        raise ValueError(f"sampler name={name!r}: must be one of {', '.join(among)}.")
    known = [field.name for field in fields(among[name]) if field.compare]  # a metric is no plain data
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"sampler: unknown key {unknown}; {name} has {known}.")
    return among[name](**given)


def as_sampler(sampler: Any, among: Mapping[str, type[Any]] = OF_A_CALL) -> Optional[Sampler]:
    """A sampler as it is, or built from a mapping (Hydra hands nested arguments over as untyped dicts).

    Args:
        sampler: one, or a mapping.
        among: the samplers that a mapping may name.

    Raises:
        ValueError: for an unknown name or key, naming it.
        TypeError: for a class, text, or anything else.

    Example:
        >>> as_sampler({"name": "SGLD", "lr": 1e-4})
        SGLD(lr=0.0001)
    """
    if isinstance(sampler, type):
        raise TypeError(f"sampler={sampler.__name__}: is a class. Give one of its objects, {sampler.__name__}().")
    if sampler is None or callable(getattr(sampler, "update_", None)):
        return sampler  # type: ignore[no-any-return]
    if isinstance(sampler, Mapping):
        return sampler_from(sampler, among)  # type: ignore[no-any-return]
    raise TypeError(
        f"sampler={sampler!r}: expected a sampler such as SGLD() or SGLD(lr=...), or a mapping such as "
        f"{{'name': 'SGLD'}}, got {type(sampler).__name__}."
    )


__all__ = [
    "BY_NAME",
    "MALA",
    "OF_A_CALL",
    "SGLD",
    "SGNHT",
    "KineticLangevin",
    "LeimkuhlerMatthews",
    "MinibatchSampler",
    "RMSpropSGLD",
    "Sampler",
    "SamplerState",
    "as_sampler",
    "empty_state",
    "sampler_from",
]
