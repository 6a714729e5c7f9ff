"""Kinetic Langevin chains in the metric of the curvature, at a time step that minibatches and the loss allow."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.functional.shared_course import shared_course
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.metric import Curvature, LowRankMetric
from lightning_slt.sampling.minibatch_heat import Cooled, minibatch_noise
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.readings import diverged
from lightning_slt.sampling.rng import PROBE, generator
from lightning_slt.sampling.samplers import KineticLangevin, Sampler

log = logging.getLogger(__name__)

STEP = 0.7
"""Time step in the coordinates in which the posterior is round; 2 is unstable there, and where the loss bends more
sharply away from ``w*`` a smaller one may be."""
MAX_SHORTENINGS = 6
SHORTENING = 0.5
"""Of the time step, where chains leave the region."""
COLD_BURNIN = 40
"""Steps from ``w*``, where the Gaussian of the curvature is no start: it may reach out to where the loss is far
steeper."""
MORE_BURNIN = (24, 96)
"""Steps of burn-in beyond those that are asked for, at the second and the third try, where chains are seen to be on
their way from ``w*`` still: weights may be many widths of the posterior from its mean."""


@dataclass(frozen=True, eq=False)
class KineticSampling:
    """A posterior, and kinetic Langevin in the metric in which the curvature at ``w*`` makes it round."""

    posterior: LocalPosterior
    sampler: KineticLangevin
    curvature: Curvature

    @staticmethod
    def of(posterior: LocalPosterior, curvature: Curvature, lr: float = STEP**2) -> KineticSampling:
        metric = LowRankMetric.of(curvature, posterior)
        return KineticSampling(posterior, KineticLangevin(lr, metric=metric), curvature)


Propose = Callable[[Chains, list[int], torch.Generator], KineticSampling]
"""From the chains at ``w*``, the numbers of the minibatches that may be looked at, and a stream of random numbers to
the sampling with the longest step. It is asked for once before every try."""
MakeSampler = Callable[[Chains], tuple[LocalPosterior, Sampler]]


@dataclass(frozen=True)
class Beginning:
    """How the chains of a try begin.

    Attributes:
        cold: at ``w*``, and not at draws of the Gaussian of the curvature.
        more: steps of burn-in beyond those asked for.
    """

    cold: bool = False
    more: int = 0

    def burnin(self, steps: int) -> int:
        """Steps before the first reading, of those that are asked for."""
        return (max(steps, COLD_BURNIN) if self.cold else steps) + self.more


Run = Callable[[MakeSampler, Beginning], tuple[Drawn, Chains]]
"""One try: from what makes the sampler of the chains at ``w*``, and how they begin, to what they showed."""
Left = Callable[[int, float, bool], None]
"""Told how many chains left the region, at which share of the time step, and whether a shorter one is tried."""


@dataclass(frozen=True, eq=False)
class KineticRun:
    """What the last try showed.

    Attributes:
        drawn: the draws.
        chains: that made them.
        good: ``[num_chains]`` bool, chains that stayed in the region.
        sampling: with the step they were made with.
        cooled: what the minibatches allowed, before chains left.
        course: share of what was read that is still the way from ``w*``; 0 where that is not seen.
    """

    drawn: Drawn
    chains: Chains
    good: Tensor
    sampling: KineticSampling
    cooled: Cooled
    course: float = 0.0

    def reasons(self) -> tuple[str, ...]:
        """Why covariances over these draws are not those of the posterior; empty where nothing says so."""
        if not self.course:
            return self.cooled.reasons()
        way = (
            f"{self.course:.0%} of the variance is the way that all chains take from these weights, which are far from "
            "the posterior's mean: more num_burnin_steps"
        )
        return (*self.cooled.reasons(), way)


def _log(count: int, share: float, again: bool) -> None:
    if again:
        log.info(f"{count} chains left the region at {share:.2g} of the time step: shortened")


def run_kinetic(
    objective: Objective,
    source: MinibatchSource,
    seed: int,
    propose: Propose,
    run: Run,
    left: Left = _log,
    max_shortenings: int = MAX_SHORTENINGS,
) -> KineticRun:
    """Run kinetic chains, with a shorter step where minibatches would heat them, and again with half of it as long as
    any of them leave the region, or with a longer burn-in where their readings show that they are still on their way.

    Args:
        objective: the loss.
        source: minibatches; what is known of the losses at ``w*`` is forgotten before another try.
        seed: of the draws that the minibatches' noise is measured at, and of the stream for ``propose``.
        propose: gives the sampling; at the first try the minibatches' noise is measured in it.
        run: runs the chains.
        left: told after each try in which chains left the region; the log by default.
        max_shortenings: tries after the first. What the last one shows is returned even where chains left.
    """
    cooled: list[Cooled] = []
    samplings: list[KineticSampling] = []
    shortenings, longer = 0, 0
    while True:
        share, course = SHORTENING**shortenings, 0.0

        def make_sampler(chains: Chains, share: float = share) -> tuple[LocalPosterior, Sampler]:
            batches = list(source.window(0).anchor_loss)
            stream = generator(seed, PROBE, device=objective.device)
            wanted = propose(chains, batches, stream)
            if not cooled:
                at, gradients = objective.anchor, chains.gradients
                noise = minibatch_noise(at, gradients, batches, wanted.curvature, wanted.posterior, stream)
                cooled.append(Cooled.of(wanted.sampler, noise))
            samplings.append(dataclasses.replace(wanted, sampler=cooled[0].shorter(share)))
            return samplings[-1].posterior, samplings[-1].sampler

        drawn, chains = run(make_sampler, Beginning(shortenings > 0, (0, *MORE_BURNIN)[longer]))
        good = ~diverged(drawn.segment, chains.posterior.nbeta, len(objective.anchor))
        if bool(good.all()):
            course = shared_course(drawn.segment.read) if drawn.segment.read is not None else 0.0
            again = course > 0 and longer < len(MORE_BURNIN)
            longer += 1
        else:
            again = shortenings < max_shortenings
            left(int((~good).sum()), share, again)
            shortenings += 1
        if not again:
            return KineticRun(drawn, chains, good, samplings[-1], cooled[0], course)
        if course > 0:
            log.info(f"{course:.0%} of the readings' variance is the way from w*: a longer burn-in")
        source.forget()
