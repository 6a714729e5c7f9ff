r"""What minibatches would heat chains with momenta, before they run; and the time step that keeps it small.

A gradient of a minibatch is ``grad L + xi``, and momentum keeps the kick that ``xi`` gives. In the coordinates y of
``w = w* + P y``, in which the posterior is round (:mod:`lightning_slt.sampling.metric`), a direction of variance 1 gets
the variance ``1 + g(h) V_i``, with ``V_i = (n beta)² E[(P xi)_i²]`` and ``g(h)``, about ``h / 2 zeta``, the sampler's
(:meth:`~lightning_slt.sampling.samplers.KineticLangevin.noise_gain`). The loss holds it by the share
``s_i = n beta h_i / (n beta h_i + gamma)``, and it is ``s_i / 2`` of the LLC, which has altogether the share

.. math:: g(h) \, \frac{\sum_i s_i V_i}{\sum_i s_i}

too much; covariances of losses about twice that. With a noise that goes with the curvature, as it does for a likelihood
at its minimum, the quotient is ``n beta`` over the size of a minibatch: seldom little.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.metric import Curvature, LowRankMetric
from lightning_slt.sampling.readings import heat_of
from lightning_slt.sampling.samplers import KineticLangevin
from lightning_slt.sampling.samplers.base import Heating
from lightning_slt.sampling.segment import Segment
from lightning_slt.sampling.step_size import NOISE_HEAT

MAX_NOISE_HEAT = 0.08
"""Share of the LLC that is heat of the minibatches of a sampler with momenta, beyond which it is not valid: 0.4 to 1.0
of what is taken off was there."""
LEAST_STEP = 1 / 64
"""The shortest time step, as a share of the longest one: with shorter ones chains go nowhere."""
MAX_HELD, NOTED_HELD = 1.0, 0.08
"""What a thermostat has to hold, as a share of the LLC, beyond which covariances are not valid, or say so."""
DRAWS, BATCHES = 8, 8
"""Of the Gaussian that the metric makes round; and minibatches, at the most, whose gradients are compared at each."""


def too_hot(heat: float, of: str) -> str:
    """That so large a share of something is heat of the minibatches, and what helps."""
    return f"{heat:.0%} of the {of} is heat of the minibatches: full_batch=True, or a larger batch_size"


def minibatch_noise(
    anchor: Tensor,
    gradient: Callable[[Tensor, Sequence[int]], Tensor],
    batches: Sequence[int],
    curvature: Curvature,
    posterior: LocalPosterior,
    generator: torch.Generator,
) -> float:
    """``sum s V / sum s`` of the module's equation, at draws of the Gaussian of the curvature.

    Args:
        anchor: ``[d]``, ``w*``.
        gradient: of the mean loss, ``[k, d]`` weights and the numbers of minibatches to ``[k, d]``.
        batches: the minibatches there are; the first :data:`BATCHES` are looked at.
        curvature: at ``w*``.
        posterior: that is sampled.
        generator: of the draws.

    Returns:
        0 for fewer than two minibatches, and where the loss holds nothing or is not finite that far out.

    Example:
        Two minibatches whose gradients are 2 apart, in one direction of variance 1 / 4:

        >>> curvature = Curvature(torch.tensor([3.0]), torch.eye(1), 3.0)
        >>> posterior, numbers = LocalPosterior(1.0, 1.0), torch.Generator()
        >>> slope = lambda w, b: 3 * w + 2 * b[0]
        >>> round(minibatch_noise(torch.zeros(1), slope, [0, 1], curvature, posterior, numbers), 4)
        0.5
    """
    batches = batches[:BATCHES]
    if len(batches) < 2:
        return 0.0
    metric, d, nbeta = LowRankMetric.of(curvature, posterior), len(anchor), posterior.nbeta
    z = torch.randn(DRAWS, d, generator=generator, device=anchor.device, dtype=anchor.dtype)
    weights = anchor + metric(z)
    mean = torch.zeros_like(weights)
    total = weights.new_zeros(DRAWS, dtype=torch.float64)
    steep = weights.new_zeros(DRAWS, len(curvature.values), dtype=torch.float64)
    for count, batch in enumerate(batches, start=1):
        # Welford's sums of squares, of all directions together and of the steep ones
        kick = metric(gradient(weights, [batch]))
        off = kick - mean
        mean += off / count
        total += off.double().square().sum(dim=1) * (1 - 1 / count)
        steep += (off @ curvature.vectors).double().square() * (1 - 1 / count)
    scale = nbeta**2 / (len(batches) - 1)
    of_steep, of_all = scale * steep.mean(dim=0), scale * float(total.mean())
    held = (nbeta * curvature.values / (nbeta * curvature.values + posterior.localization)).double()
    rest = max(curvature.mean * d - float(curvature.values.sum()), 0.0) * nbeta * metric.scale**2
    others = d - len(held)
    share = rest / others if others else 0.0
    heat = float((held * of_steep).sum()) + share * max(of_all - float(of_steep.sum()), 0.0)
    found = heat / max(float(held.sum()) + rest, torch.finfo(torch.float64).tiny)
    return found if math.isfinite(found) else 0.0


def held_by_thermostat(
    segment: Segment, heating: Heating, posterior: LocalPosterior, keep: Tensor
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What covariances along chains with a thermostat (:class:`~lightning_slt.SGNHT`) owe to the minibatches.

    A thermostat holds the mean temperature of all directions, and what it leaves in the LLC is a difference that is
    measured and taken off. A covariance is about the square of a temperature, direction by direction: where the
    minibatches' heat is much, what is left of it does not cancel there. On linear regression susceptibilities were
    0.9 to 1.1 times the true ones (4 directions, heat without the thermostat of 0.04 to 0.8 of the LLC), and 1.3 to 1.9
    times at 3 to 4 of it, where the LLC was right within 5 %.

    Args:
        segment: what the chains showed.
        heating: of their step.
        posterior: that is sampled.
        keep: ``[chains]`` bool, those that are good.

    Returns:
        Reasons why covariances are not valid, and notes; none without a thermostat.
    """
    if not heating.thermostat or not bool(keep.any()):
        return (), ()
    heat = heat_of(segment, heating.step, posterior, keep, shared=True).noise
    level = posterior.nbeta * float(segment.difference[keep].mean())
    held = heat / level if level > 0 else 0.0
    said = (
        f"the thermostat holds a heat of the minibatches of {held:.2g} times the LLC, in the mean over directions and "
        "not in each: full_batch=True, or a larger batch_size",
    )
    if held > MAX_HELD:
        return said, ()
    return (), said if held > NOTED_HELD else ()


