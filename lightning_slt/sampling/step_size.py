"""The step size, from the chains themselves.

An unadjusted chain is heated by its own step. At stationarity ``E[u.P^-1 u]`` does not change, with
``u = w - w*`` and P the preconditioner (1 for SGLD), so for any potential, any minibatch noise and any step ``eps``,
with ``G = nbeta grad + gamma u`` the stochastic gradient,

    ``E[G . u] = d + eps/4 E[G . P G]``

The second term is the heat. Where the loss is homogeneous along the directions it holds, each of them carries half of
its heat in the loss, so that the LLC comes out too large by

    ``heat = (eps/8) E[nbeta grad . P G]``

It costs three dot products every few steps and needs no Hessian. On a regular model and the full batch it is exact: the
closed form ``1/(1 - eps A/4)`` of the discretised Gaussian. On reduced-rank regression, a deep linear network and a
small transformer, taking it off gave the LLC to within 2 % for heats up to a third of it (``docs/choosing.md``).
Minibatch noise is a part of it, ``(eps/8) nbeta² E[xi . P xi]``, and not all of that reaches the loss: it is
measured every 48 steps by the difference of two minibatches' gradients at the same weights, in which the gradient of
all the data cancels, and weighted (:func:`~lightning_slt.sampling.readings.heat_of`).

The step is set so that discretisation adds about :data:`HEAT` of the LLC and noise no more than :data:`NOISE_HEAT`, and
both are taken off. A sampler that shares noise between steps (:class:`~lightning_slt.LeimkuhlerMatthews`) has
no heat of discretisation at first order: its step is set by the same rule, and the minibatches' part alone is taken
off. MALA needs no correction, its step is set by the share of proposals accepted. The step of samplers with momenta is
a share of the largest curvature; minibatches heat them far more than SGLD (a random force is held by their friction
alone, :meth:`~lightning_slt.sampling.samplers.Sampler.heating`), which is taken off where it is little, and said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_slt.functional.learning_coefficient import half_change
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.anchor import measure_anchor
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.engines import sequential_engine
from lightning_slt.sampling.noise import normal_stream
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.readings import heat_of
from lightning_slt.sampling.rng import PROBE, STEP, derive_seed, seed_globals
from lightning_slt.sampling.samplers.base import Sampler
from lightning_slt.sampling.segment import Segment
from lightning_slt.sampling.steps import NoLossError
from lightning_slt.sampling.window import Window

HEAT = 0.08
"""Share of the estimate that a finite step may add through its discretisation, which is then taken off."""
NOISE_HEAT = 0.04
"""The same of the minibatches' noise: less, since how much of it reaches the loss is known less well."""
UNSURE_HEAT = 0.03
"""Of discretisation on a potential far from any square, as far as it is (one minus ``Heat.steepness``)."""
SCORCHED = 0.1
"""A step wanted, in those of the step there is, below which the heat is as much as the estimate: chains at a smaller
step would be longer on their way down from it than they are on the way up from ``w*``."""
LEAST_SCALE = 0.2
"""Below this the heat is held against a constant: an LLC near zero would ask for a step of nothing."""
ACCEPTANCE = 0.57
"""Share of MALA's proposals to be accepted."""
SAFE = 0.3
"""The first step, over the largest posterior precision."""
UNSTABLE = 4.0
"""The step at which a chain leaves the steepest direction, in the same units; of samplers with momenta the squared time
step."""
NEAR = 0.01
"""Where the curvature is looked at first, in standard deviations of the posterior."""
TURNS = 4
"""Of the power iteration, so near; and twice as many at the posterior's own scale."""
CEILING = 8.0
"""Largest step, in those of :func:`first_step`: 0.6 of what is stable along the steepest direction at ``w*``."""
LOOKED_AROUND = 4
"""Chains of a rank around which the curvature is looked at anew."""
MOST_PROPOSED = 40.0
"""The same for MALA, which refuses what is too large."""

MOST_SORTED = 2**24
"""Numbers that ``torch.quantile`` takes."""


