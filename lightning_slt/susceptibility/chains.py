"""How the chains of a component run: the sampler that was asked for, or one that a finite step does not heat."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Optional

import torch

from lightning_slt.estimate import ChainSettings, default_localization, run_chains
from lightning_slt.functional.posterior import LocalPosterior, default_nbeta
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains, Progress
from lightning_slt.sampling.collective import Collective
from lightning_slt.sampling.kinetic import STEP, Beginning, KineticRun, KineticSampling, MakeSampler, run_kinetic
from lightning_slt.sampling.metric import curvature_at
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.samplers import KineticLangevin
from lightning_slt.susceptibility.shift import ShiftReader

BURNIN, BETWEEN = 8, 2


def run_component(
    objective: Objective,
    source: DatasetSource,
    settings: ChainSettings,
    collective: Collective,
    make_reader: Callable[[], ShiftReader],
    progress: Optional[Progress] = None,
) -> tuple[Drawn, Chains, Optional[KineticRun]]:
    """The sampler that was asked for; else kinetic Langevin, with a shorter step where minibatches would heat it or
    chains leave the region, and what there is to say of that."""
    between = settings.num_steps_bw_draws or BETWEEN
    if settings.sampler is not None:
        settings = dataclasses.replace(settings, num_steps_bw_draws=between)
        drawn, chains = run_chains(
            objective, source, settings, collective, progress, make_reader=make_reader, read_every=between
        )
        return drawn, chains, None
    n = source.num_samples
    nbeta = settings.nbeta if settings.nbeta is not None else default_nbeta(n or 0)
    gamma = settings.localization if settings.localization is not None else default_localization(objective.anchor)
    posterior = LocalPosterior(nbeta, gamma)
    burnin = settings.num_burnin_steps if settings.num_burnin_steps is not None else BURNIN
    proposed: list[KineticSampling] = []

    def propose(chains: Chains, batches: list[int], stream: torch.Generator) -> KineticSampling:
        # a shorter step is tried in the same metric
        if not proposed:
            curvature = curvature_at(objective.anchor, lambda w: chains.gradients(w, batches), stream)
            proposed.append(KineticSampling.of(posterior, curvature))
        return proposed[0]

    def run(make_sampler: MakeSampler, beginning: Beginning) -> tuple[Drawn, Chains]:
        chosen = dataclasses.replace(
            settings,
            sampler=KineticLangevin(STEP**2),
            nbeta=nbeta,
            localization=gamma,
            num_steps_bw_draws=between,
            num_burnin_steps=beginning.burnin(burnin),
        )
        return run_chains(
            objective,
            source,
            chosen,
            collective,
            progress,
            make_reader=make_reader,
            read_every=between,
            make_sampler=make_sampler,
            spread=not beginning.cold,
        )

    ran = run_kinetic(objective, source, settings.seed, propose, run)
    return ran.drawn, ran.chains, ran
