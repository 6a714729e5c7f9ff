"""Burn-in and length: chains run in rounds until what their trace shows will do as an estimate.

Each round is half as long as all before. What is burn-in is read off the trace: the cut that makes the standard error
of the rest smallest (the MSER rule of White 1997), of half the steps at the most; or half of it, where that is what it
takes to have arrived. It is enough when the rest is flat (no drift between its halves beyond the error), its error is
within the tolerance, what directions that are reached last still owe is within it too (virial ratio), the step was
right, and it is as long as all that went before (half as long, where the rise has been seen: arrived in their later
half, or after another step); or when the budget is used, which the verdict on the estimate then says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_slt.functional.convergence import standard_error
from lightning_slt.functional.learning_coefficient import half_change
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.budget import SMALL_LLC, Budget, Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.readings import transient, virial_readings
from lightning_slt.sampling.samplers.base import Heating
from lightning_slt.sampling.segment import Segment
from lightning_slt.sampling.step_size import next_step

WARM, DRAWS, GENERATION = 500, 1000, 10_000
"""Streams of random numbers: below 500 those of the search for the step, then those of the first steps of warm chains,
then those of the draws; and anew for each generation of kept displacements."""
MAX_OWED = 0.07
"""Shortfall of the virial ratio above which more rounds are run while there is budget, whatever the tolerance."""
LATE = 0.25
"""Share of the trace that may be cut off as burn-in while the kept displacements are still said to fit."""
TOO_HOT, TOO_COLD = 0.4, 2.5
"""A step wanted in the rounds, in those of the step there is, beyond which the draws are made anew. Heat is measured
and taken off, so that it may be two and a half times what is aimed at; a step too small costs time alone: it is changed
at once or never."""
GROWTH = 0.5
"""Steps of a round, as a share of all before it at the same step size."""
LEAST_STEPS = 50
"""Steps of a chain in an estimate: the error of shorter ones is not known (84-90 % coverage for 95 %)."""
LEAST_MEMORIES = 6
"""The same of chains with momenta, in :meth:`~lightning_slt.sampling.samplers.Sampler.energy_memory`: over fewer the
error of the mean is not known either, and what is left of the start's swing is a part of it."""
FLAT = 0.05
"""Drift within the last round that is tolerated, as a share of the LLC (of 0.4, where the LLC is below)."""


@dataclass
class Start:
    """Where the search for the step size leaves the chains.

    Attributes:
        step: to go on with.
        ceiling: never to be exceeded.
        done: steps each chain has made.
        head: the last of them, where they were made with ``step``.
        warm: whether they come from kept displacements.
        bears: the largest step that warm chains may bear, as far as it is known, whatever this firing is held to.
    """

    step: float
    ceiling: float
    done: int
    head: list[Segment]
    warm: bool = False
    bears: float = math.inf


def until_good(chains: Chains, start: Start, budget: Budget, generation: int) -> tuple[Drawn, bool]:
    """Rounds until the trace is good, or the budget is used; with it, whether it was flat from the start."""
    rounds = _Rounds(chains, start, budget, generation)
    while True:
        newest = rounds.advance()
        wanted, settled = rounds.next_step(newest)
        look = rounds.look()
        if (settled and look.is_good) or (rounds.number > 1 and look.is_downhill):
            break
        if not rounds.plan(newest, wanted, settled):
            break
    return rounds.drawn(look)


@dataclass(frozen=True, eq=False)
class _Look:
    """What the rounds at the present step are good for.

    Attributes:
        kept: the draws there would be.
        is_good: long enough, arrived, flat, and precise enough.
        is_downhill: chains have found lower losses than at ``w*``.
        fits: flat, and from the start.
    """

    kept: Segment
    is_good: bool
    is_downhill: bool
    fits: bool


