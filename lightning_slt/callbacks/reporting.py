"""What becomes of an estimate that is there: the history, the loggers, those who listen, and what is said of it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TypeVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_slt.callbacks.arguments import is_smoke_test, listed
from lightning_slt.callbacks.background import BackgroundFirings
from lightning_slt.callbacks.data import TrainingData
from lightning_slt.callbacks.evaluation import KeepsHistory
from lightning_slt.callbacks.folder import claim, fresh, give_back, restore_record, run_folder
from lightning_slt.callbacks.listener import EstimateListener
from lightning_slt.callbacks.overhead import OverheadBudget
from lightning_slt.callbacks.said import Said, speaker
from lightning_slt.callbacks.samples import ProbedSamples
from lightning_slt.callbacks.schedule import Schedule
from lightning_slt.callbacks.susceptibilities import Measures, restore_susceptibilities
from lightning_slt.estimate import ChainSettings
from lightning_slt.firing import Course
from lightning_slt.influence_record import InfluenceEstimate, suspicion_of
from lightning_slt.publish import RunPublisher
from lightning_slt.publish.diagnoses import invalid_sentence, kinds_of, outcome_of
from lightning_slt.publish.phrases import count_of
from lightning_slt.publish.render import Rendered
from lightning_slt.record import Estimate, RunRecord
from lightning_slt.sampling.collective import Collective
from lightning_slt.susceptibility_record import SusceptibilityEstimate
from lightning_slt.transitions import Transition

if TYPE_CHECKING:
    from lightning_slt.callbacks.monitor import SLTMonitor

Found = TypeVar("Found", Estimate, InfluenceEstimate, SusceptibilityEstimate)

LARGE_BUDGET = 1600
"""Readings of a firing, over all chains, from which on single pairs are shown at once and not only at the end."""
LARGE_OVERHEAD = 0.25
"""Share of wall-clock above which a monitor without a budget says what can be done."""


class Reporting(KeepsHistory):
    """The part of a monitor that begins where a measurement ends; its state is set by the monitor."""

    estimates: list[Estimate]
    influences: list[InfluenceEstimate]
    susceptibilities: list[SusceptibilityEstimate]
    folder: Optional[Path]
    _beside: Optional[BackgroundFirings]
    _budget: Optional[OverheadBudget]
    _collective: Collective
    _course: Course
    _data: Optional[TrainingData]
    _listeners: list[EstimateListener]
    _measures: Measures
    _publisher: Optional[RunPublisher]
    _restrict: Any
    _samples: ProbedSamples
    _schedule: Schedule
    _settings: ChainSettings
    _batch_size: Optional[int]
    _num_samples: Optional[int]
    _name: Optional[str]
    _prefix: str
    _dirpath: Optional[str]
    _resumed_folder: Optional[Path]
    _held_folder: Optional[Path]
    _on_failure: str
    _last_step: int
    _skipped: int
    _seconds: float
    _run_seconds: float
    _start: Optional[float]
    _earned_until: Optional[float]
    _said: Said
    _said_failure: Optional[tuple[int, str]]

    @property
    def prefix(self) -> str:
        """The group in front of every key of this monitor; known from ``setup`` on."""
        return self._prefix

    @property
    def _who(self) -> str:
        """What it calls itself where it says something."""
        return speaker(self._prefix)

    def _called(self, arguments: str) -> str:
        """The same with the arguments that are meant."""
        return speaker(self._prefix, arguments)

    def add_listener(self, listener: EstimateListener) -> None:
        """Tell ``listener`` of every estimate from now on; adding it twice is adding it once."""
        if listener not in self._listeners:
            self._listeners.append(listener)

    def remove_listener(self, listener: EstimateListener) -> None:
        """Tell it no more; nothing happens where it is not told."""
        self._listeners = [other for other in self._listeners if other is not listener]

    def _config(self) -> dict[str, Any]:
        settings, schedule = self._settings, self._schedule
        return {
            "every_n_train_steps": schedule.every_n_train_steps,
            "every_n_epochs": schedule.every_n_epochs,
            "at_steps": list(schedule.at_steps) if schedule.at_steps is not None else None,
            "log_spaced": schedule.log_spaced,
            "max_overhead": self._budget.max_overhead if self._budget is not None else None,
            "sampler": repr(settings.sampler) if settings.sampler is not None else "SGLD, calibrated",
            "num_chains": settings.num_chains,
            "num_draws": settings.num_draws,
            "num_burnin_steps": settings.num_burnin_steps,
            "num_steps_bw_draws": settings.num_steps_bw_draws,
            "batch_size": self._batch_size,
            "measures": self._measures.describe(),
            "nbeta": settings.nbeta,
            "num_samples": self._data.num_samples if self._data else self._num_samples,
            "localization": self._course.localization,
            "restrict": [str(r) if isinstance(r, str) else type(r).__name__ for r in listed(self._restrict)] or None,
            "seed": settings.seed,
            "warm_start": self._course.warm_start,
            "samples": self._samples.describe(),
            "background": self._beside.describe() if self._beside is not None else None,
        }

    def _finish(self, trainer: Trainer, status: str) -> None:
        if self._start is not None:
            # the clock stops: what comes between two fits is neither training nor measuring
            if self._earned_until is not None:
                self._earn()
            self._run_seconds = time.monotonic() - self._start
            self._start = self._earned_until = None
        publisher, self._publisher = self._publisher, None
        if publisher is None:
            return
        try:
            self._close(trainer, status, publisher)
        finally:
            give_back(self.folder)
        if not self.estimates or self.folder is None:
            return
        if RunRecord(self.folder).path.exists():
            report = f"; report: {publisher.report}" if publisher.report is not None else ""
            rank_zero_info(f"{self._who}: {outcome_of(self.estimates)}, in {self.folder}{report}")
        elif trainer.is_global_zero:
            count = count_of(len(self.estimates), "estimate")
            rank_zero_warn(
                f"{self._who}: {count} in monitor.estimates and in the loggers, and none in files: {self.folder} could "
                "not be written. Name a folder that can be with dirpath=."
            )

    def _close(self, trainer: Trainer, status: str, publisher: RunPublisher) -> None:
        if self._beside is not None:
            self._beside.close(finished=status == "finished")
        if self.influences:
            publisher.finish_influence(self.influences)
        transitions: list[Transition] = []
        for listener in self._listeners:
            try:
                transitions += listener.on_monitor_end(trainer, cast("SLTMonitor", self), publisher)
            except Exception as error:  # the record and the loggers must be closed whatever it met
                rank_zero_warn(
                    f"{self._who}: {type(listener).__name__} failed at the end: {type(error).__name__}: {error}"
                )
        publisher.finish(self.estimates, status, transitions)  # last: it flushes

    def _warn_of_nothing(self, budget: OverheadBudget) -> None:
        """The budget never sufficed: what a firing would have cost, and what can be done."""
        predicted = budget.wanted_size * budget.predicted_seconds
        rank_zero_warn(
            f"{self._called(f'max_overhead={budget.max_overhead:g}')}: nothing was measured. The smallest firing would "
            f"have cost about {predicted:.3g} s, which {predicted / budget.rate:.3g} s of training earn, and training "
            f"lasted {budget.trained_seconds:.3g} s. Raise max_overhead, make a firing cheaper (num_chains, num_draws, "
            "batch_size), or train for longer."
        )

    def _warn_of_no_step(self, trainer: Trainer) -> None:
        """The run was over before the first step that the schedule names: nothing else would say so."""
        rank_zero_warn(
            f"{self._called(str(self._schedule))}: nothing was measured: this run ended at step {self._last_step:,}, "
            f"after {count_of(trainer.current_epoch, 'whole epoch')}, before the first firing. Name earlier steps, or "
            "none: then 20 firings are spread over the run."
        )

    def _earn(self) -> float:
        """Credit the budget with the time since it was last credited, and return it.

        All that is not a firing is the run to its user: validation, loading data and checkpoints as much as batches.
        """
        assert self._budget is not None and self._earned_until is not None
        now = time.monotonic()
        seconds, self._earned_until = now - self._earned_until, now
        self._budget.earn(seconds)
        return seconds

    def _account(self, trainer: Trainer, begin: float, size: Optional[float] = None, failed: bool = False) -> None:
        """What measuring has cost since ``begin``, a firing that came to nothing too.

        Args:
            size: of the firing that it was; None for other work of measuring, which says nothing of the next firing.
        """
        seconds = time.monotonic() - begin
        self._seconds += seconds
        for monitor in {self, *trainer.callbacks}:  # type: ignore[attr-defined]
            # measuring is no training, which earns credit: neither for this monitor nor for another one
            if isinstance(monitor, Reporting) and monitor._earned_until is not None:
                monitor._earned_until += seconds
        if self._budget is None or self._earned_until is None:
            return
        if failed:
            self._budget.fail(seconds)
        elif size is None:
            self._budget.charge(seconds)
        else:
            self._budget.spend(seconds, size)

    def _open_publisher(self, trainer: Trainer) -> None:
        """The folder and the loggers of this run; none of either under ``fast_dev_run``."""
        if is_smoke_test(trainer):
            self._publisher = RunPublisher([], None, self._prefix)
            return
        folder = None
        if not getattr(trainer, "barebones", False):
            folder = run_folder(trainer, self._resumed_folder, self._dirpath, self._prefix)
        resumed = bool(self.estimates) or self._resumed_folder is not None
        if folder is not None:
            kept = resumed and folder == self._resumed_folder
            self._held_folder = None
            if trainer.is_global_zero and not (kept and claim(folder)):
                self._held_folder = folder if kept else None
                folder = fresh(folder)
            if resumed:
                self._restore(trainer, folder)
        self.folder = self._resumed_folder = folder
        self._publisher = RunPublisher(trainer.loggers, folder, self._prefix)
        self._publisher.start(self._config())

    def _restore(self, trainer: Trainer, folder: Path) -> None:
        """The record and the history of a resumed run: each has what the other had up to the checkpoint's step.

        The first rank has the record, and tells the others: when to fire depends on the history.
        """

        def of_record() -> tuple[list[Estimate], list[InfluenceEstimate], list[SusceptibilityEstimate]]:
            if not trainer.is_global_zero:
                return [], [], []
            record = RunRecord(folder)
            found = restore_record(record, self._last_step, self.estimates, self.influences, self._prefix).values()
            others = restore_susceptibilities(folder, self._last_step, self.susceptibilities, self._who)
            return [e for e, _ in found], [i for _, i in found if i is not None], others

        estimates, influences, susceptibilities = self._collective.exchange(of_record)[0]
        self.estimates = _in_order(self.estimates, estimates)
        self.susceptibilities = _in_order(self.susceptibilities, susceptibilities)
        self.influences = _in_order(self.influences, influences)
        self.influences[:-1] = [influence.without_pairs() for influence in self.influences[:-1]]
        if self._course.localization is None:  # the curve goes on in the region of its first point
            chosen = (e.localization for e in estimates if math.isfinite(e.init_loss))
            self._course.localization = next(chosen, None)

    def _take_up(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        estimate: Estimate,
        influence: Optional[InfluenceEstimate],
        begin: float,
    ) -> None:
        """Into the history, the metrics that others monitor, the record and the loggers; listeners are told.

        Args:
            begin: since when the time of this firing has not been accounted for.
        """
        seconds = time.monotonic() - begin
        elapsed = time.monotonic() - (self._start if self._start is not None else begin)
        overhead = (self._seconds + seconds) / max(elapsed, 1e-9)
        estimate = estimate.replace(overhead=overhead, component=self._name or "")
        before = self.estimates[-1].num_weights if self.estimates else estimate.num_weights
        if estimate.num_weights != before:
            rank_zero_warn(
                f"{self._who}: from step {estimate.step} on {estimate.num_weights:,} weights move, before it "
                f"{before:,} did: what is measured is another quantity. Another restrict=, or another model, that goes "
                "on from a checkpoint wants a name= of its own; where layers were set free, read it in two parts."
            )
        self.estimates.append(estimate)
        self._say_why_not(trainer, estimate)
        self._show(trainer)
        if self._publisher is not None:
            self._publisher.estimate(estimate)
        if influence is not None:
            self._keep_influence(trainer, influence, estimate)
        for listener in self._listeners:
            self._tell(listener, trainer, pl_module, estimate)

    def _show(self, trainer: Trainer) -> None:
        """The newest estimate for callbacks that monitor it; before there is one, that none is valid."""
        if not self.estimates:
            trainer.callback_metrics.setdefault(f"{self._prefix}/diag/valid", torch.tensor(0.0))
            return
        newest = self.estimates[-1]
        trainer.callback_metrics.update(
            {
                f"{self._prefix}/llc/mean": torch.tensor(newest.mean),
                f"{self._prefix}/llc/se": torch.tensor(newest.se),
                f"{self._prefix}/diag/valid": torch.tensor(float(newest.valid)),
            }
        )

    def _tell(
        self, listener: EstimateListener, trainer: Trainer, pl_module: LightningModule, estimate: Estimate
    ) -> None:
        """What fails in it follows ``on_failure``, and is warned about once."""
        try:
            listener.on_estimate(trainer, pl_module, cast("SLTMonitor", self), estimate, self._publisher)
        except Exception as error:
            if self._on_failure == "raise":
                raise
            if self._said.first("listener"):
                rank_zero_warn(
                    f"{self._who}: {type(listener).__name__} failed at step {estimate.step}; training goes on, further "
                    f"failures are not reported. {type(error).__name__}: {error}"
                )

    def _keep_influence(self, trainer: Trainer, influence: InfluenceEstimate, estimate: Estimate) -> None:
        """Into the history and the loggers; only the last one keeps its pairs in memory."""
        influence = influence.replace(
            step=estimate.step,
            x=estimate.x,
            epoch=estimate.epoch,
            component=estimate.component,
            seconds=estimate.seconds,
        )
        influence = influence.replace(suspicion=suspicion_of([*self.influences, influence]))
        if self.influences:
            self.influences[-1] = self.influences[-1].without_pairs()
        self.influences.append(influence)
        if self._publisher is None:
            return
        rendered: dict[int, Rendered] = {}
        try:
            # the other ranks log nothing
            rendered = self._samples.rendered(influence) if trainer.is_global_zero else {}
        except Exception as error:
            rank_zero_warn(f"{self._who}: the suspects could not be shown: {type(error).__name__}: {error}")
        large = influence.num_chains * influence.num_draws >= LARGE_BUDGET
        self._publisher.influence(influence, rendered, pairs=large)

    def _warn_of_failure(self, step: int, reason: str) -> None:
        """A step that fails in chains fails at every firing: the whole reason is said once, not at each of them."""
        left_out = f"{self._who}: the measurement at step {step} failed and is left out"
        if self._said_failure is not None and self._said_failure[1] == reason:
            rank_zero_warn(f"{left_out}, for the reason given at step {self._said_failure[0]}; training goes on.")
            return
        self._said_failure = (step, reason)
        rank_zero_warn(f"{left_out}; training goes on. {reason}")

    def _leave_influence_out(self, reason: str) -> None:
        """What fails on the samples would fail at every firing."""
        if not self._samples.failed:
            self._samples.failed = True
            rank_zero_warn(
                f"{self._who}: influence is left out of this run from here on, the learning coefficient is measured "
                f"all the same. {reason}"
            )

    def _warn_if_large(self) -> None:
        """Say once what can be done, where the cadence alone takes much of the run."""
        # the first firings of a run come close together, and prove nothing
        overhead = self.estimates[-1].overhead
        large = len(self.estimates) > 3 and overhead > LARGE_OVERHEAD
        if self._budget is not None or not large or not self._said.first("overhead"):
            return
        rank_zero_warn(
            f"{self._who}: measuring has taken {overhead:.0%} of this run's wall-clock so far. Measure more seldom, or "
            "with fewer num_chains or num_draws. max_overhead=0.05 bounds the share, but suits runs of about 10,000 "
            "batches and more: a shorter one may measure nothing."
        )

    def _say_why_not(self, trainer: Trainer, estimate: Estimate) -> None:
        """Why an estimate is not valid: each kind of reason once in a run. The few draws of a smoke test never are."""
        if estimate.valid or is_smoke_test(trainer):
            return
        kinds = kinds_of(estimate)
        fresh = {kind for kind in dict.fromkeys(kinds) if self._said.first(f"not valid: {kind}")}
        new = [reason for reason, kind in zip(estimate.reasons, kinds, strict=True) if kind in fresh]
        if new:
            rank_zero_info(f"{self._who}: {invalid_sentence(estimate, new)}")

    def _say_how(self, estimate: Estimate, influence: Optional[InfluenceEstimate]) -> None:
        """What there is to be said of the first firing, of the first notes, and of the first samples left out."""
        if self._said.first("method"):
            rank_zero_info(
                f"{self._who}: {estimate.num_chains} {estimate.method} chains over {estimate.num_weights} weights "
                f"({estimate.method_reason}), n = {estimate.num_samples}, nbeta = {estimate.nbeta:.4g}, localization = "
                f"{estimate.localization:.4g}, step size {estimate.step_size:.2g}"
            )
            if influence is not None:
                if influence.notes:
                    self._said.first("notes")
                asked = f"of {len(influence.train_index)} training samples on {len(influence.query_index)} queries"
                asked = "; ".join([asked, *influence.notes])
                said = f"is not valid: {'; '.join(influence.reasons)} ({asked})" if influence.reasons else asked
                rank_zero_info(f"{self._who}: influence {said}")
        if influence is not None and influence.notes and self._said.first("notes"):
            rank_zero_info(f"{self._who}: of influence from here on: {'; '.join(influence.notes)}")
        if influence is not None and influence.dropped and self._said.first("dropped"):
            named = ", ".join(f"{d.kind} {d.index} ({d.reason})" for d in influence.dropped[:5])
            rank_zero_warn(f"{self._who}: {len(influence.dropped)} samples are left out of influence: {named}")


def _in_order(history: list[Found], more: list[Found]) -> list[Found]:
    """By step; nothing is moved where there is no more."""
    return sorted(history + more, key=lambda found: found.step or 0) if more else history


__all__ = ["Reporting"]
