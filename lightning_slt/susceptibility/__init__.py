"""Susceptibility of components to a shift of the data: covariances of an LLC with losses over the local posterior."""

from lightning_slt.susceptibility.firing import measure_susceptibility
from lightning_slt.susceptibility.one_call import estimate_susceptibility
from lightning_slt.susceptibility.reading import MIN_READS
from lightning_slt.susceptibility.shift import Shift, chain_batch

__all__ = ["MIN_READS", "Shift", "chain_batch", "estimate_susceptibility", "measure_susceptibility"]
