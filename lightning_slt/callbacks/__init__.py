"""Lightning callbacks: the only rooms that know a Trainer."""

from lightning_slt.callbacks.monitor import SLTMonitor

__all__ = ["SLTMonitor"]
