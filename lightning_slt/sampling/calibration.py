"""Step size, burn-in and length, chosen from the chains themselves: no user has to guess them.

**Step size.** An unadjusted chain is heated by its own step. At stationarity ``E|w - w*|²`` does not change, so for any
potential, any minibatch noise and any step ``eps``, with ``G = nbeta grad + gamma (w - w*)`` the stochastic gradient,

    ``E[G . (w - w*)] = d + eps/4 E|G|²``

The second term is the heat. On a regular model it inflates the LLC by ``1/(1 - eps A/4)`` along a direction of
posterior precision A, the closed form of the discretised Gaussian. The share of it in the loss's part,

    ``heat = (eps/4) E[nbeta grad . G] / E[nbeta grad . (w - w*)]``

is dimensionless, costs three dot products every few steps, and counts discretisation and minibatch noise together. The
step is set so that the heat is about :data:`HEAT` of the LLC, and the estimate is corrected by the factor ``1 - heat``:
exact for the full batch of a regular model, first order otherwise (with minibatch noise and a strong localisation it
takes a little too much: 5 % at nbeta h = 13, gamma = 100, batches of 8).

**Burn-in and length.** Once the step is found it is frozen, and the chains run in rounds of doubling length. All rounds
but the last are burn-in; the last is the draws. It is the last when it is flat (no drift between its halves beyond the
error), its error is within the tolerance, and the step was right; or when the budget is used, which the verdict on the
estimate then says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slt.functional.convergence import standard_error
from lightning_slt.functional.learning_coefficient import half_change
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.batches import Window
from lightning_slt.sampling.chains import Chains, Segment
from lightning_slt.sampling.engines import sequential_engine
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import PROBE, generator

HEAT = 0.04
"""Share of the estimate that the finite step may add before it is taken off."""
ARRIVED = 0.93
"""Virial ratio below which more rounds are run while there is budget."""
MIN_VIRIAL = 0.7
"""Virial ratio below which chains that have used their budget have not reached their width: the number is not valid.
Between the two lie singular models, whose free directions take longest and matter least."""
DRAWS = 1000
"""Streams of random numbers from here on belong to the rounds of draws, those below to the search for the step."""
WIDTHS = 1.5
"""A direction that the loss leaves free is reached at the rate ``step * localization / 2``; so many of its times are
waited for, where the budget has room for them."""
CEILING = 4.0
"""Largest step, in those of :func:`first_step`: half of what is stable along the steepest direction at ``w*``."""
SMALL_LLC = 0.4
"""Below this the heat is held against a constant: an LLC near zero would ask for a step of nothing."""
FIRST_ROUNDS = (25, 25, 50, 50, 50)
"""Steps of the rounds in which the step size is found."""
LATER_ROUNDS = (25, 50)
"""The same where the last firing's step size is at hand."""
MAX_STEPS_BW_DRAWS = 32
"""Longest last round, in steps a draw."""
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


@dataclass(frozen=True)
class Budget:
    """How good an estimate has to be, and what it may cost; what is None is chosen.

    Attributes:
        num_draws: draws of each chain.
        num_burnin_steps: given, the burn-in is this long once the step size is known.
        num_steps_bw_draws: given, the draws are this many steps apart.
        lr: given, the step size is not looked for.
        start_lr: a step size that was right a moment ago, to start the search at.
        tolerance: standard error to reach, as a share of the LLC (of 0.4, where the LLC is below).
        max_steps_bw_draws: longest last round, in steps a draw; all rounds together take twice that.
    """

    num_draws: int
    num_burnin_steps: int | None = None
    num_steps_bw_draws: int | None = None
    lr: float | None = None
    start_lr: float | None = None
    tolerance: float = 0.03
    max_steps_bw_draws: int = MAX_STEPS_BW_DRAWS


def heat_share(segment: Segment, lr: float, posterior: LocalPosterior, keep: Tensor | None = None) -> float:
    """Share of the LLC that is heat of the finite step, pooled over the chains that are kept (all finite ones).

    Returns:
        NaN where no chain is finite or the chains have not moved against the gradient yet.
    """
    keep = segment.finite if keep is None else keep
    grad_square = float(segment.grad_square[keep].mean())
    grad_dot = float(segment.grad_dot[keep].mean())
    nbeta, gamma = posterior.nbeta, posterior.localization
    if not grad_dot > 0:
        return math.nan
    return 0.25 * lr * (nbeta * grad_square + gamma * grad_dot) / grad_dot


