"""A moment of training at which its weights are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from lightning.pytorch import LightningModule, Trainer

from lightning_slt.callbacks.arguments import is_smoke_test
from lightning_slt.callbacks.overhead import Decision
from lightning_slt.sampling.collective import Collective


@dataclass(frozen=True, eq=False)
class Moment:
    """Where training stands when a firing begins.

    Args:
        trainer, module: of the run.
        step: optimiser steps done.
        x: the step under which loggers have it.
        collective: the ranks that measure it together.
        decision: of the overhead budget; None where there is none.
        logs_next: training logs its own metrics at this x right after, should it have any.
    """

    trainer: Trainer
    module: LightningModule
    step: int
    x: int
    collective: Collective
    decision: Optional[Decision] = None
    logs_next: bool = False

    @property
    def epoch(self) -> int:
        return self.trainer.current_epoch

    def notes(self, skipped: int) -> dict[str, Any]:
        """Fields of its estimate that are known before anything is measured.

        Args:
            skipped: firings that were due and left out since the last one.
        """
        notes: dict[str, Any] = {"step": self.step, "x": self.x, "epoch": self.epoch}
        if self.decision is not None:
            notes |= {
                "firing_size": self.decision.size,
                "credit_seconds": self.decision.credit_seconds,
                "predicted_seconds": self.decision.predicted_seconds,
            }
        if self.decision is not None or skipped:
            notes["skipped"] = skipped
        return notes

    @property
    def is_smoke_test(self) -> bool:
        """Whether the run is one of ``fast_dev_run``."""
        return is_smoke_test(self.trainer)


__all__ = ["Moment"]
