"""What a finite step adds to the learning coefficient, taken off its trace, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.lean import lean_of
from lightning_slt.sampling.readings import Heat, heat_of
from lightning_slt.sampling.segment import Segment
from lightning_slt.sampling.step_size import HEAT, LEAST_SCALE, NOISE_HEAT

MAX_HEAT = 0.25
"""Share of the estimate that may be step-size heat before it is called invalid."""
UNSURE_NOISE = 1.0 / 3.0
"""Share of the minibatches' heat, as it is taken off, that is counted as an error where the loss is no square. On a
ReLU classifier of 150 samples, batches of 64, 1.1 of 17.05 was taken off, and the estimates of 12 seeds stayed 0.7 too
high; on the digits the whole of it, not weighted, is too much."""
NO_SQUARE = 4.0
"""That share, for each unit by which the LLC is apart from half the work of the gradient beyond its error: on a square
these are the same, and the heat is exact."""
LARGE_LOSS = 3.0
"""Times a negative log-likelihood that a loss seems to be (:func:`_scale_of_loss`), above which its scale is
named: those of 9 and of 10,000 times both seem to be 3.6 and more, a likelihood 0.9 to 1.1."""
MOST_NOISE = 20.0
"""Times the heat of discretisation that minibatches may have for the former to be seen beside it."""


@dataclass(frozen=True, eq=False)
class WithoutHeat:
    """A trace of the LLC integrand with the heat of the step taken off.

    Attributes:
        trace: ``[num_chains, num_draws]`` float64.
        kept: its mean over the good chains, as a share of what it was; 1 where nothing is taken off, and where the
            same is taken off every draw.
        heat: what the estimate is judged by, as a share of it, and of half the work of the gradient where the estimate
            is not above zero; NaN where there is no heat, or neither of the two is positive.
        taken: what was taken off, in LLC units.
        noisy: the minibatches' part of it is what keeps the step small.
        lean: of the step (:func:`~lightning_slt.sampling.lean.lean_of`), in LLC units: taken off with the heat, where
            it is above zero, and an error of its own size, since it holds to first order alone.
        scale: of the loss, see :func:`_scale_of_loss`; 0 where it is not known.
        unsure: what is not sure of the minibatches' heat that is taken off, in LLC units.
    """

    trace: Tensor
    kept: float
    heat: float
    noisy: bool
    lean: float = 0.0
    scale: float = 0.0
    unsure: float = 0.0
    taken: float = 0.0


def without_heat(drawn: Drawn, chains: Chains, good: Tensor) -> WithoutHeat:
    """The trace of the LLC integrand as the draws have it, less what their step added.

    Beside a minimum the LLC is near zero or below, where chains go down as far as they are thrown up, and what the step
    added is no share of it. There it is held against half the work of the gradient, which is the LLC at the minimum of
    a square, and below zero where chains run away. Where it is most of that too, nothing is taken off.

    Args:
        good: ``[chains]`` bool, those that heat and lean are read from, and that they are taken off.
    """
    segment, posterior, d = drawn.segment, chains.posterior, chains.layout.num_weights
    raw = posterior.nbeta * segment.difference
    trace = raw.reshape(len(raw), drawn.num_draws, drawn.num_steps_bw_draws).mean(dim=2)
    heating = chains.sampler.heating(drawn.lr)
    if not (heating.step > 0 and bool(good.any())):
        return WithoutHeat(trace, 1.0, math.nan, False)
    found = heat_of(segment, heating.step, posterior, good, heating.noise_alone, d if heating.thermostat else 0)
    noisy = found.noise / NOISE_HEAT > 2 * found.discretisation / HEAT
    scale = _scale_of_loss(found, posterior.nbeta, chains.source.batch_size)
    level, work = float(trace[good].mean()), 0.5 * posterior.nbeta * float(segment.grad_dot[good].mean())
    unsure = _unsure_share(segment, good) * max(found.noise, 0.0)
    if not level > 0:
        judged = found.total if has_momenta(chains) else found.of_sgld
        heat = judged / work if work > 0 else math.nan
        if 0 < found.total < 2 * MAX_HEAT * work:
            trace[good] -= found.each.unsqueeze(1)
            return WithoutHeat(trace, 1.0, heat, noisy, scale=scale, unsure=unsure, taken=found.total)
        return WithoutHeat(trace, 1.0, heat, noisy, scale=scale)
    # where noise is shared there is no lean at first order; but neither can those chains stay where it is too steep
    lean = 0.0 if has_momenta(chains) else lean_of(segment, drawn.lr, posterior, good)
    above = max(lean, 0.0)  # one below zero is an error alone
    leans = 0.0 if heating.noise_alone else above
    share = (found.total + leans) / level
    judged = found.total if has_momenta(chains) else found.of_sgld + above
    if not 0 < share < 2 * MAX_HEAT:
        if 0 < share * level < 2 * MAX_HEAT * work:
            trace[good] -= (found.each + leans).unsqueeze(1)
            taken = found.total + leans
            return WithoutHeat(trace, 1.0, judged / max(level, LEAST_SCALE), noisy, lean, scale, unsure, taken)
        return WithoutHeat(trace, 1.0, judged / level, noisy, lean, scale)
    kept = 1.0 - share
    # what a chain has beyond that share is taken off it too: the mean stays as it is, and the error of the heat
    # is counted together with that of the loss it goes along with
    own = found.each + leans - share * trace[good].mean(dim=1)
    trace[good] -= (own / kept).unsqueeze(1)
    # held against what the step was chosen by, where what there is of it is taken off
    heat = judged / max(level, LEAST_SCALE)
    return WithoutHeat(trace * kept, kept, heat, noisy, lean, scale, unsure, taken=share * level)


def _unsure_share(segment: Segment, good: Tensor) -> float:
    """How much of the minibatches' heat is not sure: none on a square, and :data:`UNSURE_NOISE` far from one."""
    half_work = 0.5 * segment.grad_dot[good].mean(dim=1)
    beyond = segment.difference[good].mean(dim=1) - half_work
    if len(beyond) < 2 or not float(half_work.mean()) > 0:
        return UNSURE_NOISE
    apart = abs(float(beyond.mean())) - float(beyond.std()) / math.sqrt(len(beyond))
    return min(UNSURE_NOISE, NO_SQUARE * max(apart, 0.0) / float(half_work.mean()))