def heat_share_error(segment: Segment, lr: float, posterior: LocalPosterior, keep: Tensor) -> float:
    """Standard error of :func:`heat_share` between chains; 0 where one chain is all there is."""
    rows = keep.nonzero().flatten()
    if len(rows) < 2:
        return 0.0
    nbeta, gamma = posterior.nbeta, posterior.localization
    gg, gu = segment.grad_square[rows].mean(dim=1), segment.grad_dot[rows].mean(dim=1)
    # of a ratio of means, to first order
    residual = 0.25 * lr * (nbeta * gg + gamma * gu) - heat_share(segment, lr, posterior, keep) * gu
    return float(residual.std() / math.sqrt(len(rows)) / gu.mean().abs())


def virial_ratio(segment: Segment, lr: float, posterior: LocalPosterior, d: int, keep: Tensor | None = None) -> float:
    """``(E[G.(w - w*)] - eps/4 E|G|²) / d``: 1 at stationarity, less where directions have not been reached yet."""
    keep = segment.finite if keep is None else keep
    gg, gu, uu = (float(x[keep].mean()) for x in (segment.grad_square, segment.grad_dot, segment.square))
    nbeta, gamma = posterior.nbeta, posterior.localization
    force = nbeta**2 * gg + 2 * nbeta * gamma * gu + gamma**2 * uu
    return (nbeta * gu + gamma * uu - 0.25 * lr * force) / d


def first_step(objective: Objective, window: Window, posterior: LocalPosterior, seed: int) -> float:
    """A step that is safe along the steepest direction: 0.3 over the largest posterior precision (4 is unstable).

    Power iteration with gradient differences at the posterior's own scale ``1/sqrt(nbeta h + gamma)`` along the
    direction: a degenerate minimum, whose Hessian vanishes at ``w*``, still shows its curvature there.
    """
    engine = sequential_engine(objective)
    gen = generator(seed, PROBE, device=objective.device)
    anchor = objective.anchor
    weights, grad = anchor.clone().unsqueeze(0), torch.zeros_like(anchor).unsqueeze(0)
    batches = [window[i] for i in list(window.anchor_loss)[:3]]

    def gradient(displacement: Tensor) -> Tensor:
        weights[0] = anchor + displacement
        total = torch.zeros_like(anchor)
        for batch in batches:
            engine.step(batch)
            total += grad[0]
        return total / len(batches)

    direction = torch.empty_like(anchor).normal_(generator=gen)
    direction /= direction.norm()
    scale = float(anchor.norm()) + 1.0
    curvature = 0.0
    engine.bind(weights, grad)
    try:
        for _ in range(8):
            radius = min(1.0 / math.sqrt(posterior.nbeta * curvature + posterior.localization + 1e-12), scale)
            product = (gradient(radius * direction) - gradient(-radius * direction)) / (2 * radius)
            norm = float(product.norm())
            if not math.isfinite(norm):
                direction = 0.1 * direction  # outside the region where the loss is finite: look closer to w*
                continue
            curvature = max(curvature * 0.5, norm)
            if norm == 0.0:
                direction = torch.empty_like(anchor).normal_(generator=gen)
                direction /= direction.norm()
            else:
                direction = product / norm
    finally:
        engine.release()
    return 0.3 / (posterior.nbeta * curvature + posterior.localization + 1e-12)


