"""Samplers, one algorithm a file."""

from lightning_slt.sampling.samplers.base import Sampler
from lightning_slt.sampling.samplers.sgld import SGLD

__all__ = ["SGLD", "Sampler"]
