"""Structure of a model, visible while it trains: Lightning callbacks that run SGLD chains from the current weights."""

from lightning_slt.callbacks import SLTMonitor
from lightning_slt.estimate import estimate_llc
from lightning_slt.measures import LearningCoefficient
from lightning_slt.record import Estimate
from lightning_slt.sampling.samplers import MALA, SGLD, SGNHT, RMSpropSGLD

__version__ = "0.1.0"

__all__ = [
    "MALA",
    "SGLD",
    "SGNHT",
    "Estimate",
    "LearningCoefficient",
    "RMSpropSGLD",
    "SLTMonitor",
    "estimate_llc",
]
