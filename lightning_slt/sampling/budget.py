"""How good an estimate is to be and what it may cost; and the draws that come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_slt.sampling.segment import STATS_EVERY, Segment

SMALL_LLC = 0.4
"""An LLC below this is as good as this one where errors and drifts are compared with it."""
MAX_STEPS_BW_DRAWS = 32
"""Half of all the steps of a chain at the most, burn-in included, in steps a draw."""
FIRST_ROUNDS = (25, 25, 50)
"""Steps of the rounds in which the step size is found."""
METRIC_ROUNDS = (25, 25, 50, 50)
"""The same where a metric is found as well: its moments are those of the last but one."""
LATER_ROUNDS = (25, 50)
"""The same where the last firing's step size is at hand."""


@dataclass(frozen=True)
class Budget:
    """How good an estimate has to be, and what it may cost; what is None is chosen.

    Attributes:
        num_draws: draws of each chain.
        num_burnin_steps: given, the burn-in is this long once the step size is known.
        num_steps_bw_draws: given, the draws are this many steps apart.
        lr: given, the step size is not looked for.
        tolerance: standard error to reach, as a share of the LLC (of 0.4, where the LLC is below).
        tolerance_llc: the same in units of the LLC; takes the place of ``tolerance`` where it is given.
        max_steps_bw_draws: half of all the steps there may be, burn-in included, in steps a draw.
        second_moment: ``[d]`` mean squared gradients, for a preconditioned sampler to start from.
    """

    num_draws: int
    num_burnin_steps: int | None = None
    num_steps_bw_draws: int | None = None
    lr: float | None = None
    tolerance: float = 0.03
    max_steps_bw_draws: int = MAX_STEPS_BW_DRAWS
    second_moment: Tensor | None = None
    tolerance_llc: float | None = None

    def allowed_error(self, llc: float) -> float:
        """Standard error to reach, in units of the LLC."""
        return self.tolerance * max(abs(llc), SMALL_LLC) if self.tolerance_llc is None else self.tolerance_llc

    @property
    def unit(self) -> int:
        """Steps of the fewest draws. Where the steps between two are not given, so many that the draws have as many
        as their readings speak of; one a draw where that is more than there may be."""
        between = self.num_steps_bw_draws or STATS_EVERY // math.gcd(self.num_draws, STATS_EVERY)
        if self.num_steps_bw_draws is None and between > self.max_steps_bw_draws:
            between = 1
        return self.num_draws * between

    @property
    def longest(self) -> int:
        """The most steps of the draws."""
        return self.num_draws * (self.num_steps_bw_draws or self.max_steps_bw_draws)

    @property
    def grid(self) -> int:
        """Rounds that use up the budget are a multiple of it. It is not left for the sake of the readings: what is less
        than a unit is burn-in."""
        return self.unit if self.unit == self.num_draws * (self.num_steps_bw_draws or 1) else STATS_EVERY

    @property
    def most_steps(self) -> int:
        """The most steps that a chain makes; a search that is followed by a burn-in of given length comes on top."""
        if self.num_burnin_steps is None:
            return 2 * self.longest
        search = sum(METRIC_ROUNDS) if self.lr is None else 0
        return search + self.num_burnin_steps + self.num_draws * (self.num_steps_bw_draws or 1)


@dataclass(frozen=True, eq=False)
class Drawn:
    """The draws, and how they came about.

    Attributes:
        segment: ``num_draws * num_steps_bw_draws`` steps of every chain.
        lr: the step size they were made with.
        num_burnin_steps: steps before them.
        num_steps_bw_draws: steps a draw.
        warm: the chains began where those of the firing before ended.
        repeats: the displacements that they began from are kept, and chains chose their burn-in: the next firing begins
            from these displacements as well, unless there is something wrong with where the chains have been.
    """

    segment: Segment
    lr: float
    num_burnin_steps: int
    num_steps_bw_draws: int
    warm: bool = False
    repeats: bool = False

    @property
    def num_draws(self) -> int:
        """Draws of each chain."""
        return self.segment.steps // self.num_steps_bw_draws
