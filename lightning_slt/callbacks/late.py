"""Firings whose results come later: what a monitor sends to the background, and what it does when it is back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Optional

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_slt.callbacks.arguments import is_smoke_test, loss_context, second_moments
from lightning_slt.callbacks.background import GONE, Late, warn_of_lost
from lightning_slt.callbacks.overhead import Decision
from lightning_slt.callbacks.progress import FiringProgress
from lightning_slt.callbacks.reporting import Reporting
from lightning_slt.callbacks.travel import flat_weights
from lightning_slt.callbacks.worker import FOLDER
from lightning_slt.influence import ProbeSet
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.restriction import select_parameters
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.shadow import shadow_copy
from lightning_slt.sampling.steps import LossFn


class LateFirings(Reporting):
    """The part of a monitor that has firings done beside training; nothing of it happens where they are inside."""

    _hook_owner: Optional[nn.Module]
    _loss_fn: Optional[LossFn]
    _source: Optional[MinibatchSource]

    def _transfer(self, trainer: Trainer) -> Callable[[Any], Any]:
        raise NotImplementedError

    def _follow_changes(self, trainer: Trainer) -> None:
        raise NotImplementedError

    @property
    def measures_later(self) -> bool:
        """Whether estimates come after training has gone on from their weights."""
        return self._beside is not None

    def _open_background(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the workers, and find again what was out when the run broke off."""
        beside, data, course = self._beside, self._data, self._course
        if beside is None or data is None or is_smoke_test(trainer):
            return
        beside.open(
            trainer,
            pl_module,
            self.folder,
            data,
            self._loss_fn,
            self._restrict,
            self._settings,
            loss_context(trainer) is not None,
            course.state_dict,
            course.warm_start,
            self._prefix,
        )
        # what reached the record after the checkpoint is in the history, and not published a second time
        known = {e.step for e in self.estimates if e.step is not None} & set(beside.awaited)
        for step in sorted(known):
            left = beside.left_by(step)
            if left is not None:
                course.load_state_dict(left)
        late, lost = beside.recover(known)
        held = self._held_folder
        why = GONE
        if held is not None and (held / FOLDER).exists():
            why = f"their snapshots lie in {held}, which another run holds (resume after that one has ended)"
        warn_of_lost(lost, self._who, why)
        for result in late:
            self._take_late(trainer, pl_module, result)
        beside.begin()

    def _send(
        self, trainer: Trainer, pl_module: LightningModule, step: int, x: int, decision: Optional[Decision]
    ) -> None:
        """Have the weights as they are measured beside training; leave it out where the queue is full."""
        beside = self._beside
        assert beside is not None
        begin, accounted = time.monotonic(), self._seconds
        with FiringProgress(trainer, f"{self._prefix} at step {step}, waiting for the background") as progress:
            for late in beside.make_room(progress):
                self._take_late(trainer, pl_module, late)
        begin += self._seconds - accounted  # what was taken up meanwhile is counted already
        if beside.broken is not None:
            self._account(trainer, begin)
            self._say_broken(step, beside.broken)
            return
        if beside.full:
            self._skipped += 1
            self._account(trainer, begin)
            if self._said.first("full"):
                rank_zero_warn(f"{self._who}: the firing at step {step} is left out, since {beside.full_text()}")
            return
        notes: dict[str, Any] = {"step": step, "x": x, "epoch": trainer.current_epoch}
        if decision is not None:
            notes |= {
                "firing_size": decision.size,
                "credit_seconds": decision.credit_seconds,
                "predicted_seconds": decision.predicted_seconds,
            }
        if decision is not None or self._skipped:
            notes["skipped"] = self._skipped
        try:
            with preserve_rng():
                self._follow_changes(trainer)
                assert self._data is not None
                probes: Optional[ProbeSet] = None
                problem = ""
                if self._measures.influence and not self._samples.failed:
                    try:
                        probes = self._probes_of(trainer, pl_module)
                    except Exception as error:
                        if self._on_failure == "raise":
                            raise
                        problem = f"{type(error).__name__}: {error}"
                if self._course.localization is None:
                    self._course.settle(flat_weights(pl_module, self._restrict))
                settings = dataclasses.replace(
                    self._settings,
                    localization=self._course.localization,
                    second_moment=self._moments_now(trainer, pl_module),
                )
                beside.send(trainer, pl_module, self._restrict, settings, self._data, probes, notes)
                if problem:  # what is not the samples' fault fails here as well, and is said as any failure is
                    self._leave_influence_out(problem)
        except Exception as error:
            if self._on_failure == "raise":
                raise
            self._warn_of_failure(step, f"{type(error).__name__}: {error}")
            self._account(trainer, begin, failed=True)
            return
        finally:
            self._hook_owner = None
        self._skipped = 0
        for listener in self._listeners:
            listener.on_snapshot(trainer, pl_module, step)
        self._account(trainer, begin, size=1.0)

    def _say_broken(self, step: int, reason: str) -> None:
        """Nothing is measured from here on; said at the first firing that is left out for it."""
        if self._on_failure == "raise":
            raise RuntimeError(f"the measurement at step {step} failed: in the background {reason}")
        if self._said.first("broken"):
            self._warn_of_failure(step, f"So are all that follow: in the background {reason}")

    def _probes_of(self, trainer: Trainer, pl_module: LightningModule) -> ProbeSet:
        """The samples to look at, read at the first firing."""
        assert self._data is not None
        if self._source is None or self._data.replays:
            self._hook_owner = shadow_copy(pl_module)
            self._source = self._data.source(self._transfer(trainer))
        return self._samples.read(trainer, self._source, self._transfer(trainer), self._prefix)

    def _moments_now(self, trainer: Trainer, pl_module: LightningModule) -> Optional[Tensor]:
        """Second moments for a worker, which alone knows whether its chains start cold."""
        sampler = self._settings.sampler
        if sampler is None or not sampler.preconditioned:
            return None
        return second_moments(trainer.optimizers, pl_module, select_parameters(pl_module, self._restrict))

    def _collect(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what has come back."""
        if self._beside is not None:
            for late in self._beside.take():
                self._take_late(trainer, pl_module, late)

    def _take_late(self, trainer: Trainer, pl_module: LightningModule, late: Late) -> None:
        begin = time.monotonic()
        result = late.result
        if result.course is not None:
            self._course.load_state_dict(result.course)
        if result.estimate is None:
            if self._on_failure == "raise":
                raise RuntimeError(f"the measurement at step {result.step} failed in the background: {result.error}")
            self._warn_of_failure(result.step, str(result.error))
            return
        if result.influence_error is not None:
            if self._on_failure == "raise":
                raise RuntimeError(
                    f"influence at step {result.step} failed in the background: {result.influence_error}"
                )
            self._leave_influence_out(result.influence_error)
        with preserve_rng():
            self._say_how(result.estimate, result.influence)
            self._take_up(trainer, pl_module, result.estimate.replace(**late.notes), result.influence, begin)
        self._account(trainer, begin)

    def _await_the_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of fit: what is still out, within the limit."""
        beside = self._beside
        if beside is None or not beside.pending:
            return
        label = f"{self._prefix}: waiting for the results of {len(beside.pending)} snapshots"
        with FiringProgress(trainer, label) as progress:
            for late in beside.await_all(progress):
                self._take_late(trainer, pl_module, late)
        if beside.pending:
            rank_zero_warn(
                f"{self._who}: the results of steps {beside.pending} did not come within max_wait={beside.max_wait:g} "
                "s of the end of fit, and are left out."
            )


__all__ = ["LateFirings"]
