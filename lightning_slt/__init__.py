"""Structure of a model, visible while it trains: Lightning callbacks that run SGLD chains from the current weights."""

from lightning_slt.callbacks import SLTMonitor, TransitionMonitor
from lightning_slt.estimate import estimate_llc
from lightning_slt.influence import estimate_influence
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.measures import Influence, LearningCoefficient, Susceptibility
from lightning_slt.record import Estimate
from lightning_slt.sampling.samplers import MALA, SGLD, SGNHT, KineticLangevin, LeimkuhlerMatthews, RMSpropSGLD
from lightning_slt.susceptibility import estimate_susceptibility
from lightning_slt.susceptibility_record import SusceptibilityEstimate
from lightning_slt.transitions import Phase, Transition, TransitionDetector, compare_phases, detect_transitions

__version__ = "0.2.0.dev0"

__all__ = [
    "MALA",
    "SGLD",
    "SGNHT",
    "Estimate",
    "Influence",
    "InfluenceEstimate",
    "KineticLangevin",
    "LearningCoefficient",
    "LeimkuhlerMatthews",
    "Phase",
    "RMSpropSGLD",
    "SLTMonitor",
    "Susceptibility",
    "SusceptibilityEstimate",
    "Transition",
    "TransitionDetector",
    "TransitionMonitor",
    "compare_phases",
    "detect_transitions",
    "estimate_influence",
    "estimate_llc",
    "estimate_susceptibility",
]
