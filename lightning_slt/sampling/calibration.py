"""Step size, burn-in and length, chosen from the chains themselves: no user has to guess them.

**Step size.** An unadjusted chain is heated by its own step. At stationarity ``E|w - w*|²`` does not change, so for any
potential, any minibatch noise and any step ``eps``, with ``G = nbeta grad + gamma (w - w*)`` the stochastic gradient,

    ``E[G . (w - w*)] = d + eps/4 E|G|²``

The second term is the heat. On a regular model it inflates the LLC by ``1/(1 - eps A/4)`` along a direction of
posterior precision A, the closed form of the discretised Gaussian. The share of it in the loss's part,

    ``heat = (eps/4) E[nbeta grad . G] / E[nbeta grad . (w - w*)]``

is dimensionless, costs three dot products every few steps, and counts discretisation and minibatch noise together. The
step is set so that it is :data:`HEAT`, and the estimate is corrected by the factor ``1 - heat``: exact for a regular
model, first order for any other.

**Burn-in.** Rounds of doubling length until the last one is flat: no drift between its halves beyond the error, and an
error small enough to have seen one. **Length.** As many steps as the burn-in took, spread over the draws: chains that
were slow to arrive are slow to turn round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.batches import Window
from lightning_slt.sampling.chains import Chains, Segment
from lightning_slt.sampling.engines import sequential_engine
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import PROBE, generator

HEAT = 0.06
"""Share of the estimate that the finite step may add before it is taken off."""
FIRST_ROUNDS = (25, 25, 50, 50, 50)
"""Steps of the rounds in which the step size is found."""
MAX_BURNIN_PER_DRAW = 10
"""Burn-in steps at the most, in draws."""
MAX_STEPS_BW_DRAWS = 16
RELATIVE_TOLERANCE = 0.05
"""Drift that is small enough to stop the burn-in at, as a share of the LLC; and as an LLC, where that is small."""


@dataclass(frozen=True)
class Plan:
    """What the chains do: found by :func:`calibrate`, or given by the user."""

    lr: float
    num_burnin_steps: int
    num_steps_bw_draws: int


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


def virial_ratio(segment: Segment, lr: float, posterior: LocalPosterior, d: int, keep: Tensor | None = None) -> float:
    """``(E[G.(w - w*)] - eps/4 E|G|²) / d``: 1 at stationarity, less where directions have not been reached yet."""
    keep = segment.finite if keep is None else keep
    gg, gu, uu = (float(x[keep].mean()) for x in (segment.grad_square, segment.grad_dot, segment.square))
    nbeta, gamma = posterior.nbeta, posterior.localization
    force = nbeta**2 * gg + 2 * nbeta * gamma * gu + gamma**2 * uu
    return (nbeta * gu + gamma * uu - 0.25 * lr * force) / d


def first_step(objective: Objective, window: Window, posterior: LocalPosterior, seed: int) -> float:
    """A step that is safe along the steepest direction: 0.3 over the largest posterior precision.

    Power iteration with gradient differences at the posterior's own scale ``1/sqrt(nbeta h + gamma)`` along the
    direction: a degenerate minimum, whose Hessian vanishes at ``w*``, still shows its curvature there.
    """
    engine = sequential_engine(objective)
    gen = generator(seed, PROBE, device=objective.device)
    anchor = objective.anchor
    weights, grad = anchor.clone().unsqueeze(0), torch.zeros_like(anchor).unsqueeze(0)
    batches = [window[i] for i in list(window.anchor_loss)[:1] + [0, len(window) // 2]]
    batches = [b for n, b in enumerate(batches) if n == 0 or (n - 1) * (len(window) // 2) not in window.without_loss]

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


def calibrate(
    chains: Chains,
    seed: int,
    num_draws: int,
    lr: float | None = None,
    num_burnin_steps: int | None = None,
    num_steps_bw_draws: int | None = None,
    max_burnin_steps: int | None = None,
) -> Plan:
    """Choose what the user left open, moving the chains to where sampling can start.

    Args:
        chains: at ``w*``; left burnt in.
        seed: of the probe of the curvature.
        num_draws: draws to come.
        lr: the step size; None to find it.
        num_burnin_steps: burn-in after the step size is known; None to go on until the trace is flat.
        num_steps_bw_draws: None for a sampling phase as long as the burn-in.
        max_burnin_steps: where to stop at the latest; None for ``10 * num_draws``.
    """
    posterior = chains.posterior
    limit = max_burnin_steps if max_burnin_steps is not None else MAX_BURNIN_PER_DRAW * num_draws
    done = 0
    settled = lr is not None
    step = lr if lr is not None else _agreed_first_step(chains, seed)
    if lr is None:
        for length in FIRST_ROUNDS:
            segment = chains.advance(length, step)
            done += length
            step, settled = _next_step(chains, segment, step)
    if num_burnin_steps is not None:
        if num_burnin_steps:
            chains.advance(num_burnin_steps, step)
        done += num_burnin_steps
        return Plan(step, done, num_steps_bw_draws or 1)

    length = 50
    while done < limit:
        length = min(length, limit - done)
        segment = chains.advance(length, step)
        done += length
        if lr is None:
            step, settled = _next_step(chains, segment, step)
        if settled and _is_flat(segment, posterior.nbeta):
            break
        length *= 2
    between = num_steps_bw_draws or min(max(1, round(done / num_draws)), MAX_STEPS_BW_DRAWS)
    return Plan(step, done, between)


def _agreed_first_step(chains: Chains, seed: int) -> float:
    """Every rank probes, the first one's answer holds: sums on a GPU are not the same everywhere to the last bit."""

    def probe() -> float:
        return first_step(chains.objective, chains.source.window(0), chains.posterior, seed)

    return chains.collective.exchange(probe)[0]


def _next_step(chains: Chains, segment: Segment, step: float) -> tuple[float, bool]:
    """The step for the next round, and whether the last one was about right."""
    finite = segment.finite
    if not bool(finite.all()):
        chains.restart()
        return step / 8, False
    heat = heat_share(segment, step, chains.posterior)
    if math.isnan(heat):
        return step / 2, False
    factor = min(max(HEAT / heat, 0.25), 2.0)
    return step * factor, 0.7 < HEAT / heat < 1.6


def _is_flat(segment: Segment, nbeta: float) -> bool:
    """No drift between the halves of a round, told with an error that would have shown one."""
    trace = nbeta * segment.difference[segment.finite]
    if not len(trace):
        return False
    half = trace.shape[1] // 2
    first, second = trace[:, :half].mean(dim=1), trace[:, half:].mean(dim=1)
    change = second - first
    level = abs(float(second.mean()))
    tolerance = max(RELATIVE_TOLERANCE * level, RELATIVE_TOLERANCE)
    error = float(change.std() / math.sqrt(len(change))) if len(change) > 1 else 0.0
    drift = float(change.mean())
    return drift < tolerance + error and error < 2 * tolerance