@dataclass(frozen=True)
class Cooled:
    """A sampler whose time step minibatches allow.

    Attributes:
        sampler: of that step.
        heat: the share that minibatches add to the LLC at it.
        shortened: whether the step is shorter for their sake.
    """

    sampler: KineticLangevin
    heat: float
    shortened: bool

    @staticmethod
    def of(sampler: KineticLangevin, noise: float) -> Cooled:
        """The time step shortened to where minibatches add no more than :data:`NOISE_HEAT` to the LLC, or to
        :data:`LEAST_STEP` of what it was.

        Args:
            sampler: with a step size.
            noise: as :func:`minibatch_noise` has it.

        Example:
            >>> found = [Cooled.of(KineticLangevin(0.49), noise) for noise in (0.0, 0.5, 50.0)]
            >>> [(round(f.sampler.lr**0.5, 3), round(f.heat, 3)) for f in found]
            [(0.7, 0.0), (0.112, 0.04), (0.011, 0.391)]
        """
        assert sampler.lr is not None
        low = high = math.sqrt(sampler.lr)
        if sampler.noise_gain(sampler.lr) * noise > NOISE_HEAT:
            # the gain grows with the step: bisection to a thousandth of it
            low = LEAST_STEP * high
            while high - low > 1e-3 * low:
                middle = 0.5 * (low + high)
                cool = sampler.noise_gain(middle**2) * noise <= NOISE_HEAT
                low, high = (middle, high) if cool else (low, middle)
        lr = sampler.lr if low == high else low**2
        found = dataclasses.replace(sampler, lr=lr)
        return Cooled(found, sampler.noise_gain(lr) * noise, lr < sampler.lr)

    def shorter(self, share: float) -> KineticLangevin:
        """The sampler with this share of the time step."""
        assert self.sampler.lr is not None
        return dataclasses.replace(self.sampler, lr=self.sampler.lr * share**2)

    def reasons(self) -> tuple[str, ...]:
        """Why an estimate from these chains is not valid; none where it may be."""
        if self.heat < MAX_NOISE_HEAT:
            return ()
        return (too_hot(self.heat, "LLC"),)

    def notes(self, batch_size: int) -> tuple[str, ...]:
        """What should be known of them besides."""
        if not self.shortened:
            return ()
        return (
            f"minibatches of {batch_size} hold the time step at {math.sqrt(self.sampler.lr or 0.0):.2g}, and the "
            "errors are the larger for it: full_batch=True, a larger batch_size, or more draws",
        )
