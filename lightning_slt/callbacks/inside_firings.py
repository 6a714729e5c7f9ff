"""Firings inside training: chains on a private copy of the module that trains, on all ranks together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_slt.callbacks.arguments import is_smoke_test, second_moments
from lightning_slt.callbacks.data import training_transfer
from lightning_slt.callbacks.distribution import share_batches
from lightning_slt.callbacks.following import DataFollowing
from lightning_slt.callbacks.progress import FiringProgress
from lightning_slt.callbacks.structure import explained
from lightning_slt.estimate import ChainSettings
from lightning_slt.influence import ProbeSet
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.record import Estimate
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.collective import RankLostError
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.samplers import SGLD
from lightning_slt.sampling.sharded import ShardedObjective

SMOKE_SAMPLER = SGLD(lr=1e-6)
"""A smoke test shows that chains run, not what they say: no step size is looked for."""


class InsideFirings(DataFollowing):
    """The part of a monitor that measures the weights of now while training waits; its state is set by the monitor."""

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, progress: FiringProgress, settings: ChainSettings
    ) -> tuple[Estimate, Optional[InfluenceEstimate]]:
        self._follow_changes(trainer)
        assert self._data is not None
        data = self._data

        def build() -> tuple[Objective, MinibatchSource]:
            objective = self._objective_of(trainer, pl_module, self._restrict)
            if self._source is None or data.replays:
                self._source = data.source(self._transfer(trainer))
            else:
                self._source.forget()
            return objective, self._source

        def open_anew() -> tuple[Objective, MinibatchSource]:
            # the objects stay here: only the word that it worked is exchanged
            built: list[tuple[Objective, MinibatchSource]] = []
            self._collective.exchange(lambda: built.append(build()))
            objective, source = built[0]
            self._source = source = share_batches(source, self._collective, self._prefix)
            self._share_buffers(objective)
            return objective, source

        objective, source = open_anew()
        settings = dataclasses.replace(settings, second_moment=self._moments(trainer, objective))
        smoke_test = is_smoke_test(trainer)
        if smoke_test:
            settings = dataclasses.replace(
                settings, num_chains=1, num_draws=4, num_burnin_steps=2, num_steps_bw_draws=1, sampler=SMOKE_SAMPLER
            )
        influence_error = ""
        measured: Optional[tuple[Estimate, Optional[InfluenceEstimate]]] = None
        if self._measures.influence and not self._samples.failed:
            probes: list[ProbeSet] = []
            try:
                self._collective.exchange(
                    lambda: probes.append(self._samples.read(trainer, source, self._transfer(trainer), self._prefix))
                )
                measured = self._course.measure(
                    objective, source, settings, probes[0], self._collective, progress, smoke_test
                )
            except Exception as error:
                if isinstance(error, RankLostError):
                    raise
                named = explained(error, probes[0] if probes else None, source)
                if self._on_failure == "raise" or smoke_test:
                    raise named from (error if named is not error else error.__cause__)
                # work that failed on one rank failed on all of them, so that all of them come here. What is not the
                # samples' fault fails again below, and is then said as any failure is
                influence_error = f"{type(named).__name__}: {named}"
                self._source = None
                objective, source = open_anew()
        if measured is None:
            measured = self._course.measure(objective, source, settings, None, self._collective, progress, smoke_test)
            if influence_error:
                self._leave_influence_out(influence_error)
        estimate, influence = measured
        self._hook_owner = None
        self._say_how(estimate, influence)
        return estimate, influence

    def _transfer(self, trainer: Trainer) -> Callable[[Any], Any]:
        """What the trainer does to a batch, with the hooks of the private copy there is when it is read."""
        return lambda batch: training_transfer(trainer, self._hook_owner)(batch)  # type: ignore[arg-type]

    def _moments(self, trainer: Trainer, objective: Objective) -> Optional[Tensor]:
        """``[d]`` second moments of the optimisers, the first rank's, for a sampler that wants them and starts cold."""
        sampler = self._settings.sampler
        if sampler is None or not sampler.preconditioned or self._course.memory.displacements is not None:
            return None
        module = trainer.lightning_module
        if objective.layout.sharded:
            own = second_moments(trainer.optimizers, module, objective.names)
            # some shards' moments without those of the others are of no use
            found = torch.tensor([0.0 if own is not None else math.nan])
            return own if objective.layout.all_finite(found) else None
        first = self._collective.rank == 0
        return self._collective.exchange(
            lambda: second_moments(trainer.optimizers, module, objective.names) if first else None
        )[0]

    def _share_buffers(self, objective: Objective) -> None:
        """The first rank's buffers for all: BatchNorm statistics differ between ranks, and a chain must not."""
        if isinstance(objective, ShardedObjective):
            objective.settle()
            return
        if self._collective.world_size == 1:
            return
        buffers = list(objective.module.buffers())
        first = self._collective.rank == 0
        # asked on every rank: one alone may have a module that cannot be copied
        told = self._collective.exchange(lambda: [b.cpu() for b in buffers] if first else None)[0]
        if objective.borrowed:
            return  # these are training's own
        for buffer, value in zip(buffers, told or [], strict=True):
            buffer.copy_(value)


__all__ = ["InsideFirings"]
