"""Mean losses over the posterior of the learning coefficient, beside the influence over a cooler one."""

from __future__ import annotations

import dataclasses

import torch

from lightning_slt.estimate import ChainSettings, default_localization, run_chains
from lightning_slt.functional.block_errors import mean_and_error
from lightning_slt.functional.posterior import LocalPosterior, default_nbeta
from lightning_slt.influence.reader import InfluenceReader
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.kinetic import Beginning, KineticSampling, MakeSampler, run_kinetic
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.sums import misfit_of_sum

MAX_SHORTENINGS = 5
"""Of the time step; where chains still leave the region, the mean losses stay those of the cooler posterior."""
WIDE_DRAWS, WIDE_BURNIN = 10, 8
"""Readings of each chain, and steps before them, for the mean losses over the posterior of the learning coefficient."""


def with_wide_means(
    found: InfluenceEstimate,
    reader: InfluenceReader,
    sampling: KineticSampling,
    objective: Objective,
    train: DatasetSource,
    settings: ChainSettings,
    method: str,
) -> InfluenceEstimate:
    """With the mean losses over the posterior of the learning coefficient, from a few draws in the same metric.

    That of the matrix is cool: near ``w*``, and a wrong label that has been memorised is cheap there. They stay as they
    are where the wider one cannot be sampled at this step, or n is not known.
    """
    n = train.num_samples
    if n is None or n < 2 or not len(found.train_index):
        return found
    posterior = LocalPosterior(default_nbeta(n), default_localization(objective.anchor))
    assert sampling.sampler.lr is not None
    wide = KineticSampling.of(posterior, sampling.curvature, sampling.sampler.lr)

    def run(make_sampler: MakeSampler, beginning: Beginning) -> tuple[Drawn, Chains]:
        burnin = beginning.burnin(WIDE_BURNIN)
        return run_chains(
            objective,
            train,
            dataclasses.replace(
                settings, sampler=wide.sampler, num_draws=WIDE_DRAWS, num_burnin_steps=burnin, method=method
            ),
            make_reader=lambda: lambda weights, slopes: reader.train_losses(weights),
            read_every=settings.num_steps_bw_draws or 1,
            make_sampler=make_sampler,
            spread=not beginning.cold,
        )

    ran = run_kinetic(objective, train, settings.seed, lambda *_: wide, run, max_shortenings=MAX_SHORTENINGS)
    if not bool(ran.good.all()):
        return found
    read = ran.drawn.segment.read
    assert read is not None
    place = {int(i): k for k, i in enumerate(reader.train_index.tolist())}
    losses = read[:, :, [place[int(i)] for i in found.train_index.tolist()]]
    if not bool(torch.isfinite(losses).all()):
        return found
    mean, error = mean_and_error(losses)
    misfit = misfit_of_sum(objective, train, ran.chains.posterior.nbeta)
    said = (*ran.reasons(), *ran.cooled.notes(train.batch_size), *misfit)
    return found.replace(
        notes=(*found.notes, *(f"mean_loss: {note}" for note in said)),
        mean_loss=found.init_loss + mean,
        mean_loss_se=error,
        mean_nbeta=posterior.nbeta,
        mean_localization=posterior.localization,
    )