def _scale_of_loss(found: Heat, nbeta: float, batch_size: int) -> float:
    """How many times a negative log-likelihood the loss seems to be: by how much more the gradients of single samples
    scatter than its curvature says.

    Of a log-likelihood the covariance C of these gradients is the curvature H, of c times one it is c H. The heat of
    the minibatches is in proportion to ``nbeta² tr(C) / batch_size``, that of discretisation to ``nbeta tr(H)``. The
    latter is a difference, and no more than a hint beside noise that is :data:`MOST_NOISE` times as large.

    Returns:
        0 where minibatches add no heat, and where they would hide that of discretisation for a log-likelihood too
        (an nbeta far above the batch size); infinity where discretisation adds none.

    Example:
        >>> import torch
        >>> _scale_of_loss(Heat(0.125, 0.25, 0.5, 1.0, torch.zeros(1)), nbeta=20.0, batch_size=40)
        8.0
    """
    noise = found.noise / found.weight if found.weight > 0 else 0.0
    if not noise > 0 or LARGE_LOSS * nbeta > MOST_NOISE * batch_size:
        return 0.0
    own = found.discretisation / max(found.steepness, 1.0)
    return noise / own * batch_size / nbeta if own > 0 else math.inf


def has_momenta(chains: Chains) -> bool:
    """Whether a random force is held by friction alone, and the step is a share of the largest curvature."""
    return chains.sampler.calibration == "curvature"
