"""Lightning callbacks: the only rooms that know a Trainer."""

from lightning_slt.callbacks.monitor import SLTMonitor
from lightning_slt.callbacks.transitions import TransitionMonitor

__all__ = ["SLTMonitor", "TransitionMonitor"]
