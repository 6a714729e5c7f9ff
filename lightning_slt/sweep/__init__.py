"""Stored checkpoints measured after the fact: the curve of a run that nobody watched."""

from lightning_slt.sweep.run import SweepResult, sweep
from lightning_slt.sweep.settings import SweepConfig

__all__ = ["SweepConfig", "SweepResult", "sweep"]
