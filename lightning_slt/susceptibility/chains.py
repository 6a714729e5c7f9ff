"""How the chains of a component run: the sampler that was asked for, or one that a finite step does not heat."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Optional

from lightning_slt.estimate import ChainSettings, default_localization, run_chains
from lightning_slt.functional.posterior import LocalPosterior, default_nbeta
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.calibration import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.collective import Collective
from lightning_slt.sampling.metric import LowRankMetric, curvature_at
from lightning_slt.sampling.minibatch_heat import Cooled, minibatch_noise
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.readings import diverged
from lightning_slt.sampling.rng import PROBE, generator
from lightning_slt.sampling.samplers import KineticLangevin, Sampler
from lightning_slt.susceptibility.shift import ShiftReader

log = logging.getLogger(__name__)

STEP = 0.7
"""Time step in the coordinates in which the posterior is round; shortened where chains leave it."""
MAX_SHORTENINGS = 6
BURNIN, COLD_BURNIN, BETWEEN = 8, 40, 2


def run_component(
    objective: Objective,
    source: DatasetSource,
    settings: ChainSettings,
    collective: Collective,
    make_reader: Callable[[], ShiftReader],
) -> tuple[Drawn, Chains, Optional[Cooled]]:
    """The sampler that was asked for; else kinetic Langevin, with a shorter step where minibatches would heat it or
    chains leave the region, and what there is to say of that."""
    between = settings.num_steps_bw_draws or BETWEEN
    if settings.sampler is not None:
        settings = dataclasses.replace(settings, num_steps_bw_draws=between)
        return *run_chains(objective, source, settings, collective, make_reader=make_reader, read_every=between), None
    n = source.num_samples
    nbeta = settings.nbeta if settings.nbeta is not None else default_nbeta(n or 0)
    gamma = settings.localization if settings.localization is not None else default_localization(objective.anchor)
    posterior = LocalPosterior(nbeta, gamma)
    burnin = settings.num_burnin_steps if settings.num_burnin_steps is not None else BURNIN
    cooled: list[Cooled] = []
    for shortenings in range(MAX_SHORTENINGS + 1):
        share = 0.5**shortenings

        def make_sampler(chains: Chains, share: float = share) -> tuple[LocalPosterior, Sampler]:
            batches = list(source.window(0).anchor_loss)
            stream = generator(settings.seed, PROBE, device=objective.device)
            # a shorter step is tried in the same metric
            if not cooled:
                curvature = curvature_at(objective.anchor, lambda w: chains.gradients(w, batches), stream)
                noise = minibatch_noise(objective.anchor, chains.gradients, batches, curvature, posterior, stream)
                metric = LowRankMetric.of(curvature, posterior)
                cooled.append(Cooled.of(KineticLangevin(STEP**2, metric=metric), noise))
            return posterior, cooled[0].shorter(share)

        chosen = dataclasses.replace(
            settings,
            sampler=KineticLangevin(STEP**2),
            nbeta=nbeta,
            localization=gamma,
            num_steps_bw_draws=between,
            num_burnin_steps=max(burnin, COLD_BURNIN) if shortenings else burnin,
        )
        drawn, chains = run_chains(
            objective,
            source,
            chosen,
            collective,
            make_reader=make_reader,
            read_every=between,
            make_sampler=make_sampler,
            # the Gaussian of the curvature at w* may reach out to where the loss is far steeper
            spread=shortenings == 0,
        )
        if not bool(diverged(drawn.segment, nbeta, len(objective.anchor)).any()):
            break
        log.info(f"chains left the region at {share:.2g} of the time step: shortened")
        source.forget()
    return drawn, chains, cooled[0]