def draw(chains: Chains, seed: int, budget: Budget) -> Drawn:
    """Find the step size, burn in, and draw.

    Args:
        chains: at ``w*``.
        seed: of the probe of the curvature.
        budget: what is given, and what the rest may cost.
    """
    done, settled, ceiling = 0, True, math.inf
    if budget.lr is not None:
        step = budget.lr
    else:
        safe = _agreed_first_step(chains, seed)
        ceiling = CEILING * safe
        step = min(budget.start_lr, ceiling) if budget.start_lr is not None else safe
        for number, length in enumerate(FIRST_ROUNDS if budget.start_lr is None else LATER_ROUNDS):
            chains.reseed(number)
            step, settled = _next_step(chains, chains.advance(length, step), step, ceiling)
            done += length
    if budget.num_burnin_steps is not None:
        chains.reseed(DRAWS)
        if budget.num_burnin_steps:
            chains.advance(budget.num_burnin_steps, step)
        between = budget.num_steps_bw_draws or 1
        segment = chains.advance(budget.num_draws * between, step)
        return Drawn(segment, step, done + budget.num_burnin_steps, between)

    between = budget.num_steps_bw_draws or 1
    longest = budget.num_steps_bw_draws or budget.max_steps_bw_draws
    rounds = 0
    while True:
        length = budget.num_draws * between
        # rounds of one length have the same noise at every firing, whatever came before them
        chains.reseed(DRAWS + (between if rounds else 0))
        segment = chains.advance(length, step)
        rounds += 1
        next_step, settled = _next_step(chains, segment, step, ceiling) if budget.lr is None else (step, True)
        awaited = WIDTHS * 2 / (step * max(chains.posterior.localization, 1e-12))
        waited = done >= awaited or awaited > longest * budget.num_draws
        # slow directions look flat: what they still owe shows in the virial ratio alone
        waited &= virial_ratio(segment, step, chains.posterior, len(chains.objective.anchor)) >= ARRIVED
        if rounds > 1 and settled and waited and _is_good(segment, budget, chains.posterior.nbeta):
            break
        if rounds > 1 and _is_downhill(segment, chains.posterior.nbeta):
            break
        if rounds > _rounds(longest):
            break
        done += length
        step = next_step
        # the first two rounds are of equal length: the draws are never more than half of all steps
        between = min(2 * between, longest) if rounds > 1 else between
    return Drawn(segment, step, done, between)


def _rounds(longest: int) -> int:
    return 1 + math.ceil(math.log2(longest)) if longest > 1 else 1


def _is_downhill(segment: Segment, nbeta: float) -> bool:
    """Far below zero: the verdict is clear, and more steps would only run further down."""
    trace = nbeta * segment.difference[segment.finite]
    return len(trace) > 0 and float(trace.mean()) + 5 * standard_error(trace) < -SMALL_LLC


def _is_good(segment: Segment, budget: Budget, nbeta: float) -> bool:
    """Flat and precise enough, as far as this segment can tell."""
    keep = segment.finite
    if not bool(keep.any()):
        return False
    trace = nbeta * segment.difference[keep]
    trace = trace.reshape(len(trace), budget.num_draws, -1).mean(dim=2)
    level = max(abs(float(trace.mean())), SMALL_LLC)
    drift, drift_error = half_change(trace)
    if abs(drift) > max(FLAT * level, 2 * drift_error) or abs(drift) > 4 * FLAT * level:
        return False
    return standard_error(trace) <= budget.tolerance * level


def _agreed_first_step(chains: Chains, seed: int) -> float:
    """Every rank probes, the first one's answer holds: sums on a GPU are not the same everywhere to the last bit."""

    def probe() -> float:
        return first_step(chains.objective, chains.source.window(0), chains.posterior, seed)

    return chains.collective.exchange(probe)[0]


def _next_step(chains: Chains, segment: Segment, step: float, ceiling: float) -> tuple[float, bool]:
    """The step for the next round, and whether the last one was about right."""
    if not bool(segment.finite.all()):
        chains.restart()
        return step / 8, False
    posterior = chains.posterior
    force = posterior.nbeta * segment.grad_square.mean() + posterior.localization * segment.grad_dot.mean()
    heat = max(0.125 * step * posterior.nbeta * float(force), 1e-12)
    trace = posterior.nbeta * segment.difference
    wanted = HEAT * _scale(trace) / heat
    drift, drift_error = half_change(trace)
    least = 0.3
    if wanted > 0.1 and (abs(drift) > 2 * drift_error or segment.steps < 50):
        # still on the way up from w*: an LLC that is small today is no reason to creep from here on
        least = 0.7
    new = min(step * min(max(wanted, least), 3.0), ceiling)
    return new, 0.6 < new / step < 1.7


def _scale(trace: Tensor) -> float:
    """What the heat is held against: |LLC|, or the variance of its integrand, the same number on a regular model.

    The LLC itself goes through zero between a saddle (where chains run downhill) and a minimum; the variance does not.
    Neighbouring steps see independent minibatches, so that their covariance is free of the minibatches' own noise.
    """
    # bursts of a heavy-tailed chain must not buy it a larger step, which would make more of them
    low, high = torch.quantile(trace, torch.tensor([0.05, 0.95], dtype=trace.dtype))
    centred = trace.clamp(low, high)
    centred = centred - centred.mean()
    products = centred[:, 1:] * centred[:, :-1]
    variance = float(products.mean() - 2 * products.std() / math.sqrt(products.numel()))
    return max(abs(float(trace.mean())), variance, SMALL_LLC)
