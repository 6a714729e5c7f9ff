"""Measures of components, on chains of their own, after a firing of the learning coefficient."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_slt.callbacks.arguments import is_smoke_test, loss_context
from lightning_slt.callbacks.distribution import make_objective
from lightning_slt.callbacks.late import LateFirings
from lightning_slt.callbacks.susceptibilities import measure_beside, publish, warn_of
from lightning_slt.estimate import ChainSettings
from lightning_slt.influence import ProbeSet
from lightning_slt.record import Estimate
from lightning_slt.sampling.collective import Collective, RankLostError
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.shadow import CopyError, shadow_copy

log = logging.getLogger(__name__)


class ComponentFirings(LateFirings):
    """The part of a monitor that asks components, each with its own weights moving; its state is set by the monitor."""

    _collective: Collective

    def _share_buffers(self, objective: Objective) -> None:
        raise NotImplementedError

    def _objective_of(self, trainer: Trainer, pl_module: LightningModule, restrict: Any) -> Objective:
        """The loss of the module as it is now; the trainer's hooks are those of its private copy from here on."""
        objective = make_objective(
            trainer,
            pl_module,
            self._collective,
            loss_fn=self._loss_fn,
            restrict=restrict,
            context=loss_context(trainer),
            say=self._say_once,
        )
        self._hook_owner = objective.module
        return objective

    def _say_once(self, topic: str, sentence: str) -> None:
        """What is so at every firing, once a run."""
        if self._said.first(topic):
            log.warning(f"{self._who}: {sentence}")

    def _measure_beside(
        self, trainer: Trainer, pl_module: LightningModule, estimate: Estimate, settings: ChainSettings
    ) -> None:
        """Susceptibility after the learning coefficient, which stands whatever becomes of it."""
        source, step = self._source, estimate.step or 0
        begin = time.monotonic()

        try:
            with preserve_rng():
                assert source is not None
                transfer = self._transfer(trainer)
                probes: list[ProbeSet] = []

                def read() -> None:
                    try:
                        self._hook_owner = shadow_copy(pl_module)
                    except CopyError:
                        self._hook_owner = pl_module  # its chains call it in place as well
                    probes.append(self._samples.read(trainer, source, transfer, self._prefix))

                self._collective.exchange(read)
                found = measure_beside(
                    self._measures,
                    self._restrict,
                    lambda restrict: self._objective_of(trainer, pl_module, restrict),
                    source,
                    transfer,
                    probes[0],
                    dataclasses.replace(settings, method=self._course.method),
                    self._collective,
                    self._share_buffers,
                    self.susceptibilities,
                )
        except Exception as error:
            if self._on_failure == "raise" or is_smoke_test(trainer) or isinstance(error, RankLostError):
                raise
            warn_of(error, step, self._who)
            return
        finally:
            self._hook_owner = None
        found = found.replace(
            step=step, x=estimate.x, epoch=estimate.epoch, monitor=self._prefix, seconds=time.monotonic() - begin
        )
        self.susceptibilities.append(found)
        publish(found, self._publisher, self.folder, self._prefix, trainer.is_global_zero, self._who)


__all__ = ["ComponentFirings"]
