"""Structural transitions of a run: found online and offline, and what the posterior prefers on their two sides."""

from lightning_slt.transitions.detector import TransitionDetector
from lightning_slt.transitions.free_energy import Phase, PhaseComparison, Preference, compare_phases
from lightning_slt.transitions.segmentation import detect_transitions
from lightning_slt.transitions.transition import Transition

__all__ = [
    "Phase",
    "PhaseComparison",
    "Preference",
    "Transition",
    "TransitionDetector",
    "compare_phases",
    "detect_transitions",
]
