"""One firing ahead of a run: what a monitor will do with a model, and what it will cost."""

from lightning_slt.calibrate.measure import calibrate
from lightning_slt.calibrate.result import Calibration
from lightning_slt.calibrate.settings import monitor_settings, settings_text

__all__ = ["Calibration", "calibrate", "monitor_settings", "settings_text"]