class _Rounds:
    """Rounds of steps, what they have shown, and how long the next one is.

    Lengths are multiples of a unit, the steps of the fewest draws that can be kept: :attr:`Budget.unit`.

    Attributes:
        number: rounds made.
    """

    def __init__(self, chains: Chains, start: Start, budget: Budget, generation: int) -> None:
        self._chains, self._budget, self._ceiling = chains, budget, start.ceiling
        self._noise = DRAWS + GENERATION * generation
        self._step, self._pieces = start.step, list(start.head)
        self._before = start.done - sum(piece.steps for piece in self._pieces)  # steps that are burn-in in any case
        self._spent, self._length, self._steady = start.done, budget.unit, True
        self._bears = start.bears if start.warm else 0.0
        self._asked_for = start.step
        self.number = 0

    def advance(self) -> Segment:
        """One more round. It has the same noise at every firing, whatever came before it."""
        self._chains.reseed(self._noise + self.number)
        segment = self._chains.advance(self._length, self._step)
        self.number += 1
        self._spent += self._length
        self._pieces.append(segment)
        self._joined = Segment.join(self._pieces)
        return segment

    def next_step(self, newest: Segment) -> tuple[float, bool]:
        """The step that these rounds ask for, and whether the one there is will do."""
        if self._budget.lr is not None:
            return self._step, True
        chains, joined = self._chains, self._joined
        all_finite = bool(newest.finite.all())
        # heat is a mean over few numbers with long tails: of all there is, but the start
        known = joined if joined.steps < 2 * LEAST_STEPS else joined.second_half()
        early = self._spent < self._budget.longest
        known = known if all_finite else newest
        self._asked_for, settled = next_step(chains, known, self._step, math.inf, put_back=early)
        wanted = min(self._asked_for, self._ceiling)
        if chains.sampler.calibration == "heat" and all_finite:
            settled = will_do(self._step, wanted, first=self.number == 1)
        return wanted, settled

    def look(self) -> _Look:
        """Tell burn-in from draws, and whether the draws will do."""
        joined, unit, nbeta = self._joined, self._budget.unit, self._chains.posterior.nbeta
        burnin = transient(nbeta * joined.difference[joined.finite])
        units = (joined.steps - burnin) // unit
        kept = joined.last(max(units, 1) * unit)
        arrived, halved = self._has_arrived(kept), False
        if not arrived and units >= 2:
            # what the trace's own scatter hides is burn-in all the same
            later = kept.last(units // 2 * unit)
            arrived = self._has_arrived(later)
            kept, halved = (later, True) if arrived else (kept, False)
        flat = is_flat(kept, self._budget, nbeta)
        enough = units >= 1 and kept.steps >= self._least(kept, halved)
        return _Look(
            kept,
            is_good=enough and arrived and flat and _is_precise(kept, self._budget, nbeta),
            is_downhill=is_downhill(kept, nbeta),
            fits=self._steady and burnin <= LATE * joined.steps and flat,
        )

    def _least(self, kept: Segment, halved: bool) -> float:
        """Steps that draws must have. Shorter than what went before them they would be the end of a rise that they are
        too short to show; half of it will do where the rise has been seen: they are its later half, or it was under
        another step."""
        before = (self._before + self._joined.steps - kept.steps) * (0.5 if halved or not self._steady else 1.0)
        return max(LEAST_STEPS, LEAST_MEMORIES * self._chains.sampler.energy_memory(self._step), before)

    def _has_arrived(self, segment: Segment) -> bool:
        heating = self._chains.sampler.heating(self._step)
        return has_arrived(segment, heating, self._chains.posterior, self._chains.layout.num_weights, self._budget)

    def plan(self, newest: Segment, wanted: float, settled: bool) -> bool:
        """Settle the length of the next round and its step; False where the budget is used."""
        unit, grid, longest = self._budget.unit, self._budget.grid, self._budget.longest
        all_finite = bool(newest.finite.all())
        left = (2 * longest - self._spent) // grid * grid
        if left < grid and (self.number > 1 or (grid < unit and all_finite)):
            return False
        # late in the budget a new step would leave too few draws: the heat of this one is measured and taken off anyway
        if not settled and (self._spent < longest or not all_finite):
            self._before += self._joined.steps
            self._step, self._pieces, self._steady = wanted, [], False
        # a share of all before, or what is left of the budget
        share = math.ceil(GROWTH * sum(piece.steps for piece in self._pieces) / unit) * unit
        self._length = max(min(max(share, unit), left), grid if self._pieces else unit)
        return True

    def drawn(self, look: _Look) -> tuple[Drawn, bool]:
        """The draws, and whether they were flat from the start."""
        kept = look.kept if self._budget.num_steps_bw_draws is None else look.kept.last(self._budget.unit)
        done = self._before + self._joined.steps - kept.steps
        # a much larger step is looked for at the start of a firing, which has to have the width that asks for it
        cold = min(self._asked_for, self._bears) >= TOO_COLD * self._step
        return Drawn(kept, self._step, done, kept.steps // self._budget.num_draws), look.fits and not cold


def will_do(step: float, wanted: float, first: bool) -> bool:
    """Whether a step is near enough to the one wanted for draws; at a first look one that is too small is not."""
    return wanted > TOO_HOT * step and (not first or wanted < TOO_COLD * step)


def has_arrived(segment: Segment, heating: Heating, posterior: LocalPosterior, d: int, budget: Budget) -> bool:
    """Whether the directions that are reached last owe the LLC no more than the tolerance.

    They look flat, and show in the virial ratio alone. On a regular model the LLC lacks the share that the ratio lacks;
    on singular ones less (0.4 to 0.6 of it were measured on networks, nothing on reduced-rank regression).
    """
    finite = segment.finite
    ratios = virial_readings(segment, heating.virial_step, posterior, d, shared=heating.noise_alone)
    level = abs(posterior.nbeta * float(segment.difference[finite].mean())) if bool(finite.any()) else 0.0
    allowed = budget.allowed_error(level) / max(level, SMALL_LLC)
    return float(ratios.mean()) >= 1.0 - min(allowed, MAX_OWED)


def is_downhill(segment: Segment, nbeta: float) -> bool:
    """Far below zero: the verdict is clear, and more steps would only run further down."""
    trace = nbeta * segment.difference[segment.finite]
    return len(trace) > 0 and float(trace.mean()) + 5 * standard_error(trace) < -SMALL_LLC


def _draws(segment: Segment, budget: Budget, nbeta: float) -> Tensor:
    """``[finite chains, num_draws]``, the integrand."""
    trace = nbeta * segment.difference[segment.finite]
    return trace.reshape(len(trace), budget.num_draws, -1).mean(dim=2) if len(trace) else trace


def is_flat(segment: Segment, budget: Budget, nbeta: float) -> bool:
    """No drift between the halves beyond the error, as far as this segment can tell."""
    trace = _draws(segment, budget, nbeta)
    if not len(trace):
        return False
    level = max(abs(float(trace.mean())), SMALL_LLC)
    drift, drift_error = half_change(trace)
    return abs(drift) <= max(FLAT * level, 2 * drift_error) and abs(drift) <= 4 * FLAT * level


def _is_precise(segment: Segment, budget: Budget, nbeta: float) -> bool:
    trace = _draws(segment, budget, nbeta)
    return len(trace) > 0 and standard_error(trace) <= budget.allowed_error(float(trace.mean()))
