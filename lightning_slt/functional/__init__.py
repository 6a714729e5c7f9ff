"""Pure tensor formulas: no module, no sampler, no trainer."""

from lightning_slt.functional.convergence import effective_sample_size, rhat, standard_error, surely
from lightning_slt.functional.learning_coefficient import Summary, learning_coefficient, summarise
from lightning_slt.functional.posterior import LocalPosterior, default_nbeta

__all__ = [
    "LocalPosterior",
    "Summary",
    "default_nbeta",
    "effective_sample_size",
    "learning_coefficient",
    "rhat",
    "standard_error",
    "summarise",
    "surely",
]