def first_step(
    objective: Objective,
    window: Window,
    posterior: LocalPosterior,
    seed: int,
    buffers: Sequence[Tensor] = (),
    centre: Tensor | None = None,
    numbers: Sequence[int] | None = None,
    sparing: bool = False,
) -> float:
    """A step that is safe along the steepest direction: 0.3 over the largest posterior precision (4 is unstable).

    Power iteration with gradient differences at the posterior's own scale ``1/sqrt(nbeta h + gamma)`` along the
    direction: a degenerate minimum, whose Hessian vanishes at ``w*``, still shows its curvature there. The scale is
    first found from :data:`NEAR` ``w*``: from far off, a minimum that is narrow and has a plateau around it (a loss
    that saturates) looks flat, and at the step of the plateau no chain would ever see it. A kink has the larger a
    curvature the nearer it is looked at: it is looked at anew from the scale that this gives.

    Args:
        objective, window, posterior: what is sampled.
        seed: of the first direction.
        buffers: ``[1, d]`` each, for gradients, weights and a direction, written to; what is missing is allocated.
        centre: ``[d]``, where to look; None for ``w*``.
        numbers: of the window's minibatches, those that the curvature is the mean of; None for three.
        sparing: with two buffers: a direction is where the gradients are that it is then replaced by.
    """
    engine = sequential_engine(objective)
    gen = normal_stream(seed, PROBE, device=objective.device, dtype=objective.dtype)
    anchor = objective.anchor if centre is None else centre
    count = 2 if sparing else 3
    rows = [*buffers[:count], *(torch.empty_like(anchor[None]) for _ in range(count - len(buffers)))]
    grad, weights = rows[:2]
    batches = [window[i] for i in (list(window.anchor_loss)[:3] if numbers is None else numbers)]

    def add_gradients() -> None:
        for number, batch in enumerate(batches):
            if objective.draws:  # of the same numbers on both sides
                seed_globals(derive_seed(seed, STEP, number))
            engine.step(batch, keep=True)

    def closer() -> float:
        """Where the loss is not finite, or there is none: look nearer to w*."""
        if sparing:
            torch.sub(weights[0], anchor, out=direction).div_(radius)
        direction.mul_(0.1)
        return 0.1 * reach

    layout = objective.layout
    direction = rows[-1][0] if not sparing else grad[0]
    layout.normal_(direction, gen)
    direction /= layout.norm(direction)
    scale = layout.norm(anchor) + 1.0
    curvature, reach = 0.0, 1.0  # the direction's length
    engine.bind(weights, grad)
    try:
        for turn in range(3 * TURNS):
            radius = min(1.0 / math.sqrt(posterior.nbeta * curvature + posterior.localization + 1e-12), scale)
            radius *= NEAR if turn < TURNS else 1.0
            torch.add(anchor, direction, alpha=-radius, out=weights[0])
            grad.zero_()
            try:
                add_gradients()
                grad.neg_()
                if sparing:  # the direction has gone; the other side of w* has not
                    torch.sub(anchor, weights[0], out=weights[0]).add_(anchor)
                else:
                    torch.add(anchor, direction, alpha=radius, out=weights[0])
                add_gradients()
            except NoLossError:
                reach = closer()
                continue
            grad.div_(2 * radius * reach * len(batches))
            norm = layout.norm(grad[0])
            if not math.isfinite(norm):
                reach = closer()
                continue
            reach = 1.0
            # what was seen near w* may be that of a kink, and so may be what is seen at the scale that this gives
            curvature = norm if turn in (TURNS, TURNS + 1) else max(curvature * 0.5, norm)
            if norm == 0.0:
                layout.normal_(direction, gen)
                direction /= layout.norm(direction)
            else:
                torch.div(grad[0], norm, out=direction)
    finally:
        engine.release()
        grad.zero_()
    return SAFE / (posterior.nbeta * curvature + posterior.localization + 1e-12)


def agreed_first_step(chains: Chains, seed: int) -> float:
    """Every rank probes, the first one's answer holds: sums on a GPU are not the same everywhere to the last bit."""

    def probe() -> float:
        # the chains are at w* and have not moved: their memory serves, and they are put back
        try:
            window = chains.source.window(0)
            buffers, sparing = chains.scratch(), chains.sparing
            return first_step(chains.objective, window, chains.posterior, seed, buffers, sparing=sparing)
        finally:
            chains.restart()

    return chains.collective.exchange(probe)[0]


def largest_step_of_chains(chains: Chains, seed: int) -> float:
    """The largest step that the search may take where the chains are: they have left ``w*``, and may bear more.

    Around some chains of each rank, by one minibatch each; the steepest counts, which is rather more than that of
    all the data. Two copies of the weights are made for it.
    """

    def probe() -> float:
        own = chains.gradient_memory()
        buffers = [*own, *(torch.empty_like(chains.objective.anchor[None]) for _ in range(2))]
        sparing = not own
        window = chains.window
        measure_anchor(chains.objective, window, torch.arange(min(LOOKED_AROUND, len(window)), device="cpu"))
        known = list(window.anchor_loss)  # minibatches that have a loss: of a window that is new, none was known
        if not known:
            return 0.0  # nothing shows that more is borne
        steps = [
            first_step(
                chains.objective, window, chains.posterior, seed + k, buffers, centre, [known[k % len(known)]], sparing
            )
            for k, centre in enumerate(chains.weights[:LOOKED_AROUND])
        ]
        return min(steps, default=math.inf)

    return largest_step(chains.sampler, min(chains.collective.exchange(probe)))


