"""What becomes of an estimate that is there: the history, the record and the loggers, and those who listen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_slt.callbacks.arguments import is_smoke_test
from lightning_slt.callbacks.asked import Asked
from lightning_slt.callbacks.clock import RunClock
from lightning_slt.callbacks.data.samples import ProbedSamples
from lightning_slt.callbacks.folder import claim, fresh, give_back, restore_record, run_folder
from lightning_slt.callbacks.history import History
from lightning_slt.callbacks.listener import EstimateListener
from lightning_slt.callbacks.remarks import say_all_failed, say_cost, say_how_far, warn_of_other_weights
from lightning_slt.callbacks.said import Voice
from lightning_slt.callbacks.susceptibilities import publish, restore_susceptibilities
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.publish import RunPublisher
from lightning_slt.publish.diagnoses import outcome_of
from lightning_slt.publish.phrases import count_of
from lightning_slt.publish.render import Rendered
from lightning_slt.publish.sink import RunCost
from lightning_slt.record import Estimate, RunRecord
from lightning_slt.sampling.collective import Collective
from lightning_slt.susceptibility_record import SusceptibilityEstimate
from lightning_slt.transitions import Transition
from lightning_slt.warned import warn

if TYPE_CHECKING:
    from lightning_slt.callbacks.monitor import SLTMonitor

LARGE_BUDGET = 1600
"""Readings of a firing, over all chains, from which on single pairs are shown at once and not only at the end."""


class Reporting:
    """Begins where a measurement ends.

    Args:
        asked: what the monitor was asked for.
        voice, clock: of the monitor.
        samples: those that influence is read of.

    Attributes:
        history: what was measured so far.
        folder: where the record is; None where no files are written.
        resumed_folder: that of the run that a checkpoint is of.
        held_folder: the same, where another run has it now.
    """

    def __init__(self, asked: Asked, voice: Voice, clock: RunClock, samples: ProbedSamples) -> None:
        self._asked, self._voice, self._clock, self._samples = asked, voice, clock, samples
        self.history = History()
        self.folder: Optional[Path] = None
        self.held_folder: Optional[Path] = None
        self.resumed_folder: Optional[Path] = None
        self._publisher: Optional[RunPublisher] = None
        self._listeners: list[tuple[EstimateListener, SLTMonitor]] = []

    def __getstate__(self) -> dict[str, Any]:
        """For strategies that spawn: listeners come again in their own setup."""
        return {**self.__dict__, "_publisher": None, "_listeners": []}

    def add_listener(self, listener: EstimateListener, monitor: SLTMonitor) -> None:
        """Tell ``listener`` of every estimate, and that it is of ``monitor``; adding it twice is adding it once."""
        if all(listener != other for other, _ in self._listeners):
            self._listeners.append((listener, monitor))

    def remove_listener(self, listener: EstimateListener) -> None:
        """Tell it no more; nothing happens where it is not told."""
        self._listeners = [told for told in self._listeners if told[0] is not listener]

    def forget(self) -> None:
        """Another run has no history and a folder of its own."""
        self.history.forget()
        self.resumed_folder = None

    # --- a fit begins and ends ------------------------------------------------------------------------------------

    def open(self, trainer: Trainer, last_step: int, collective: Collective) -> list[Estimate]:
        """The folder and the loggers of this run; none of either under ``fast_dev_run``.

        Args:
            last_step: steps done.
            collective: all ranks come here.

        Returns:
            Estimates of a resumed run that its record had and the history lacked.
        """
        prefix = self._voice.prefix
        if is_smoke_test(trainer):
            self._publisher = RunPublisher([], None, prefix)
            return []
        folder = None
        if not getattr(trainer, "barebones", False):
            folder = run_folder(trainer, self.resumed_folder, self._asked.dirpath, prefix)
        resumed = bool(self.history.estimates) or self.resumed_folder is not None
        restored: list[Estimate] = []
        if folder is not None:
            kept = resumed and folder == self.resumed_folder
            self.held_folder = None
            if trainer.is_global_zero and not (kept and claim(folder)):
                self.held_folder = folder if kept else None
                folder = fresh(folder)
            if resumed:
                restored = self._restore(trainer, folder, last_step, collective)
        self.folder = self.resumed_folder = folder
        self._publisher = RunPublisher(trainer.loggers, folder, prefix)
        return restored

    def stay(self) -> None:
        """Nothing is left to train of a run that is resumed: its record is where it was."""
        if self.resumed_folder is not None and self.resumed_folder.is_dir():
            self.folder = self.resumed_folder

    def has_recorded(self, step: int) -> bool:
        """Whether the record has an estimate of this step, as that of a run has which went on after its checkpoint."""
        if self.folder is None:
            return False
        try:
            return any(e.step == step for e in RunRecord(self.folder).read(traces=False))
        except (OSError, ValueError, KeyError, TypeError):
            return False  # which is said where it is to be restored

    def start(self, config: Mapping[str, Any]) -> None:
        """Publish the settings of the run that has been opened."""
        assert self._publisher is not None
        self._publisher.start(config)

    def _restore(self, trainer: Trainer, folder: Path, last_step: int, collective: Collective) -> list[Estimate]:
        """The record and the history of a resumed run: each has what the other had up to the checkpoint's step.

        The first rank has the record, and tells the others: when to fire depends on the history.
        """
        history = self.history

        def of_record() -> tuple[list[Estimate], list[InfluenceEstimate], list[SusceptibilityEstimate]]:
            if not trainer.is_global_zero:
                return [], [], []
            found = restore_record(
                RunRecord(folder), last_step, history.estimates, history.influences, self._voice.prefix
            ).values()
            others = restore_susceptibilities(folder, last_step, history.susceptibilities, self._voice.who)
            return [e for e, _ in found], [i for _, i in found if i is not None], others

        recorded = collective.exchange(of_record)[0]
        history.add_recorded(*recorded)
        return recorded[0]

    def finish(self, trainer: Trainer, status: str) -> None:
        """A fit is over: close the record and the loggers, and say how the run came out."""
        publisher, self._publisher = self._publisher, None
        if publisher is None:
            return
        estimates = self.history.estimates
        cost = RunCost(self._clock.measured_seconds, self._clock.run_seconds)
        try:
            self._close(trainer, status, publisher, cost)
        finally:
            give_back(self.folder)
        if not estimates and self._voice.failures:
            say_all_failed(self._voice)
        if not estimates or self.folder is None or not trainer.is_global_zero:
            return
        recorded = {estimate.step for estimate in RunRecord(self.folder).read(traces=False)}
        lacking = sum(estimate.step not in recorded for estimate in estimates)
        if lacking < len(estimates):
            say_cost(self._voice, cost)
            where = f"in {self.folder}"
            if lacking:  # a disk that filled up
                where += f", without {lacking:,} of them that could not be written there"
            report = f"; report: {publisher.report}" if publisher.report is not None else ""
            rank_zero_info(f"{self._voice.who}: {outcome_of(estimates)}, {where}{report}")
        else:
            warn(
                f"{self._voice.who}: {count_of(len(estimates), 'estimate')} in monitor.estimates and in the loggers, "
                f"and none in files: {self.folder} could not be written. Name a folder that can be with dirpath=."
            )

    def _close(self, trainer: Trainer, status: str, publisher: RunPublisher, cost: RunCost) -> None:
        if self.history.influences:
            publisher.finish_influence(self.history.influences)
        transitions: list[Transition] = []
        for listener, monitor in self._listeners:
            try:
                transitions += listener.on_monitor_end(trainer, monitor, publisher)
            except Exception as error:  # the record and the loggers must be closed whatever it met
                warn(f"{self._voice.who}: {type(listener).__name__} failed at the end: {type(error).__name__}: {error}")
        publisher.finish(self.history.estimates, status, transitions, cost)  # last: it flushes

    # --- while training -------------------------------------------------------------------------------------------

    @contextmanager
    def one_row(self, joins: Optional[int] = None) -> Iterator[None]:
        """What is taken up inside is one row of a wandb run, see :meth:`RunPublisher.one_row`."""
        with self._publisher.one_row(joins) if self._publisher is not None else nullcontext():
            yield

    def settle(self) -> None:
        """A batch or an epoch begins: training has logged what it had to log of the one before."""
        if self._publisher is not None:
            self._publisher.settle()

    def take_up(
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
        estimates = self.history.estimates
        estimate = estimate.replace(overhead=self._clock.overhead(begin), component=self._asked.name or "")
        if estimates:
            warn_of_other_weights(self._voice, estimate, before=estimates[-1].num_weights)
        estimates.append(estimate)
        if not is_smoke_test(trainer):  # the few draws of one are never valid
            say_how_far(self._voice, estimate, self._asked.step_given)
        self.show(trainer)
        if self._publisher is not None:
            self._publisher.estimate(estimate)
        if influence is not None:
            self._publish_influence(trainer, self.history.add_influence(influence, estimate))
        for listener, monitor in self._listeners:
            self._tell(listener, monitor, trainer, pl_module, estimate)

    def take_up_susceptibility(self, trainer: Trainer, found: SusceptibilityEstimate) -> None:
        """Into the history, the record and the loggers."""
        self.history.susceptibilities.append(found)
        publish(found, self._publisher, self.folder, self._voice.prefix, trainer.is_global_zero, self._voice.who)

    def tell_of_snapshot(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Listeners have the weights before them that an estimate will be of, which comes later."""
        for listener, _ in self._listeners:
            listener.on_snapshot(trainer, pl_module, step)

    def show(self, trainer: Trainer) -> None:
        """The newest estimate for callbacks that monitor it; before there is one, that none is valid."""
        prefix = self._voice.prefix
        if not self.history.estimates:
            trainer.callback_metrics.setdefault(f"{prefix}/diag/valid", torch.tensor(0.0, device="cpu"))
            return
        newest = self.history.estimates[-1]
        trainer.callback_metrics.update(
            {
                f"{prefix}/llc/mean": torch.tensor(newest.mean, device="cpu"),
                f"{prefix}/llc/se": torch.tensor(newest.se, device="cpu"),
                f"{prefix}/diag/valid": torch.tensor(float(newest.valid), device="cpu"),
            }
        )

    def _tell(
        self,
        listener: EstimateListener,
        monitor: SLTMonitor,
        trainer: Trainer,
        pl_module: LightningModule,
        estimate: Estimate,
    ) -> None:
        """What fails in it follows ``on_failure``, and is warned about once."""
        try:
            listener.on_estimate(trainer, pl_module, monitor, estimate, self._publisher)
        except Exception as error:
            if self._asked.raises:
                raise
            if self._voice.first("listener"):
                warn(
                    f"{self._voice.who}: {type(listener).__name__} failed at step {estimate.step}; training goes on, "
                    f"further failures are not reported. {type(error).__name__}: {error}"
                )

    def _publish_influence(self, trainer: Trainer, influence: InfluenceEstimate) -> None:
        if self._publisher is None:
            return
        rendered: dict[int, Rendered] = {}
        try:
            # the other ranks log nothing
            rendered = self._samples.rendered(influence) if trainer.is_global_zero else {}
        except Exception as error:
            warn(f"{self._voice.who}: the suspects could not be shown: {type(error).__name__}: {error}")
        large = influence.num_chains * influence.num_draws >= LARGE_BUDGET
        self._publisher.influence(influence, rendered, pairs=large)


__all__ = ["Reporting"]
