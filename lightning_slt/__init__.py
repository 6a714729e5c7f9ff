"""Structure of a model, visible while it trains: Lightning callbacks that run SGLD chains from the current weights.

Names are imported when they are first asked for: ``lightning-slt --version`` need not wait seconds for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_ROOMS = {
    "MALA": "sampling.samplers",
    "SGLD": "sampling.samplers",
    "SGNHT": "sampling.samplers",
    "Estimate": "record",
    "Influence": "measures",
    "InfluenceEstimate": "influence_record",
    "KineticLangevin": "sampling.samplers",
    "LearningCoefficient": "measures",
    "LeimkuhlerMatthews": "sampling.samplers",
    "Phase": "transitions",
    "RMSpropSGLD": "sampling.samplers",
    "SLTMonitor": "callbacks",
    "Susceptibility": "measures",
    "SusceptibilityEstimate": "susceptibility_record",
    "Transition": "transitions",
    "TransitionDetector": "transitions",
    "TransitionMonitor": "callbacks",
    "compare_phases": "transitions",
    "detect_transitions": "transitions",
    "estimate_influence": "influence",
    "estimate_llc": "estimate",
    "estimate_susceptibility": "susceptibility",
}
"""Where each of these names is; the same as above, for what looks at types without running anything."""

if not TYPE_CHECKING:  # to a type checker a name that is not there is none

    def __getattr__(name: str) -> Any:
        """A name of this package, or a module in it, which is imported now.

        Raises:
            AttributeError: where there is none.
        """
        if name in _ROOMS:
            found = getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
            globals()[name] = found
            return found
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
