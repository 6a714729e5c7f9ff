"""Firings whose results come later: what a monitor sends to the background, and what it does when it is back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_slt.callbacks.arguments import loss_context, second_moments
from lightning_slt.callbacks.asked import Asked
from lightning_slt.callbacks.background.firings import GONE, BackgroundFirings, Late, warn_of_lost
from lightning_slt.callbacks.background.travel import flat_weights
from lightning_slt.callbacks.background.worker import FOLDER
from lightning_slt.callbacks.clock import RunClock
from lightning_slt.callbacks.data.following import FollowedData
from lightning_slt.callbacks.data.samples import ProbedSamples
from lightning_slt.callbacks.moment import Moment
from lightning_slt.callbacks.progress import FiringProgress
from lightning_slt.callbacks.remarks import say_how, warn_of_no_influence
from lightning_slt.callbacks.reporting import Reporting
from lightning_slt.callbacks.said import Voice
from lightning_slt.firing import Course
from lightning_slt.influence import ProbeSet
from lightning_slt.sampling.restriction import select_parameters
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.shadow import shadow_copy
from lightning_slt.warned import warn


class LateFirings:
    """Has the firings of a monitor done beside training.

    Args:
        beside: where they are done.
        asked, voice, samples, course, followed: as of :class:`~lightning_slt.callbacks.inside_firings.InsideFirings`.
        clock: of the monitor.
        reporting: where estimates go.
    """

    def __init__(
        self,
        beside: BackgroundFirings,
        asked: Asked,
        voice: Voice,
        samples: ProbedSamples,
        course: Course,
        followed: FollowedData,
        clock: RunClock,
        reporting: Reporting,
    ) -> None:
        self._beside = beside
        self._asked, self._voice, self._samples = asked, voice, samples
        self._course, self._followed = course, followed
        self._clock, self._reporting = clock, reporting

    def open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the workers, and find again what was out when the run broke off."""
        beside, course, asked = self._beside, self._course, self._asked
        beside.open(
            trainer,
            pl_module,
            self._reporting.folder,
            self._followed.data,
            asked.loss_fn,
            asked.restrict,
            asked.settings,
            loss_context(trainer) is not None,
            course.state_dict,
            course.warm_start,
            self._voice.prefix,
        )
        # what reached the record after the checkpoint is in the history, and not published a second time
        measured = {e.step for e in self._reporting.history.estimates if e.step is not None}
        known = measured & set(beside.awaited)
        for step in sorted(known):
            left = beside.left_by(step)
            if left is not None:
                course.load_state_dict(left)
        late, lost = beside.recover(known)
        held = self._reporting.held_folder
        why = GONE
        if held is not None and (held / FOLDER).exists():
            why = f"their snapshots lie in {held}, which another run holds (resume after that one has ended)"
        warn_of_lost(lost, self._voice.who, why)
        for result in late:
            self._take(trainer, pl_module, result)
        beside.begin()

    def send(self, moment: Moment) -> None:
        """Have the weights as they are measured beside training; leave it out where the queue is full."""
        beside, clock, voice, history = self._beside, self._clock, self._voice, self._reporting.history
        begin, accounted = clock.now(), clock.measured_seconds
        label = f"{voice.prefix} at step {moment.step}, waiting for the background"
        with FiringProgress(moment.trainer, label) as progress:
            for late in beside.make_room(progress):
                self._take(moment.trainer, moment.module, late)
        begin += clock.measured_seconds - accounted  # what was taken up meanwhile is counted already
        if beside.broken is not None:
            clock.took(begin)
            self._say_broken(moment.step, beside.broken)
            return
        if beside.full:
            history.skipped += 1
            clock.took(begin)
            if voice.first("full"):
                warn(f"{voice.who}: the firing at step {moment.step} is left out, since {beside.full_text()}")
            return
        try:
            with preserve_rng():
                self._send(moment, moment.notes(history.skipped))
        except Exception as error:
            if self._asked.raises:
                raise
            voice.failed(moment.step, f"{type(error).__name__}: {error}")
            clock.took(begin, failed=True)
            return
        finally:
            self._followed.hooks_of = None
        history.skipped = 0
        self._reporting.tell_of_snapshot(moment.trainer, moment.module, moment.step)
        clock.took(begin, size=1.0)

    def _send(self, moment: Moment, notes: dict[str, Any]) -> None:
        asked, course = self._asked, self._course
        if self._followed.follow_changes(moment.trainer, moment.collective):
            self._beside.data_is_other()
        probes: Optional[ProbeSet] = None
        problem = ""
        if asked.measures.influence and not self._samples.failed:
            try:
                probes = self._probes_of(moment)
            except Exception as error:
                if asked.raises:
                    raise
                problem = f"{type(error).__name__}: {error}"
        if course.localization is None:
            course.settle(flat_weights(moment.module, asked.restrict))
        settings = dataclasses.replace(
            asked.settings, localization=course.localization, second_moment=self._moments_now(moment)
        )
        self._beside.send(moment.trainer, moment.module, asked.restrict, settings, self._followed.data, probes, notes)
        # what is not the samples' fault fails here as well, and is said as any failure is
        if problem and self._samples.leave_out():
            warn_of_no_influence(self._voice, problem)

    def _say_broken(self, step: int, reason: str) -> None:
        """Nothing is measured from here on; said at the first firing that is left out for it."""
        if self._asked.raises:
            raise RuntimeError(f"the measurement at step {step} failed: in the background {reason}")
        if self._voice.first("broken"):
            self._voice.failed(step, f"So are all that follow: in the background {reason}")
        else:
            self._voice.failures.append(step)

    def _probes_of(self, moment: Moment) -> ProbeSet:
        """The samples to look at, read at the first firing."""
        followed = self._followed
        if not followed.is_read:
            followed.hooks_of = shadow_copy(moment.module)
            followed.read(moment.trainer)
        assert followed.source is not None
        transfer = followed.transfer(moment.trainer)
        return self._samples.read(moment.trainer, followed.source, transfer, self._voice.prefix)

    def _moments_now(self, moment: Moment) -> Optional[Tensor]:
        """Second moments for a worker, which alone knows whether its chains start cold."""
        sampler = self._asked.settings.sampler
        if sampler is None or not sampler.preconditioned:
            return None
        names = select_parameters(moment.module, self._asked.restrict)
        return second_moments(moment.trainer.optimizers, moment.module, names)

    def collect(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what has come back."""
        for late in self._beside.take():
            self._take(trainer, pl_module, late)

    def _take(self, trainer: Trainer, pl_module: LightningModule, late: Late) -> None:
        begin, result, raises = self._clock.now(), late.result, self._asked.raises
        if result.course is not None:
            self._course.load_state_dict(result.course)
        if result.estimate is None:
            if raises:
                raise RuntimeError(f"the measurement at step {result.step} failed in the background: {result.error}")
            self._voice.failed(result.step, str(result.error))
            return
        if result.influence_error is not None:
            if raises:
                raise RuntimeError(
                    f"influence at step {result.step} failed in the background: {result.influence_error}"
                )
            if self._samples.leave_out():
                warn_of_no_influence(self._voice, result.influence_error)
        with preserve_rng():
            say_how(self._voice, result.step, result.estimate, result.influence)
            estimate = result.estimate.replace(**late.notes)
            with self._reporting.one_row():
                self._reporting.take_up(trainer, pl_module, estimate, result.influence, begin)
        self._clock.took(begin)

    def data_is_other(self) -> None:
        """Training has been given other data: snapshots from here on are of that."""
        self._beside.data_is_other()

    def has(self, step: int) -> bool:
        """Whether the weights of this step are the last that were sent."""
        return self._beside.last_step == step

    def await_the_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of fit: what is still out, within the limit."""
        beside = self._beside
        if not beside.pending:
            return
        label = f"{self._voice.prefix}: waiting for the results of {len(beside.pending)} snapshots"
        begin, accounted = self._clock.now(), self._clock.measured_seconds
        with FiringProgress(trainer, label) as progress:
            for late in beside.await_all(progress):
                self._take(trainer, pl_module, late)
        self._clock.took(begin + self._clock.measured_seconds - accounted)  # less what was taken up meanwhile
        if beside.pending:
            warn(
                f"{self._voice.who}: the results of steps {beside.pending} did not come within "
                f"max_wait={beside.max_wait:g} s of the end of fit, and are left out."
            )

    def close(self, finished: bool = False) -> None:
        """End the workers; what is out stays on disk, for a resume, unless the run is ``finished``."""
        self._beside.close(finished)

    def forget(self) -> None:
        """Another run has nothing out."""
        self._beside.forget()

    def describe(self) -> dict[str, Any]:
        """For the run's settings."""
        return self._beside.describe()

    def state_dict(self) -> list[dict[str, Any]]:
        """What is out, as plain types."""
        return self._beside.state_dict()

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """What was out; found again when training begins."""
        self._beside.load_state_dict(state)


__all__ = ["LateFirings"]
