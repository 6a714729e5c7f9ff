"""What a firing ahead of a run showed, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

from lightning_slt.callbacks.overhead import OverheadBudget
from lightning_slt.record import Estimate
from lightning_slt.sweep.settings import SweepConfig

MAX_OVERHEAD = 0.05
"""The share of a run's wall-clock that later firings take at the cadence that is named."""
_DIGITS = 2
"""Significant digits of a cadence; it is rounded up to them."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """One firing from the weights, another one from its chains, and a step of training, on this machine.

    Attributes:
        of: whose weights they are, in words.
        config: what was asked for.
        estimate: of the first firing, a cold one; that of a sweep at these weights.
        later: of the second firing, at the same weights.
        warm: whether the second one started from the chains of the first; else those were not fit to be kept.
        first_seconds, later_seconds: of the two firings.
        training_seconds: of a forward and a backward pass of the whole module, one minibatch of training.
        training_batch: samples in it.
        chunk: chains that are computed at a time.
        unstable_step: the step size at which chains no longer hold at these weights; None where it is not known.
        peak_bytes: most memory that the first firing took on a GPU; None where it is not known.
    """

    of: str
    config: SweepConfig
    estimate: Estimate
    later: Estimate
    warm: bool
    first_seconds: float
    later_seconds: float
    training_seconds: float
    training_batch: int
    chunk: int
    unstable_step: Optional[float] = None
    peak_bytes: Optional[int] = None

    @property
    def step_share(self) -> Optional[float]:
        """The step size as a share of the unstable one."""
        return self.estimate.step_size / self.unstable_step if self.unstable_step else None

    @property
    def heat_share(self) -> float:
        """That of the estimate (:attr:`~lightning_slt.Estimate.heat_share`)."""
        return self.estimate.heat_share

    @property
    def every_n_train_steps(self) -> int:
        """The closest cadence at which later firings take at most 5 % of the wall-clock of a run."""
        return cadence(self.later_seconds, self.training_seconds)

    @property
    def first_in_steps(self) -> int:
        """Training steps that take as long as the first firing."""
        return math.ceil(self.first_seconds / self.training_seconds)


def cadence(firing_seconds: float, step_seconds: float, share: float = MAX_OVERHEAD) -> int:
    """Training steps between firings of so many seconds that take at most this share of the wall-clock: the smallest
    number of two digits.

    Example:
        >>> cadence(1.0, 0.01), cadence(1.0, 19.0), cadence(1.0, 0.0085)
        (1900, 1, 2300)
    """
    steps = math.ceil(firing_seconds / (OverheadBudget(share).rate * step_seconds) * (1 - 1e-9))
    unit = 10 ** max(0, len(str(steps)) - _DIGITS)
    return -(-steps // unit) * unit


__all__ = ["MAX_OVERHEAD", "Calibration", "cadence"]
