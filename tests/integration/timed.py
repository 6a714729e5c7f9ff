"""Training by a clock that only its steps and chain-steps move."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.integration.harness import Scenario, SLTMonitor, tiny_monitor
from tests.integration.models import Plain, loaders

CHAIN_STEPS = 12
"""Of the smallest chains: two of 2 + 4 steps."""


class Clock:
    """Stands in for the module ``time`` in the monitor; a batch and a chain-step take as long as is said."""

    def __init__(self, batch: float = 1.0, chain_step: float = 1.0) -> None:
        self.now, self.batch, self.chain_step = 1e6, batch, chain_step

    def monotonic(self) -> float:
        return self.now


class Timed(Plain):
    """Moves the clock with each step of training and of a chain."""

    clock = Clock()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        type(self).clock.now += type(self).clock.batch if self.training else type(self).clock.chain_step
        return super().training_step(batch, batch_idx)


def budgeted(max_overhead: float = 0.2, **changes: Any) -> SLTMonitor:
    """The smallest chains; every step is a candidate where no cadence is given."""
    return tiny_monitor(**{"every_n_train_steps": None, "max_overhead": max_overhead, **changes})


def scenario(steps: int, **trainer: Any) -> Scenario:
    return Scenario(Timed, loaders, lambda: {"max_epochs": -1, "max_steps": steps, **trainer}, watched=False)


def said(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "max_overhead" in str(w.message)]
