"""Samplers, one algorithm a file."""

from lightning_slt.sampling.samplers.base import MinibatchSampler, Sampler, SamplerState, empty_state
from lightning_slt.sampling.samplers.kinetic_langevin import KineticLangevin
from lightning_slt.sampling.samplers.mala import MALA
from lightning_slt.sampling.samplers.rmsprop_sgld import RMSpropSGLD
from lightning_slt.sampling.samplers.sgld import SGLD
from lightning_slt.sampling.samplers.sgnht import SGNHT

__all__ = [
    "MALA",
    "SGLD",
    "SGNHT",
    "KineticLangevin",
    "MinibatchSampler",
    "RMSpropSGLD",
    "Sampler",
    "SamplerState",
    "empty_state",
]
