"""Samplers, one algorithm a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
"""Those that need no loss of all the data: what a configuration may name."""


def sampler_from(settings: Mapping[str, Any]) -> LeimkuhlerMatthews | SGLD | RMSpropSGLD | SGNHT:
    """A sampler from plain settings: its ``name`` (SGLD where none is given), and its arguments.

    Raises:
        ValueError: for a name or an argument that is not there, naming it and those that are.

    Example:
        >>> sampler_from({"name": "SGNHT", "lr": 1e-4})
        SGNHT(lr=0.0001, diffusion_factor=0.01)
    """
    given = {str(key): value for key, value in settings.items()}
    name = given.pop("name", "SGLD")
    if name not in BY_NAME:
        raise ValueError(f"sampler name={name!r}: must be one of {', '.join(BY_NAME)}.")
    known = list(BY_NAME[name].__dataclass_fields__)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"sampler: unknown key {unknown}; {name} has {known}.")
    return BY_NAME[name](**given)


__all__ = [
    "BY_NAME",
    "MALA",
    "SGLD",
    "SGNHT",
    "KineticLangevin",
    "LeimkuhlerMatthews",
    "MinibatchSampler",
    "RMSpropSGLD",
    "Sampler",
    "SamplerState",
    "empty_state",
    "sampler_from",
]
