"""TransitionMonitor: structural transitions flagged while a model trains, and what a person does with a flag."""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_slt.callbacks.arguments import check_dirpath
from lightning_slt.callbacks.evaluation import KeepsHistory
from lightning_slt.callbacks.flags.boundaries import LearningRateWatch
from lightning_slt.callbacks.flags.kept_weights import KeptWeights
from lightning_slt.callbacks.flags.what_changed import moved_components, moved_samples, with_phases
from lightning_slt.callbacks.monitor import SLTMonitor
from lightning_slt.kinds import check_callable, check_count, check_flag
from lightning_slt.publish import RunPublisher
from lightning_slt.record import Estimate
from lightning_slt.transition_record import TransitionLog, TransitionReport
from lightning_slt.transitions import Transition, TransitionDetector, detect_transitions
from lightning_slt.warned import speaker, warn

_MONITOR = re.compile(r"(slt(?:_[a-z0-9_]+)?)/llc/mean")

OnTransition = Callable[[Transition, Trainer, LightningModule], Any]


class TransitionMonitor(KeepsHistory):
    """Watches the curve of an :class:`~lightning_slt.SLTMonitor` for structural transitions, and acts on a flag.

    Every estimate goes to a :class:`~lightning_slt.TransitionDetector`. A flag is published under
    ``slt/transition/*`` (a row, a table, an alert, a rule in the picture of the history, ``transitions.json`` in the
    record's folder), the weights around it are kept, and ``on_transition`` is called. It may stand before or after the
    SLTMonitor in the list of callbacks. Training stays bit for bit what it was.

    ``trainer.callback_metrics`` has ``slt/transition/{score,flag,count}`` from the first step on. ``flag`` is 1 at the
    batch whose firing flags a transition, and once more at the end of that epoch and at the next validation; else 0. So
    ``ModelCheckpoint(monitor="slt/transition/flag", mode="max", every_n_train_steps=1)`` keeps the flagged step, and
    ``EarlyStopping("slt/transition/flag", mode="max", stopping_threshold=0.5, patience=10**9)`` stops at the end of its
    epoch.

    Args:
        monitor: key of the curve: that of an SLTMonitor in the same trainer, ``slt_<name>/llc/mean`` for one with a
            name. All keys of this callback have the same prefix.
        pin_checkpoints: keep the weights before, at the onset of, after and at the flag of each transition, from a
            short ring of snapshots on disk that is written at each firing.
        alert: tell a person of new and of retracted transitions, where a logger can (wandb's alert, a tag in MLflow,
            a warning with TensorBoard).
        on_transition: ``on_transition(transition, trainer, module)``, called once for each new flag, on every rank.
            An exception in it becomes a warning.
        false_alarms: tolerated false alarms in 100 points.
        min_change: smallest change of the LLC worth a flag.
        at_boundary: transitions at a jump of the learning rate or a reload of the training data carry that step
            (``"annotate"``) or are not flagged (``"suppress"``).
        saddles: points that are not valid only because the weights are at no minimum count as well (chains drift, have
            not mixed, or the number is negative): a saddle is what many a transition comes from. False: only valid
            points count. Points whose chains diverged never do.
        max_snapshots: files in the ring at the most, at least 4.
        dirpath: folder of ``snapshots/`` and ``pinned/``; None for the SLTMonitor's record.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for one of another kind.
        MisconfigurationException: at setup, where no SLTMonitor in the trainer has the key.

    Attributes:
        reports: what is known of each flag so far, in the order in which they became known; retracted ones stay.
        boundaries: steps at which the learning rate jumped or the training data was loaded anew.

    Example:
        >>> from lightning_slt import SLTMonitor
        >>> callbacks = [SLTMonitor(every_n_train_steps=500), TransitionMonitor(min_change=1.0)]
        >>> callbacks[1].transitions
        []
    """

    def __init__(
        self,
        monitor: str = "slt/llc/mean",
        *,
        pin_checkpoints: bool = True,
        alert: bool = True,
        on_transition: Optional[OnTransition] = None,
        false_alarms: float = 0.05,
        min_change: float = 0.0,
        at_boundary: Literal["annotate", "suppress"] = "annotate",
        saddles: bool = True,
        max_snapshots: int = 12,
        dirpath: Optional[str] = None,
    ) -> None:
        match = _MONITOR.fullmatch(monitor) if isinstance(monitor, str) else None
        if match is None:
            raise ValueError(
                f"monitor={monitor!r}: expected the key of an SLTMonitor's curve, 'slt/llc/mean' or "
                "'slt_<name>/llc/mean' for SLTMonitor(name=<name>)."
            )
        check_count("max_snapshots", max_snapshots, 4, "; pin_checkpoints=False keeps none", optional=False)
        check_callable("on_transition", on_transition, "transition, trainer, module")
        for name, flag in (("pin_checkpoints", pin_checkpoints), ("alert", alert), ("saddles", saddles)):
            check_flag(name, flag, optional=False)
        check_dirpath(dirpath)
        self._key = monitor
        self._prefix = match[1]
        self._settings: dict[str, Any] = {
            "false_alarms": false_alarms,
            "min_change": min_change,
            "at_boundary": at_boundary,
        }
        self._detector = TransitionDetector(**self._settings)
        self._pin, self._alert, self._on_transition = pin_checkpoints, alert, on_transition
        self._saddles = saddles
        self._weights = KeptWeights(max_snapshots, dirpath, self._who)
        self.reports: list[TransitionReport] = []
        self.boundaries: list[float] = []
        self._watch = LearningRateWatch()
        self._seen_step = -1
        self._fed = -1
        self._step_flag = False  # since the last optimiser step: results from the background come several at once
        self._epoch_flag = False
        self._epoch_over = False
        self._unvalidated = False  # a flag that no validation has followed yet
        self._monitor: Optional[SLTMonitor] = None
        self._loader: Optional[weakref.ref[Any]] = None

    @property
    def transitions(self) -> list[Transition]:
        """All flags so far in their current state, in the order in which they became known."""
        return self._detector.transitions

    @property
    def state_key(self) -> str:
        """Differs between monitors of different curves."""
        return self._generate_state_key(monitor=self._key)

    @property
    def _who(self) -> str:
        """What it calls itself where it says something."""
        return speaker(self._prefix, kind="TransitionMonitor")

    # --- before training ------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        monitors = [c for c in trainer.callbacks if isinstance(c, SLTMonitor)]  # type: ignore[attr-defined]
        for monitor in monitors:
            monitor.number_among(trainer)  # its own setup may come later
        found = [monitor for monitor in monitors if monitor.prefix == self._prefix]
        if not found:
            name = self._prefix.removeprefix("slt").removeprefix("_")
            remedy = f"SLTMonitor(name={name!r})" if name else "SLTMonitor()"
            keys = ", ".join(f"'{monitor.prefix}/llc/mean'" for monitor in monitors)
            raise MisconfigurationException(
                f"TransitionMonitor(monitor={self._key!r}): no SLTMonitor of this trainer has that key. Add {remedy} "
                f"to the trainer's callbacks" + (f", or choose one of {keys}." if keys else ".")
            )
        self._monitor = found[0]
        self._monitor.add_listener(self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # here and not in on_train_start: the SLTMonitor may measure in its own, which may come first
        if self._begins(trainer):
            self._forget()
        self._weights.begin()
        self._loader = None
        self._step_flag = self._epoch_flag = self._epoch_over = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, flag=False)

    def _forget(self) -> None:
        """Another run has no history, whatever this object has seen before."""
        self._detector = TransitionDetector(**self._settings)
        self.reports, self.boundaries = [], []
        self._watch = LearningRateWatch()
        self._seen_step = self._fed = -1
        self._unvalidated = False
        self._weights.forget()

    def _show(self, trainer: Trainer, flag: bool) -> None:
        """To those who monitor a metric."""
        standing = sum(t.state != "retracted" for t in self._detector.transitions)
        values = {"score": self._detector.score, "flag": float(flag), "count": float(standing)}
        trainer.callback_metrics.update(
            {f"{self._prefix}/transition/{k}": torch.tensor(v, device="cpu") for k, v in values.items()}
        )

    # --- while training -------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_flag = self._epoch_over = False
        # made anew whenever the data is loaded anew
        loader = trainer.fit_loop._combined_loader
        if self._loader is not None and self._loader() is not loader:
            self._boundary(trainer.fit_loop.epoch_loop._batches_that_stepped)
        # weakly: the workers of a loader that is given up must not wait for this callback
        self._loader = weakref.ref(loader)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        within = step == self._seen_step  # an accumulation window
        # not at the end of a batch: the firing may come before this callback's turn there, or after it
        self._step_flag &= within
        self._show(trainer, flag=self._step_flag)
        if within:
            return  # no rate moves
        self._seen_step = step
        rates = [
            float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups if "lr" in group
        ]
        if self._watch.jumped(rates):
            self._boundary(step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # EarlyStopping may look at a validation's end, which can come epochs after the flag
        if not trainer.sanity_checking and self._unvalidated:
            self._show(trainer, flag=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._unvalidated = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_over = True
        self._show(trainer, flag=self._epoch_flag)

    def _boundary(self, step: int) -> None:
        if not self.boundaries or self.boundaries[-1] != step:
            self.boundaries.append(float(step))
            self._detector.boundary(step)

    def on_estimate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        monitor: SLTMonitor,
        estimate: Estimate,
        publisher: Optional[RunPublisher],
    ) -> None:
        """See :class:`~lightning_slt.callbacks.listener.EstimateListener`."""
        if not monitor.measures_later and estimate.step is not None:
            self.on_snapshot(trainer, pl_module, estimate.step)
        new: list[Transition] = []
        changed: dict[int, Transition] = {}
        for point in self._not_fed(monitor.estimates):
            if point.step is None or point.step <= self._fed:
                continue
            self._fed = point.step
            flags = self._detector.update(
                float(point.step), point.mean, point.chain_se, point.init_loss, valid=self._counts(point)
            )
            new += flags
            changed |= {t.id: t for t in [*flags, *self._detector.changes]}
        self._step_flag |= bool(new)
        self._epoch_flag |= bool(new)
        self._unvalidated |= bool(new)
        self._show(trainer, flag=self._step_flag or (self._epoch_over and self._epoch_flag))
        reports = [self._report(trainer, monitor, t, estimate) for t in changed.values()]
        for report in reports:
            rank_zero_info(f"{self._who}: {report.sentence()}")
        if publisher is not None and estimate.step is not None:
            x = estimate.x if estimate.x is not None else estimate.step
            publisher.transition_point(
                self._detector.score, self.record(), bool(new), x, estimate.step, reports, self._alert
            )
        for transition in new:
            self._call(transition, trainer, pl_module)

    def _not_fed(self, estimates: Sequence[Estimate]) -> list[Estimate]:
        """The newest estimates, back to those that the detector has had. More than one where a run is resumed with this
        callback added: the curve before counts. From the end, since a run may have many."""
        newest = itertools.takewhile(lambda e: e.step is None or e.step > self._fed, reversed(estimates))
        return list(newest)[::-1]

    def _counts(self, estimate: Estimate) -> bool:
        return estimate.comparable if self._saddles else estimate.valid

    def record(self, offline: Sequence[Transition] = ()) -> TransitionLog:
        """All that is known so far."""
        return TransitionLog(
            self._key, self._detector.threshold, tuple(self.reports), tuple(self.boundaries), tuple(offline)
        )

    def _call(self, transition: Transition, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._on_transition is None:
            return
        try:
            self._on_transition(transition, trainer, pl_module)
        except Exception as error:
            # called on every rank, and it may fail on another one than the first alone
            rank = f" on rank {trainer.global_rank}" if trainer.world_size > 1 else ""
            warn(
                f"{self._who}: on_transition failed for transition {transition.id}{rank}; training goes on. "
                f"{type(error).__name__}: {error}",
                every_rank=True,
            )

    # --- what is known of a transition ----------------------------------------------------------------------------

    def _report(
        self, trainer: Trainer, monitor: SLTMonitor, transition: Transition, estimate: Optional[Estimate]
    ) -> TransitionReport:
        """The report of a transition, made or brought up to date; kept in :attr:`reports`."""
        number = transition.id
        old = next((report for report in self.reports if report.transition.id == number), None)
        report = old if old is not None else TransitionReport(transition, x=estimate.x if estimate else None)
        all_known = self._detector.transitions
        report = with_phases(report.replace(transition=transition), monitor.estimates, all_known)
        others = [c for c in trainer.callbacks if isinstance(c, SLTMonitor)]  # type: ignore[attr-defined]
        curves = {c.prefix.removeprefix("slt_"): c.estimates for c in others}
        report = report.replace(
            samples=moved_samples(transition, monitor.influences, others=all_known),
            components=moved_components(transition, curves, all_known) if len(others) > 1 else (),
        )
        if old is None or (transition.state == "confirmed" and transition != old.transition):
            # a flag comes early: where the change was is measured anew when it is confirmed
            checkpoints = self._weights.pin(trainer, transition, again=old is not None)
            report = report.replace(checkpoints=checkpoints or report.checkpoints)
        if old is None:
            self.reports.append(report)
        else:
            self.reports[self.reports.index(old)] = report
        return report

    def on_snapshot(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """See :class:`~lightning_slt.callbacks.listener.EstimateListener`."""
        smoke = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self._pin and not smoke:
            folder = self._monitor.folder if self._monitor is not None else None
            self._weights.add(trainer, pl_module, step, folder, self._prefix)

    # --- after training -------------------------------------------------------------------------------------------

    def on_monitor_end(self, trainer: Trainer, monitor: SLTMonitor, publisher: RunPublisher) -> Sequence[Transition]:
        """See :class:`~lightning_slt.callbacks.listener.EstimateListener`."""
        points = [e for e in monitor.estimates if e.step is not None]
        if not points:
            return []
        offline = detect_transitions(
            [float(e.step or 0) for e in points],
            [e.mean for e in points],
            [e.chain_se for e in points],
            [e.init_loss for e in points],
            [self._counts(e) for e in points],
            boundaries=self.boundaries,
            **self._settings,
        )
        # all of the curve is known now: the phases have more points than when a flag was raised
        for transition in self._detector.transitions:
            self._report(trainer, monitor, transition, None)
        self.reports = refined(self.reports, offline)
        last = points[-1]
        step = int(last.step or 0)
        publisher.finish_transitions(self.record(offline), last.x if last.x is not None else step, step)
        return self._detector.transitions

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._monitor is not None:
            self._monitor.remove_listener(self)
        self._weights.end()
        self._monitor, self._loader = None, None

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "detector": self._detector.state_dict(),
            "log": self.record().as_dict(),
            "watch": self._watch.state_dict(),
            "seen_step": self._seen_step,
            "fed": self._fed,
            "unvalidated": self._unvalidated,
            "ring": self._weights.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._keeps(self._seen_step > 0) or not state_dict:
            return  # an empty state is of no run
        self._given = True
        self._detector.load_state_dict(state_dict["detector"])
        log = TransitionLog.from_dict(state_dict["log"])
        self.reports, self.boundaries = list(log.reports), list(log.boundaries)
        self._watch.load_state_dict(state_dict["watch"])
        self._seen_step, self._fed = int(state_dict["seen_step"]), int(state_dict["fed"])
        self._unvalidated = bool(state_dict.get("unvalidated", False))
        self._weights.load_state_dict(state_dict.get("ring"))

    def __getstate__(self) -> dict[str, Any]:
        """For strategies that spawn: what belongs to a running process stays behind."""
        return {**super().__getstate__(), "_monitor": None, "_loader": None, "_trained_by": None}


def refined(reports: Sequence[TransitionReport], offline: Sequence[Transition]) -> list[TransitionReport]:
    """The reports with the offline transition that belongs to each: of the same direction, and the two overlap or lie
    no further apart than both are wide. Each offline transition belongs to one report at the most.
    """
    free, out = list(offline), []
    for report in reports:
        t = report.transition
        reach = max(t.known_at - t.onset, 0.0)
        near = [
            o for o in free if o.llc_change * t.llc_change > 0 and o.onset <= t.end + reach and o.end >= t.onset - reach
        ]
        best = min(near, key=lambda o: abs(o.step - t.step), default=None)
        if best is not None and t.state != "retracted":
            free.remove(best)
            report = report.replace(refined=best)
        else:
            report = report.replace(refined=None)
        out.append(report)
    return out


__all__ = ["TransitionMonitor"]
