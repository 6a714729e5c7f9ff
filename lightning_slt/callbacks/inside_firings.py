"""Firings inside training: chains on a private copy of the module that trains, on all ranks together."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Optional

import torch
from torch import Tensor

from lightning_slt.callbacks.arguments import loss_context, second_moments
from lightning_slt.callbacks.asked import Asked
from lightning_slt.callbacks.data.following import FollowedData
from lightning_slt.callbacks.data.samples import ProbedSamples
from lightning_slt.callbacks.data.structure import explained
from lightning_slt.callbacks.distribution import make_objective, share_batches
from lightning_slt.callbacks.moment import Moment
from lightning_slt.callbacks.progress import FiringProgress
from lightning_slt.callbacks.remarks import say_how, warn_of_no_influence
from lightning_slt.callbacks.said import Voice
from lightning_slt.estimate import ChainSettings
from lightning_slt.firing import Course
from lightning_slt.influence import ProbeSet
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.record import Estimate
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.collective import Collective, RankLostError
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.restriction import Restriction
from lightning_slt.sampling.samplers import SGLD
from lightning_slt.sampling.sharded import ShardedObjective

log = logging.getLogger(__name__)

SMOKE_SAMPLER = SGLD(lr=1e-6)
"""A smoke test shows that chains run, not what they say: no step size is looked for."""


class InsideFirings:
    """Measures the weights of now while training waits.

    Args:
        asked: what the monitor was asked for.
        voice: of the monitor.
        samples: those that influence is read of.
        course: what the firings of the run hand on.
        followed: the data of the chains.
    """

    def __init__(
        self, asked: Asked, voice: Voice, samples: ProbedSamples, course: Course, followed: FollowedData
    ) -> None:
        self._asked, self._voice, self._samples = asked, voice, samples
        self._course, self._followed = course, followed

    def measure(
        self, moment: Moment, settings: ChainSettings, progress: FiringProgress
    ) -> tuple[Estimate, Optional[InfluenceEstimate]]:
        """The learning coefficient, and the influence of the samples where they are asked for and do not fail.

        Args:
            settings: what is asked of the chains of this firing.
        """
        try:
            return self._measure(moment, settings, progress)
        finally:
            self._followed.hooks_of = None

    def _measure(
        self, moment: Moment, settings: ChainSettings, progress: FiringProgress
    ) -> tuple[Estimate, Optional[InfluenceEstimate]]:
        followed, samples, collective = self._followed, self._samples, moment.collective
        followed.follow_changes(moment.trainer, collective)
        objective, source = self._open(moment)
        settings = dataclasses.replace(settings, second_moment=self._moments(moment, objective))
        if moment.is_smoke_test:
            settings = dataclasses.replace(
                settings, num_chains=1, num_draws=4, num_burnin_steps=2, num_steps_bw_draws=1, sampler=SMOKE_SAMPLER
            )
        problem = ""
        measured: Optional[tuple[Estimate, Optional[InfluenceEstimate]]] = None
        if self._asked.measures.influence and not samples.failed:
            probes: list[ProbeSet] = []
            try:
                transfer = followed.transfer(moment.trainer)
                collective.exchange(
                    lambda: probes.append(samples.read(moment.trainer, source, transfer, self._voice.prefix))
                )
                measured = self._course.measure(
                    objective, source, settings, probes[0], collective, progress, moment.is_smoke_test
                )
            except Exception as error:
                if isinstance(error, RankLostError):
                    raise
                named = explained(error, probes[0] if probes else None, source)
                if self._asked.raises or moment.is_smoke_test:
                    raise named from (error if named is not error else error.__cause__)
                # work that failed on one rank failed on all of them, so that all of them come here. What is not the
                # samples' fault fails again below, and is then said as any failure is
                problem = f"{type(named).__name__}: {named}"
                followed.source = None
                objective, source = self._open(moment)
        if measured is None:
            measured = self._course.measure(
                objective, source, settings, None, collective, progress, moment.is_smoke_test
            )
            if problem and samples.leave_out():
                warn_of_no_influence(self._voice, problem)
        say_how(self._voice, moment.step, *measured)
        return measured

    def _open(self, moment: Moment) -> tuple[Objective, MinibatchSource]:
        """The loss and the minibatches of now, the same on all ranks."""
        built: list[tuple[Objective, MinibatchSource]] = []

        def build() -> None:
            # the objects stay here: only the word that it worked is exchanged
            built.append((self.objective_of(moment, self._asked.restrict), self._followed.read(moment.trainer)))

        moment.collective.exchange(build)
        objective, source = built[0]
        self._followed.source = source = share_batches(source, moment.collective, self._voice.prefix)
        share_buffers(objective, moment.collective)
        return objective, source

    def objective_of(self, moment: Moment, restrict: Restriction) -> Objective:
        """The loss of the module as it is now; the trainer's hooks are those of its private copy from here on."""
        objective = make_objective(
            moment.trainer,
            moment.module,
            moment.collective,
            loss_fn=self._asked.loss_fn,
            restrict=restrict,
            context=loss_context(moment.trainer),
            say=self._say_once,
        )
        self._followed.hooks_of = objective.module
        return objective

    def _say_once(self, topic: str, sentence: str) -> None:
        """What is so at every firing, once a run."""
        if self._voice.first(topic):
            log.warning(f"{self._voice.who}: {sentence}")

    def _moments(self, moment: Moment, objective: Objective) -> Optional[Tensor]:
        """``[d]`` second moments of the optimisers, the first rank's, for a sampler that wants them and starts cold."""
        sampler = self._asked.settings.sampler
        if sampler is None or not sampler.preconditioned or self._course.memory.displacements is not None:
            return None
        optimizers, module = moment.trainer.optimizers, moment.trainer.lightning_module
        if objective.layout.sharded:
            own = second_moments(optimizers, module, objective.names)
            # some shards' moments without those of the others are of no use
            found = torch.tensor([0.0 if own is not None else math.nan], device="cpu")
            return own if objective.layout.all_finite(found) else None
        first = moment.collective.rank == 0
        return moment.collective.exchange(
            lambda: second_moments(optimizers, module, objective.names) if first else None
        )[0]


def share_buffers(objective: Objective, collective: Collective) -> None:
    """The first rank's buffers for all: BatchNorm statistics differ between ranks, and a chain must not."""
    if isinstance(objective, ShardedObjective):
        objective.settle()
        return
    if collective.world_size == 1:
        return
    buffers = list(objective.module.buffers())
    first = collective.rank == 0
    # asked on every rank: one alone may have a module that cannot be copied
    told = collective.exchange(lambda: [b.cpu() for b in buffers] if first else None)[0]
    if objective.borrowed:
        return  # these are training's own
    for buffer, value in zip(buffers, told or [], strict=True):
        buffer.copy_(value)


__all__ = ["InsideFirings", "share_buffers"]
