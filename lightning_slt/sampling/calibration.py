"""Step size, burn-in and length, chosen from the chains themselves: no user has to guess them.

**Step size.** By trial, in a few rounds: :mod:`lightning_slt.sampling.step_size`. Once it is found it is frozen.

**Burn-in and length.** From the trace: :mod:`lightning_slt.sampling.rounds`.

**Warm chains** skip the search and most of the burn-in: see :mod:`lightning_slt.sampling.memory`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

from lightning_slt.sampling.budget import FIRST_ROUNDS, LATER_ROUNDS, METRIC_ROUNDS, Budget, Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.readings import diverged
from lightning_slt.sampling.rounds import (
    DRAWS,
    GENERATION,
    TOO_COLD,
    WARM,
    Start,
    is_downhill,
    is_flat,
    until_good,
    will_do,
)
from lightning_slt.sampling.segment import STATS_EVERY
from lightning_slt.sampling.step_size import agreed_first_step, largest_step, largest_step_of_chains, next_step

WARM_SHARE = 0.25
"""Steps of warm chains before their draws, as a share of the draws: the stiff directions settle in them."""
RELAX = 1.1
"""By how much the largest step that is tried rises from firing to firing, until it is looked for anew: curvature
changes as training goes on."""
BEGINNING = 2.0
"""The step that the search begins with, in those of :func:`~lightning_slt.sampling.step_size.first_step`."""
LOOKS = 3
"""Quarters of a burn-in of given length, from the first on, after which its step is looked at."""


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
    start = _warm_start(chains, seed, budget, memory)
    warm = start is not None
    start = start or _cold_start(chains, seed, budget, memory)
    if budget.num_burnin_steps is not None:
        drawn, fits = _given_length(chains, start, budget, memory.generation)
    else:
        drawn, fits = until_good(chains, start, budget, memory.generation)
    memory.lr = _step_to_keep(chains, drawn, budget)
    nbeta = chains.posterior.nbeta
    repeats = False
    if bool(diverged(drawn.segment, nbeta, chains.layout.num_weights).any()) or is_downhill(drawn.segment, nbeta):
        memory.forget()
    elif warm and fits:
        # of a length that was given, chains end where they are, settled or not: their ends may be no better a start
        repeats = budget.num_burnin_steps is None
    elif wanted:  # a call that nobody follows keeps no copy of its chains
        memory.keep(chains)
    return dataclasses.replace(drawn, warm=warm, repeats=repeats)


def _step_to_keep(chains: Chains, drawn: Drawn, budget: Budget) -> float | None:
    """For the next firing: of draws of given length that were too hot, which nobody makes anew, a smaller one."""
    if budget.lr is not None:
        return None
    if budget.num_burnin_steps is None or not bool(drawn.segment.finite.all()):
        return drawn.lr
    wanted, settled = next_step(chains, drawn.segment.second_half(), drawn.lr, math.inf, put_back=False)
    return drawn.lr if settled else min(wanted, drawn.lr)


def _warm_start(chains: Chains, seed: int, budget: Budget, memory: ChainMemory) -> Start | None:
    """From the kept displacements; None where there are none, or where they turn out not to fit at all."""
    kept = memory.start_of(chains)
    step = budget.lr if budget.lr is not None else memory.lr
    if not all(chains.collective.exchange(lambda: kept is not None)) or step is None or kept is None:
        return None
    chains.place(kept)
    chains.fix_preconditioner(memory.preconditioner)
    chains.reseed(WARM + GENERATION * memory.generation)
    length = left = budget.num_burnin_steps
    if length is None or left is None:
        length = left = max(math.ceil(WARM_SHARE * budget.num_draws), STATS_EVERY)
    elif budget.lr is None:
        ceiling_of = functools.partial(_ceiling_of_warm, chains, seed, memory=memory)
        step, left = _look_on_the_way(chains, step, length, ceiling_of)
        if chains.from_anchor:  # they did not stay
            return None
    head = [chains.advance(left, step)] if left else []
    if any(bool(diverged(made, chains.posterior.nbeta, chains.layout.num_weights).any()) for made in head):
        chains.restart()
        return None
    settled, ceiling = True, math.inf
    if budget.lr is None and budget.num_burnin_steps is None:
        [segment] = head
        wanted, settled = next_step(chains, segment, step, math.inf)
        if chains.sampler.calibration == "heat" and bool(segment.finite.all()):
            ceiling = _ceiling_of_warm(chains, seed, step, wanted, memory)
            wanted = min(wanted, ceiling)
            settled = will_do(step, wanted, first=True)
        step = step if settled else wanted
    bears = math.inf if chains.sampler.preconditioned else memory.ceiling
    return Start(step, ceiling, length, head if settled else [], warm=True, bears=bears)


def _ceiling_of_warm(chains: Chains, seed: int, step: float, wanted: float, memory: ChainMemory) -> float:
    """The largest step of chains that are warm: the one they have, unless a much larger one is wanted and borne."""
    if chains.sampler.preconditioned:
        return math.inf
    memory.ceiling *= RELAX
    if min(wanted, memory.ceiling) < TOO_COLD * step:
        return step
    memory.ceiling = largest_step_of_chains(chains, seed)
    return max(step, memory.ceiling)


def _cold_start(chains: Chains, seed: int, budget: Budget, memory: ChainMemory) -> Start:
    """From ``w*``: the step size, and the preconditioner where the sampler wants one."""
    given, known = budget.lr, memory.lr
    if given is not None and not chains.sampler.preconditioned:
        return Start(given, math.inf, 0, [])
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
        if last and wanted >= ceiling and chains.sampler.calibration == "heat" and not chains.sampler.preconditioned:
            # w* binds it: chains that have left it may bear more
            ceiling = max(ceiling, largest_step_of_chains(chains, seed))
            wanted, settled = next_step(chains, segment, step, ceiling)
        head = [segment] if settled and last else []
        step = step if head else wanted
    memory.ceiling = ceiling
    return Start(step, ceiling, done, head)


def _given_length(chains: Chains, start: Start, budget: Budget, generation: int) -> tuple[Drawn, bool]:
    """Burn-in and draws of the lengths asked for; with them, whether the draws are flat."""
    assert budget.num_burnin_steps is not None
    done, step = start.done, start.step
    chains.reseed(DRAWS + GENERATION * generation)
    if not start.warm:
        left = budget.num_burnin_steps
        if budget.lr is None:
            step, left = _look_on_the_way(chains, step, left, lambda step, wanted: start.ceiling)
        if left:
            chains.advance(left, step, read=False)
        done += budget.num_burnin_steps
    between = budget.num_steps_bw_draws or 1
    segment = chains.advance(budget.num_draws * between, step)
    return Drawn(segment, step, done, between), is_flat(segment, budget, chains.posterior.nbeta)


def _look_on_the_way(
    chains: Chains, step: float, length: int, ceiling_of: Callable[[float, float], float]
) -> tuple[float, int]:
    """Most of a burn-in of given length: how hot a step is shows late, as the chains arrive.

    Chains that do not stay finite, or are scorched, are at ``w*`` again after it.

    Args:
        step: to begin with.
        length: steps of the whole burn-in. One so short that its quarters would not tell is not begun.
        ceiling_of: the largest step that may follow this one, where this one is wanted.

    Returns:
        The step to go on with, and the steps that are left.
    """
    quarter = length // 4
    if quarter < FIRST_ROUNDS[0]:
        return step, length
    for number in range(LOOKS):
        segment = chains.advance(quarter, step, read=False)
        wanted, settled = next_step(chains, segment, step, math.inf)
        if not settled and wanted > step:
            # a step too small costs time alone: it is changed at once or never
            wanted = min(wanted, ceiling_of(step, wanted)) if number == 0 else step
        step = step if settled else wanted
    return step, length - LOOKS * quarter