def largest_step(sampler: Sampler, safe: float) -> float:
    """The largest step that the search may take, where :func:`first_step` gave this one."""
    if sampler.calibration == "curvature":
        return sampler.curvature_share / SAFE * safe
    return (MOST_PROPOSED if sampler.calibration == "acceptance" else CEILING) * safe


def unstable_step(sampler: Sampler, safe: float) -> float | None:
    """The step at which chains no longer hold, where :func:`first_step` gave this one; None where another metric or a
    rule of acceptance decides.

    Example:
        >>> from lightning_slt.sampling.samplers import SGLD, RMSpropSGLD
        >>> round(unstable_step(SGLD(), 0.003), 6), unstable_step(RMSpropSGLD(), 0.003)
        (0.04, None)
    """
    if sampler.preconditioned or sampler.calibration == "acceptance":
        return None
    return UNSTABLE / SAFE * safe


def next_step(
    chains: Chains, segment: Segment, step: float, ceiling: float, put_back: bool = True
) -> tuple[float, bool]:
    """The step for the next round, and whether the last one was about right.

    Chains that are not finite go back to ``w*``, and so do those that are scorched.

    Args:
        put_back: False where what there is will be draws all the same: scorched chains then stay where they are.
    """
    if not bool(segment.finite.all()):
        chains.restart()
        return step / 8, False
    if chains.sampler.calibration == "curvature":
        return step, True
    if segment.acceptance is not None:
        share = float(segment.acceptance.mean())
        factor = min(max(math.exp(3 * (share - ACCEPTANCE)), 0.3), 2.0)
        return min(step * factor, ceiling), abs(share - ACCEPTANCE) < 0.2
    posterior = chains.posterior
    trace = posterior.nbeta * segment.difference
    heat = heat_of(segment, step, posterior)
    unsure = (1.0 - heat.steepness) * heat.discretisation
    scale = scale_of(trace, most=chains.layout.num_weights)
    wanted = scale / max(heat.discretisation / HEAT, heat.noise / NOISE_HEAT, unsure / UNSURE_HEAT, 1e-12)
    if wanted < SCORCHED and put_back:
        chains.restart()
    drift, drift_error = half_change(trace)
    least = 0.3
    if wanted > 0.1 and (segment.steps < 50 or (chains.from_anchor and abs(drift) > 2 * drift_error)):
        # still on the way up from w*: an LLC that is small today is no reason to creep from here on. Warm chains have
        # their width: where they drift at a step that is too large, it is what makes them
        least = 0.7
    new = min(step * min(max(wanted, least), 3.0), ceiling)
    if abs(float(trace.mean())) < LEAST_SCALE:
        new = min(new, _held_by_pull(segment, posterior))
    return new, 0.6 < new / step < 1.7


def _held_by_pull(segment: Segment, posterior: LocalPosterior) -> float:
    """The step that adds :data:`HEAT` along directions that localisation alone holds. With a larger one an LLC far
    below :data:`LEAST_SCALE` would be heat for the most part."""
    precision = posterior.localization
    if segment.pulled_square is not None:
        precision *= float(segment.pulled_square.mean() / segment.square.mean().clamp(min=1e-300))
    return 4.0 * HEAT / precision if precision > 0 else math.inf


def scale_of(trace: Tensor, most: float = math.inf) -> float:
    """What the heat is held against: |LLC|, or the variance of its integrand, the same number on a regular model.

    The LLC itself goes through zero between a saddle (where chains run downhill) and a minimum; the variance does not.
    It counts as far as the integrand lies below zero: a step too large throws the chains up, and the scatter that
    makes must not buy it a larger one. Neighbouring steps see independent minibatches, so that their covariance is
    free of the minibatches' own noise.

    Args:
        trace: ``[num_chains, steps]``, the integrand.
        most: that the variance counts for: d, the number of weights. On a square it is d/2 and on kinks d; beyond that
            it is of chains that single minibatches (an outlier among their samples) throw about, below zero too.
    """
    values = trace.flatten()
    # torch sorts no more than so many for a quantile; an even part of them says as much
    values = values[:: max(1, -(-len(values) // MOST_SORTED))]
    low, high = torch.quantile(values, torch.tensor([0.05, 0.95], dtype=trace.dtype, device="cpu"))
    centred = trace.clamp(low, high)
    centred = centred - centred.mean()
    products = centred[:, 1:] * centred[:, :-1]
    variance = 0.0
    if products.numel() > 1:
        variance = float(products.mean() - 2 * products.std() / math.sqrt(products.numel()))
    return max(abs(float(trace.mean())), min(variance, float(low.clamp(max=0.0)) ** 2, most), LEAST_SCALE)
