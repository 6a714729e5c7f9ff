"""Mean losses over the posterior of the learning coefficient, beside the influence over a cooler one."""

from __future__ import annotations

import dataclasses

import torch

from lightning_slt.estimate import ChainSettings, default_localization, run_chains
from lightning_slt.functional.influence import (
    mean_and_error,
)
from lightning_slt.functional.posterior import LocalPosterior, default_nbeta
from lightning_slt.influence.posterior import InfluenceSampling
from lightning_slt.influence.reader import InfluenceReader
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.minibatch_heat import Cooled, minibatch_noise
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.readings import diverged
from lightning_slt.sampling.rng import PROBE, generator
from lightning_slt.sampling.samplers import Sampler
from lightning_slt.sampling.sums import nbeta_of_sum

MAX_SHORTENINGS = 6
SHORTENING = 0.5
WIDE_DRAWS, WIDE_BURNIN = 10, 8
"""Readings of each chain, and steps before them, for the mean losses over the posterior of the learning coefficient."""
COLD_BURNIN = 40
"""Steps from ``w*``, where the Gaussian of the curvature is no start."""


def with_wide_means(
    found: InfluenceEstimate,
    reader: InfluenceReader,
    sampling: InfluenceSampling,
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
    wide = InfluenceSampling.with_posterior(posterior, sampling.curvature, sampling.sampler.lr)
    cooled: list[Cooled] = []
    for shortenings in range(MAX_SHORTENINGS):

        def make_sampler(chains: Chains, share: float = SHORTENING**shortenings) -> tuple[LocalPosterior, Sampler]:
            if not cooled:
                batches = list(train.window(0).anchor_loss)
                stream = generator(settings.seed, PROBE, device=objective.device)
                at, curvature = objective.anchor, sampling.curvature
                noise = minibatch_noise(at, chains.gradients, batches, curvature, posterior, stream)
                cooled.append(Cooled.of(wide.sampler, noise))
            return posterior, cooled[0].shorter(share)

        burnin = COLD_BURNIN if shortenings else WIDE_BURNIN
        drawn, _ = run_chains(
            objective,
            train,
            dataclasses.replace(
                settings, sampler=wide.sampler, num_draws=WIDE_DRAWS, num_burnin_steps=burnin, method=method
            ),
            make_reader=lambda: lambda weights, slopes: reader.train_losses(weights),
            read_every=settings.num_steps_bw_draws or 1,
            make_sampler=make_sampler,
            spread=shortenings == 0,
        )
        if not bool(diverged(drawn.segment, posterior.nbeta, len(objective.anchor)).any()):
            break
        train.forget()
    else:
        return found
    read = drawn.segment.read
    assert read is not None
    place = {int(i): k for k, i in enumerate(reader.train_index.tolist())}
    losses = read[:, :, [place[int(i)] for i in found.train_index.tolist()]]
    if not bool(torch.isfinite(losses).all()):
        return found
    mean, error = mean_and_error(losses)
    said = (*cooled[0].reasons(), *cooled[0].notes(train.batch_size))
    said += (nbeta_of_sum(train.batch_size),) if objective.is_sum else ()
    return found.replace(
        notes=(*found.notes, *(f"mean_loss: {note}" for note in said)),
        mean_loss=found.init_loss + mean,
        mean_loss_se=error,
        mean_nbeta=posterior.nbeta,
        mean_localization=posterior.localization,
    )
