"""Kinetic Langevin chains in the metric of the curvature, at a time step that minibatches and the loss allow."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
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
Run = Callable[[MakeSampler, bool], tuple[Drawn, Chains]]
"""One try: from what makes the sampler of the chains at ``w*``, and whether they have to start there, to what they
showed."""
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
    """

    drawn: Drawn
    chains: Chains
    good: Tensor
    sampling: KineticSampling
    cooled: Cooled


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
    any of them leave the region.

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
    for shortenings in range(max_shortenings + 1):
        share = SHORTENING**shortenings

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

        drawn, chains = run(make_sampler, shortenings > 0)
        good = ~diverged(drawn.segment, chains.posterior.nbeta, len(objective.anchor))
        if bool(good.all()):
            break
        again = shortenings < max_shortenings
        left(int((~good).sum()), share, again)
        if again:
            source.forget()
    return KineticRun(drawn, chains, good, samplings[-1], cooled[0])
