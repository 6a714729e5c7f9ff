"""What a monitor has measured in a run, oldest first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from lightning_slt.influence_record import InfluenceEstimate, suspicion_of
from lightning_slt.record import Estimate
from lightning_slt.susceptibility_record import SusceptibilityEstimate

Found = TypeVar("Found", Estimate, InfluenceEstimate, SusceptibilityEstimate)


class History:
    """The points of a run's curves.

    Attributes:
        estimates: of the learning coefficient.
        influences: of the probed samples; the last one alone has its pairs.
        susceptibilities: of components.
        skipped: firings that were due and left out since the last one.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Another run has none, whatever was measured before."""
        self.estimates: list[Estimate] = []
        self.influences: list[InfluenceEstimate] = []
        self.susceptibilities: list[SusceptibilityEstimate] = []
        self.skipped = 0

    def add_influence(self, influence: InfluenceEstimate, estimate: Estimate) -> InfluenceEstimate:
        """One more, read off the chains of ``estimate``; returned as it is kept, with what earlier ones say of it."""
        influence = influence.replace(
            step=estimate.step,
            x=estimate.x,
            epoch=estimate.epoch,
            component=estimate.component,
            seconds=estimate.seconds,
        )
        influence = influence.replace(suspicion=suspicion_of([*self.influences, influence]))
        if self.influences:
            self.influences[-1] = self.influences[-1].without_pairs()
        self.influences.append(influence)
        return influence

    def add_recorded(
        self,
        estimates: list[Estimate],
        influences: list[InfluenceEstimate],
        susceptibilities: list[SusceptibilityEstimate],
    ) -> None:
        """What a record has and this lacks."""
        self.estimates = _in_order(self.estimates, estimates)
        self.susceptibilities = _in_order(self.susceptibilities, susceptibilities)
        self.influences = _in_order(self.influences, influences)
        self.influences[:-1] = [influence.without_pairs() for influence in self.influences[:-1]]

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        return {
            "estimates": [estimate.state_dict() for estimate in self.estimates],
            "influences": [influence.without_pairs().state_dict() for influence in self.influences],
            "susceptibilities": [found.state_dict() for found in self.susceptibilities],
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """That of a checkpoint in place of this."""
        self.estimates = [Estimate.from_state_dict(found) for found in state["estimates"]]
        self.influences = [InfluenceEstimate.from_state_dict(found) for found in state.get("influences", [])]
        self.susceptibilities = [
            SusceptibilityEstimate.from_state_dict(found) for found in state.get("susceptibilities", [])
        ]
        self.skipped = int(state.get("skipped", 0))

    def has(self, step: int) -> bool:
        """Whether there is an estimate at this step."""
        return any(estimate.step == step for estimate in self.estimates)


def _in_order(history: list[Found], more: list[Found]) -> list[Found]:
    """By step; nothing is moved where there is no more."""
    return sorted(history + more, key=lambda found: found.step or 0) if more else history


__all__ = ["History"]
