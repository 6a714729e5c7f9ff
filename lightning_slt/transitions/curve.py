"""What is searched, and what is found: both channels by point, and a step in them."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_slt.transitions.evidence import Array


@dataclass(frozen=True)
class Step:
    """A step found: places are fractional indices of points."""

    score: float
    onset: float
    centre: float
    end: float
    height: float
    height_se: float
    late: float = 0.0  # points by which all three places are later than the loss alone puts them

    @property
    def places(self) -> tuple[float, float, float]:
        """Onset, centre and end by both channels."""
        return self.onset + self.late, self.centre + self.late, self.end + self.late


@dataclass(frozen=True)
class Curve:
    """Both channels by point, spikes of the coefficient removed, with the scatter around each point."""

    steps: Array
    llc: Array
    llc_scatter: Array
    loss: Array
    loss_scatter: Array
    persistence: float = 0.0
