"""Step size, burn-in and length, chosen from the chains themselves: no user has to guess them.

**Step size.** By trial, in a few rounds: :mod:`lightning_slt.sampling.step_size`.

**Burn-in and length.** Once the step is found it is frozen, and the chains run in rounds, each half as long as all
before. What is burn-in is then read off the trace: the cut that makes the standard error of the rest smallest (the MSER
rule of White 1997), of half the steps at the most; or half of it, where that is what it takes to have arrived. It is
enough when the rest is flat (no drift between its halves beyond the error), its error is within the tolerance, what
directions that are reached last still owe is within it too (virial ratio), the step was right, and it is as long as all
that went before (half as long, where the rise has been seen: arrived in their later half, or after another step); or
when the budget is used, which the verdict on the estimate then says.

**Warm chains** skip the search and most of the burn-in: see :mod:`lightning_slt.sampling.memory`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_slt.functional.convergence import standard_error
from lightning_slt.functional.learning_coefficient import half_change
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.readings import diverged, transient, virial_readings
from lightning_slt.sampling.samplers.base import Heating
from lightning_slt.sampling.segment import STATS_EVERY, Segment
from lightning_slt.sampling.step_size import agreed_first_step, largest_step, next_step

MAX_OWED = 0.07
"""Shortfall of the virial ratio above which more rounds are run while there is budget, whatever the tolerance."""
MIN_VIRIAL = 0.7
"""Virial ratio below which chains that have used their budget have not reached their width: the number is not valid.
Between the two lie singular models, whose free directions take longest and matter least."""
MAX_VIRIAL = 1.4
"""Virial ratio above which, beyond its error, chains are wider than the posterior: minibatches or a step of the search
have thrown them there, and the step that is right since is too small to bring them back."""
WARM, DRAWS, _GENERATION = 500, 1000, 10_000
"""Streams of random numbers: below 500 those of the search for the step, then those of the first steps of warm chains,
then those of the draws; and anew for each generation of kept displacements."""
WARM_SHARE = 0.25
"""Steps of warm chains before their draws, as a share of the draws: the stiff directions settle in them."""
LATE = 0.25
"""Share of the trace that may be cut off as burn-in while the kept displacements are still said to fit."""
TOO_HOT, TOO_COLD = 0.5, 2.5
"""A step wanted in the rounds, in those of the step there is, beyond which the draws are made anew. Heat is measured
and taken off, so that it may be twice what is aimed at; a step too small costs time alone: it is changed at once or
never."""
GROWTH = 0.5
"""Steps of a round, as a share of all before it at the same step size."""
LEAST_STEPS = 50
"""Steps of a chain in an estimate: the error of shorter ones is not known (84-90 % coverage for 95 %)."""
LEAST_MEMORIES = 6
"""The same of chains with momenta, in :meth:`~lightning_slt.sampling.samplers.Sampler.energy_memory`: over fewer the
error of the mean is not known either, and what is left of the start's swing is a part of it."""
BEGINNING = 2.0
"""The step that the search begins with, in those of :func:`~lightning_slt.sampling.step_size.first_step`."""
SMALL_LLC = 0.4
"""An LLC below this is as good as this one where errors and drifts are compared with it."""
FIRST_ROUNDS = (25, 25, 50)
"""Steps of the rounds in which the step size is found."""
METRIC_ROUNDS = (25, 25, 50, 50)
"""The same where a metric is found as well: its moments are those of the last but one."""
LATER_ROUNDS = (25, 50)
"""The same where the last firing's step size is at hand."""
MAX_STEPS_BW_DRAWS = 32
"""Half of all the steps of a chain at the most, burn-in included, in steps a draw."""
FLAT = 0.05
"""Drift within the last round that is tolerated, as a share of the LLC (of 0.4, where the LLC is below)."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """The draws, and how they came about.

    Attributes:
        segment: ``num_draws * num_steps_bw_draws`` steps of every chain.
        lr: the step size they were made with.
        num_burnin_steps: steps before them.
        num_steps_bw_draws: steps a draw.
    """

    segment: Segment
    lr: float
    num_burnin_steps: int
    num_steps_bw_draws: int

    @property
    def num_draws(self) -> int:
        """Draws of each chain."""
        return self.segment.steps // self.num_steps_bw_draws


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
    def least_steps_bw_draws(self) -> int:
        """Where they are not given: so many that the draws have as many steps as their readings speak of; 1 where that
        is more than there may be."""
        least = STATS_EVERY // math.gcd(self.num_draws, STATS_EVERY)
        return least if least <= self.max_steps_bw_draws else 1

    @property
    def most_steps(self) -> int:
        """The most steps that a chain makes; a search that is followed by a burn-in of given length comes on top."""
        if self.num_burnin_steps is None:
            return 2 * self.num_draws * (self.num_steps_bw_draws or self.max_steps_bw_draws)
        search = sum(METRIC_ROUNDS) if self.lr is None else 0
        return search + self.num_burnin_steps + self.num_draws * (self.num_steps_bw_draws or 1)


def draw(chains: Chains, seed: int, budget: Budget, memory: ChainMemory | None = None) -> Drawn:
    """Find the step size, burn in, and draw.

    Args:
        chains: at ``w*``.
        seed: of the probe of the curvature.
        budget: what is given, and what the rest may cost.
        memory: what the last firing left; it is brought up to date for the next one.
    """
    wanted = memory is not None
    memory = memory if memory is not None else ChainMemory()
    if budget.second_moment is not None:
        chains.precondition(budget.second_moment)
    start = _warm_start(chains, budget, memory)
    warm = start is not None
    start = start or _cold_start(chains, seed, budget, memory)
    if budget.num_burnin_steps is not None:
        drawn, fits = _given_length(chains, start, budget, memory.generation)
    else:
        drawn, fits = _until_good(chains, start, budget, memory.generation)
    memory.lr = drawn.lr if budget.lr is None else None
    nbeta = chains.posterior.nbeta
    if bool(diverged(drawn.segment, nbeta, chains.layout.num_weights).any()) or _is_downhill(drawn.segment, nbeta):
        memory.forget()
    elif wanted and not (warm and fits):  # a call that nobody follows keeps no copy of its chains
        memory.keep(chains)
    return drawn


@dataclass
class _Start:
    """Where the search for the step size leaves the chains.

    Attributes:
        step: to go on with.
        ceiling: never to be exceeded.
        done: steps each chain has made.
        head: the last of them, where they were made with ``step``.
        warm: whether they come from kept displacements.
    """

    step: float
    ceiling: float
    done: int
    head: list[Segment]
    warm: bool = False


def _warm_start(chains: Chains, budget: Budget, memory: ChainMemory) -> _Start | None:
    """From the kept displacements; None where there are none, or where they turn out not to fit at all."""
    kept = memory.start_of(chains)
    step = budget.lr if budget.lr is not None else memory.lr
    if not all(chains.collective.exchange(lambda: kept is not None)) or step is None or kept is None:
        return None
    chains.place(kept)
    chains.fix_preconditioner(memory.preconditioner)
    chains.reseed(WARM + _GENERATION * memory.generation)
    length = budget.num_burnin_steps
    if length is None:
        length = max(math.ceil(WARM_SHARE * budget.num_draws), STATS_EVERY)
    segment = chains.advance(length, step)
    if length and bool(diverged(segment, chains.posterior.nbeta, chains.layout.num_weights).any()):
        chains.restart()
        return None
    settled = True
    if budget.lr is None and budget.num_burnin_steps is None:
        wanted, settled = next_step(chains, segment, step, math.inf)
        if chains.sampler.calibration == "heat" and bool(segment.finite.all()):
            settled = TOO_HOT * step < wanted < TOO_COLD * step
        step = step if settled else wanted
    return _Start(step, math.inf, length, [segment] if settled else [], warm=True)


def _cold_start(chains: Chains, seed: int, budget: Budget, memory: ChainMemory) -> _Start:
    """From ``w*``: the step size, and the preconditioner where the sampler wants one."""
    given, known = budget.lr, memory.lr
    if given is not None and not chains.sampler.preconditioned:
        return _Start(given, math.inf, 0, [])
    ceiling = math.inf
    if given is None:
        safe = agreed_first_step(chains, seed)
        ceiling = largest_step(chains.sampler, safe)
        step = min(known if known is not None else BEGINNING * safe, ceiling)
    else:
        step = given
    rounds: tuple[int, ...] = FIRST_ROUNDS if known is None else LATER_ROUNDS
    rounds = METRIC_ROUNDS if chains.sampler.preconditioned else rounds
    done, head = 0, []
    for number, length in enumerate(rounds):
        last = number + 1 == len(rounds)
        chains.learn_preconditioner(keep_learning=not last)
        chains.reseed(number)
        # only the last of these rounds may become draws: what the others would read is thrown away
        segment = chains.advance(length, step, read=last)
        done += length
        wanted, settled = next_step(chains, segment, step, ceiling) if given is None else (step, True)
        head = [segment] if settled and last else []
        step = step if head else wanted
    return _Start(step, ceiling, done, head)


def _given_length(chains: Chains, start: _Start, budget: Budget, generation: int) -> tuple[Drawn, bool]:
    """Burn-in and draws of the lengths asked for; with them, whether the draws are flat."""
    assert budget.num_burnin_steps is not None
    done = start.done
    chains.reseed(DRAWS + _GENERATION * generation)
    if not start.warm:
        if budget.num_burnin_steps:
            chains.advance(budget.num_burnin_steps, start.step, read=False)
        done += budget.num_burnin_steps
    between = budget.num_steps_bw_draws or 1
    segment = chains.advance(budget.num_draws * between, start.step)
    return Drawn(segment, start.step, done, between), _is_flat(segment, budget, chains.posterior.nbeta)


def _until_good(chains: Chains, start: _Start, budget: Budget, generation: int) -> tuple[Drawn, bool]:
    """Rounds until the trace is good, or the budget is used; with it, whether it was flat from the start."""
    unit = budget.num_draws * (budget.num_steps_bw_draws or budget.least_steps_bw_draws)
    longest = budget.num_draws * (budget.num_steps_bw_draws or budget.max_steps_bw_draws)
    # the budget is not left for the sake of the readings: what is less than a unit is burn-in
    grid = unit if unit == budget.num_draws * (budget.num_steps_bw_draws or 1) else STATS_EVERY
    step, done, pieces = start.step, start.done - sum(p.steps for p in start.head), list(start.head)
    d, posterior = chains.layout.num_weights, chains.posterior
    heats = chains.sampler.calibration == "heat"
    length, rounds, spent, steady = unit, 0, start.done, True
    while True:
        # a round has the same noise at every firing, whatever came before it
        chains.reseed(DRAWS + _GENERATION * generation + rounds)
        segment = chains.advance(length, step)
        rounds += 1
        spent += length
        pieces.append(segment)
        joined = Segment.join(pieces)
        burnin = transient(posterior.nbeta * joined.difference[joined.finite])
        units = (joined.steps - burnin) // unit
        kept = joined.last(max(units, 1) * unit)
        wanted, settled = step, True
        if budget.lr is None:
            # heat is a mean over few numbers with long tails: of all there is, but the start
            known = joined if joined.steps < 2 * LEAST_STEPS else joined.second_half()
            known = known if bool(segment.finite.all()) else segment
            wanted, settled = next_step(chains, known, step, start.ceiling, put_back=spent < longest)
            if heats and bool(segment.finite.all()):
                settled = wanted > TOO_HOT * step and (rounds > 1 or wanted < TOO_COLD * step)
        heating = chains.sampler.heating(step)
        arrived, halved = _has_arrived(kept, heating, posterior, d, budget), False
        if not arrived and units >= 2:
            # what the trace's own scatter hides is burn-in all the same
            later = kept.last(units // 2 * unit)
            arrived = _has_arrived(later, heating, posterior, d, budget)
            kept, halved = (later, True) if arrived else (kept, False)
        # draws shorter than what went before them would be the end of a rise that they are too short to show; half of
        # it will do where the rise has been seen: they are its later half, or it was under another step
        least = max(LEAST_STEPS, LEAST_MEMORIES * chains.sampler.energy_memory(step))
        before = (done + joined.steps - kept.steps) * (0.5 if halved or not steady else 1.0)
        enough = units >= 1 and kept.steps >= max(least, before)
        if enough and settled and arrived and _is_good(kept, budget, posterior.nbeta):
            break
        if rounds > 1 and _is_downhill(kept, posterior.nbeta):
            break
        left = (2 * longest - spent) // grid * grid
        if left < grid and (rounds > 1 or (grid < unit and bool(segment.finite.all()))):
            break
        # late in the budget a new step would leave too few draws: the heat of this one is measured and taken off anyway
        if not settled and (spent < longest or not bool(segment.finite.all())):
            done += joined.steps
            step, pieces, steady = wanted, [], False
        # a share of all before, or what is left of the budget
        share = math.ceil(GROWTH * sum(p.steps for p in pieces) / unit) * unit
        length = max(min(max(share, unit), left), grid if pieces else unit)
    fits = steady and burnin <= LATE * joined.steps and _is_flat(kept, budget, posterior.nbeta)
    if budget.num_steps_bw_draws is not None:
        kept = kept.last(unit)
    return Drawn(kept, step, done + joined.steps - kept.steps, kept.steps // budget.num_draws), fits


def _has_arrived(segment: Segment, heating: Heating, posterior: LocalPosterior, d: int, budget: Budget) -> bool:
    """Whether the directions that are reached last owe the LLC no more than the tolerance.

    They look flat, and show in the virial ratio alone. On a regular model the LLC lacks the share that the ratio lacks;
    on singular ones less (0.4 to 0.6 of it were measured on networks, nothing on reduced-rank regression).
    """
    finite = segment.finite
    ratios = virial_readings(segment, heating.virial_step, posterior, d, shared=heating.noise_alone)
    level = abs(posterior.nbeta * float(segment.difference[finite].mean())) if bool(finite.any()) else 0.0
    allowed = budget.allowed_error(level) / max(level, SMALL_LLC)
    return float(ratios.mean()) >= 1.0 - min(allowed, MAX_OWED)


def _is_downhill(segment: Segment, nbeta: float) -> bool:
    """Far below zero: the verdict is clear, and more steps would only run further down."""
    trace = nbeta * segment.difference[segment.finite]
    return len(trace) > 0 and float(trace.mean()) + 5 * standard_error(trace) < -SMALL_LLC


def _draws(segment: Segment, budget: Budget, nbeta: float) -> Tensor:
    """``[finite chains, num_draws]``, the integrand."""
    trace = nbeta * segment.difference[segment.finite]
    return trace.reshape(len(trace), budget.num_draws, -1).mean(dim=2) if len(trace) else trace


def _is_flat(segment: Segment, budget: Budget, nbeta: float) -> bool:
    """No drift between the halves beyond the error, as far as this segment can tell."""
    trace = _draws(segment, budget, nbeta)
    if not len(trace):
        return False
    level = max(abs(float(trace.mean())), SMALL_LLC)
    drift, drift_error = half_change(trace)
    return abs(drift) <= max(FLAT * level, 2 * drift_error) and abs(drift) <= 4 * FLAT * level


def _is_good(segment: Segment, budget: Budget, nbeta: float) -> bool:
    """Flat and precise enough."""
    if not _is_flat(segment, budget, nbeta):
        return False
    trace = _draws(segment, budget, nbeta)
    return standard_error(trace) <= budget.allowed_error(float(trace.mean()))
