"""SLTMonitor: the learning coefficient of the model that is being trained, with training left as it was."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Optional, Union

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_slt.callbacks.background import BackgroundFirings, Late, warn_of_lost
from lightning_slt.callbacks.data import TrainingData, check_num_samples, training_transfer
from lightning_slt.callbacks.distribution import (
    check_strategy,
    close_collective,
    make_collective,
    make_objective,
    share_batches,
)
from lightning_slt.callbacks.folder import fresh, recorded, restore_record, run_folder
from lightning_slt.callbacks.listener import EstimateListener
from lightning_slt.callbacks.overhead import Decision, OverheadBudget
from lightning_slt.callbacks.progress import FiringProgress
from lightning_slt.callbacks.samples import Probed, ProbedSamples
from lightning_slt.callbacks.schedule import Schedule
from lightning_slt.callbacks.sizing import chain_steps, least_size, size_of, sized
from lightning_slt.callbacks.susceptibilities import (
    Measures,
    measure_beside,
    publish,
    restore_susceptibilities,
    warn_of,
)
from lightning_slt.callbacks.travel import flat_weights
from lightning_slt.estimate import ChainSettings
from lightning_slt.firing import Course
from lightning_slt.influence import ProbeSet
from lightning_slt.influence_record import InfluenceEstimate, suspicion_of
from lightning_slt.publish import RunPublisher
from lightning_slt.publish.render import Rendered
from lightning_slt.record import Estimate, RunRecord
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.collective import Alone, Collective, RankLostError
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.probe import GroupFn
from lightning_slt.sampling.restriction import select_parameters
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.samplers import MALA, SGLD, SGNHT, RMSpropSGLD, sampler_from
from lightning_slt.sampling.shadow import shadow_copy
from lightning_slt.sampling.sharded import ShardedObjective, local_of
from lightning_slt.sampling.steps import LossFn, loss_function
from lightning_slt.susceptibility_record import SusceptibilityEstimate
from lightning_slt.transitions import Transition

SMOKE_SAMPLER = SGLD(lr=1e-6)
"""A smoke test shows that chains run, not what they say: no step size is looked for."""
LARGE_BUDGET = 1600
"""Readings of a firing, over all chains, from which on single pairs are shown at once and not only at the end."""
LARGE_OVERHEAD = 0.25
"""Share of wall-clock above which a monitor without a budget says that there is one."""


class SLTMonitor(Callback):
    """Measures the local learning coefficient while a model trains, and logs it with its error.

    At each firing SGLD chains start from the current weights, on a private copy of the module, with minibatches of
    their own; training goes on bit for bit as it would have without. The loss is the module's own ``training_step``.

    Args:
        every_n_train_steps: measure at every n-th batch that stepped an optimiser.
        every_n_epochs: measure at the end of every n-th training epoch.
        at_steps: measure at these steps; 0 is before training.
        log_spaced: measure this often over the run, log-spaced. With none of these four given: 20.
        max_overhead: the share of the run's wall-clock that measuring may take, such as 0.05: the steps named above are
            then candidates, and those that the budget does not cover are left out. With none named, every step is one.
            Firings start small and grow to the size that is asked for (:mod:`lightning_slt.callbacks.sizing`).
        sampler: None for SGLD with a calibrated step; ``SGLD(lr=...)`` fixes the step. Also RMSpropSGLD, which starts
            from the second moments of an Adam where there is one, and SGNHT.
        num_chains: chains of a firing, over all ranks together.
        num_draws: draws of each chain.
        num_burnin_steps: None to burn in until the trace is flat.
        num_steps_bw_draws: steps a draw; None for as many as the error asks, 4 at the most.
        batch_size: of the chains' minibatches; None for that of the training loader.
        nbeta: None for ``n / log n``.
        localization: gamma; None for ``d / |w*|²`` within [1, 100] at the first firing, and kept.
        loss_fn: ``loss_fn(module, batch)`` -> scalar or ``[batch]``; needed for manual optimisation.
        restrict: which weights move: glob patterns over parameter names, submodule names, submodules.
        on_failure: what to do when a firing fails: ``"warn"`` and train on, or ``"raise"``.
        seed: of the chains; the same at every firing, so that the errors of neighbouring points cancel.
        warm_start: chains start from the displacements of an earlier firing while these fit, which takes most of the
            burn-in away, see :mod:`lightning_slt.sampling.memory`; False: every firing starts at the weights.
        num_samples: n, where the data cannot tell.
        name: key prefix and folder of this monitor (``slt_<name>``); several monitors are numbered without it.
        dirpath: folder of the local record; None for ``<logger's run folder>/slt``.
        method: ``"auto"``, ``"sequential"`` or ``"batched"``, see :func:`~lightning_slt.estimate_llc`.
        probe: measure the influence of training samples as well, from the same chains: True for the training set up
            to 1,000 samples, a number for another limit, or a Dataset of samples to look at. The same samples are
            looked at at every firing.
        query: whose losses they influence: None for the probed samples themselves, a number of samples of the
            validation data, or a Dataset.
        group_fn: ``group_fn(sample)`` -> the group that a sample of a dataset belongs to; None for its class.
        render: ``render(sample)`` -> a picture (array, tensor or PIL image) or a text to show it by. None for defaults
            by shape; token ids are decoded by the ``tokenizer`` attribute (with a ``decode`` method) of the datamodule,
            the LightningModule or the dataset, the first that has one.

        execution: ``"inline"``, or ``"background"``: a firing takes a snapshot of the weights, and other processes run
            the chains while training goes on; results come later, under the step of their snapshot. See
            docs/background.md.
        devices: of those processes, one each, which share the chains: ``["cuda:1"]``, ``["cpu"]``, or cores of it as
            ``["cpu:2-3"]``. None for the GPUs that training does not use, or the CPU where it trains there.
        max_pending: snapshots in the background whose results are still to come, at the most.
        when_full: a firing beyond that is left out (``"skip"``), or waited for (``"wait"``).
        max_wait: seconds that training waits for a result at the most, there and at the end of fit.
        measures: names out of ``"llc"`` (always measured), ``"influence"`` and ``"susceptibility"``; the latter as
            ``{"name": "susceptibility", "components": {"head": ["fc.*"]}}`` for components of your own, by chains of
            their own, of the shift towards ``query`` (or the probed samples): docs/susceptibility.md. None for the LLC,
            and influence where ``probe`` is given.

    Raises:
        ValueError: for an argument out of range.
        MisconfigurationException: before training starts, where the module, data or strategy cannot be measured.

    Attributes:
        estimates: what was measured so far, oldest first.
        influences: influence of the probed samples, oldest first; the pair matrices of all but the last are in the
            record only.
        folder: where the local record is, None where no files are written.

    Example:
        >>> monitor = SLTMonitor(every_n_train_steps=500)
        >>> monitor.estimates
        []
    """

    def __init__(
        self,
        every_n_train_steps: Optional[int] = None,
        every_n_epochs: Optional[int] = None,
        at_steps: Optional[Sequence[int]] = None,
        log_spaced: Optional[int] = None,
        max_overhead: Optional[float] = None,
        sampler: Optional[Union[SGLD, RMSpropSGLD, SGNHT]] = None,
        num_chains: int = 4,
        num_draws: int = 100,
        num_burnin_steps: Optional[int] = None,
        num_steps_bw_draws: Optional[int] = None,
        batch_size: Optional[int] = None,
        nbeta: Optional[float] = None,
        localization: Optional[float] = None,
        loss_fn: Optional[LossFn] = None,
        restrict: Optional[Union[str, list[str], nn.Module, list[nn.Module]]] = None,
        on_failure: str = "warn",
        seed: int = 0,
        warm_start: bool = True,
        num_samples: Optional[int] = None,
        name: Optional[str] = None,
        dirpath: Optional[str] = None,
        method: str = "auto",
        probe: Probed = None,
        query: Probed = None,
        group_fn: Optional[GroupFn] = None,
        render: Optional[Callable[[Any], Any]] = None,
        execution: str = "inline",
        devices: Optional[Sequence[str]] = None,
        max_pending: int = 2,
        when_full: str = "skip",
        max_wait: float = 600.0,
        measures: Optional[Sequence[Any]] = None,
    ) -> None:
        if execution not in ("inline", "background"):
            raise ValueError(f"execution={execution!r}: must be 'inline' or 'background'.")
        if execution == "inline" and devices is not None:
            raise ValueError(
                f"devices={devices!r}: chains inside training run where training does; "
                "execution='background' has devices of its own."
            )
        self._beside: Optional[BackgroundFirings] = None
        if execution == "background":
            self._beside = BackgroundFirings(devices, max_pending, when_full, max_wait)
        self._samples = ProbedSamples(probe, query, group_fn, render, seed)
        self._measures = Measures(measures, self._samples.wanted)
        self.susceptibilities: list[SusceptibilityEstimate] = []
        self.influences: list[InfluenceEstimate] = []
        self._budget = OverheadBudget(max_overhead) if max_overhead is not None else None
        if max_overhead is not None and (every_n_train_steps, every_n_epochs, at_steps, log_spaced) == (None,) * 4:
            every_n_train_steps = 1
        self._schedule = Schedule.build(every_n_train_steps, every_n_epochs, at_steps, log_spaced)
        self._settings = ChainSettings(
            sampler=_as_sampler(sampler),
            num_chains=num_chains,
            num_draws=num_draws,
            num_burnin_steps=num_burnin_steps,
            num_steps_bw_draws=num_steps_bw_draws,
            nbeta=nbeta,
            localization=localization,
            seed=seed,
            method=method,
            tolerance=0.05,
            max_steps_bw_draws=4,
        )
        if on_failure not in ("warn", "raise"):
            raise ValueError(f"on_failure={on_failure!r}: must be 'warn' or 'raise'.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1, or None for that of the training loader.")
        if num_samples is not None and num_samples < 2:
            raise ValueError(f"num_samples={num_samples}: must be at least 2, or None to take it from the data.")
        if name is not None and not re.fullmatch(r"[a-z0-9_]+", name):
            raise ValueError(f"name={name!r}: only lower-case letters, digits and underscores (it becomes a log key).")
        self._loss_fn = loss_fn
        self._restrict = _plain(restrict)
        self._batch_size = batch_size
        self._num_samples = num_samples
        self._on_failure = on_failure
        self._name = name
        self._dirpath = dirpath
        self.estimates: list[Estimate] = []
        self.folder: Optional[Path] = None
        self._prefix = f"slt_{name}" if name else "slt"
        self._resumed_folder: Optional[Path] = None
        self._course = Course(localization, method, warm_start)
        self._last_step = 0
        self._seconds = 0.0
        self._run_seconds = 0.0
        self._start: Optional[float] = None
        self._earned_until: Optional[float] = None
        self._ask_at, self._skipped = 0, 0
        self._collective: Collective = Alone()
        self._data: Optional[TrainingData] = None
        self._source: Optional[MinibatchSource] = None
        self._hook_owner: Optional[nn.Module] = None
        self._publisher: Optional[RunPublisher] = None
        self._explicit: tuple[int, ...] = ()
        self._said_method = False
        self._said_overhead = False
        self._said_dropped = False
        self._said_full = False
        self._done_fast_run = False
        self._listeners: list[EstimateListener] = []
        self._said_listener = False

    # --- before training ------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """That of the name, where there is one; else it differs between monitors with other settings.

        Two monitors of the same settings on different submodules need names.
        """
        restrict = self._restrict
        if restrict is not None and not isinstance(restrict, str):
            restrict = [r if isinstance(r, str) else type(r).__name__ for r in _listed(restrict)]
        if self._name is not None:
            return self._generate_state_key(name=self._name)
        settings = repr(dataclasses.replace(self._settings, sampler=None))
        # a monitor without samples keeps the key that it had before there were any
        samples = {"samples": self._samples.describe()} if self._samples.wanted else {}
        return self._generate_state_key(schedule=repr(self._schedule), settings=settings, restrict=restrict, **samples)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        try:
            self._measures.check()
        except ValueError as error:
            raise MisconfigurationException(f"SLTMonitor: {error}") from error
        if self._measures.susceptibility and self._beside is not None:
            raise MisconfigurationException(
                "SLTMonitor(measures=['susceptibility']) is measured inside training: use execution='inline'."
            )
        sampler = self._settings.sampler
        check_strategy(trainer, sampler is None or sampler.elementwise, self._samples.wanted)
        try:
            loss_function(pl_module, self._loss_fn)
        except ValueError as error:
            raise MisconfigurationException(f"SLTMonitor: {error}") from error
        if self._beside is not None and trainer.world_size > 1:
            raise MisconfigurationException(
                f"SLTMonitor(execution='background') is for one training process, and this run has "
                f"{trainer.world_size}: use execution='inline', where every rank runs its share of the chains."
            )
        self._collective = make_collective(trainer)
        self.number_among(trainer)

    @property
    def prefix(self) -> str:
        """The group in front of every key of this monitor; known from ``setup`` on."""
        return self._prefix

    def number_among(self, trainer: Trainer) -> None:
        """Find the prefix of a monitor without a name: they are numbered in the order of the trainer's callbacks."""
        if self._name is None:
            unnamed = [c for c in trainer.callbacks if isinstance(c, SLTMonitor) and c._name is None]  # type: ignore[attr-defined]
            number = unnamed.index(self) + 1 if self in unnamed else 1
            self._prefix = "slt" if number == 1 else f"slt_{number}"

    def add_listener(self, listener: EstimateListener) -> None:
        """Tell ``listener`` of every estimate from now on; adding it twice is adding it once."""
        if listener not in self._listeners:
            self._listeners.append(listener)

    def remove_listener(self, listener: EstimateListener) -> None:
        """Tell it no more; nothing happens where it is not told."""
        self._listeners = [other for other in self._listeners if other is not listener]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in setup: a module may build its layers in its own setup or configure_model, which come after
        try:
            select_parameters(pl_module, self._restrict)
        except ValueError as error:
            raise MisconfigurationException(f"SLTMonitor: {error}") from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._data = TrainingData(trainer, self._batch_size, self._num_samples, self._settings.seed)
        self._source = None
        self._samples.forget()
        try:
            self._samples.check(self._data.indexed)
        except ValueError as error:
            raise MisconfigurationException(f"SLTMonitor: {error}") from error
        check_num_samples(self._data.num_samples, self._settings.nbeta)
        total = trainer.estimated_stepping_batches
        self._explicit = self._schedule.explicit_steps(None if total in (-1, float("inf")) else int(total))
        before = trainer.fit_loop.epoch_loop._batches_that_stepped
        if before == 0 and trainer.ckpt_path is None:
            self._forget()
        now = time.monotonic()
        self._start = now - self._run_seconds
        if self._budget is not None and not _is_smoke_test(trainer):
            share = math.ceil(self._settings.num_chains / self._collective.world_size)
            beside = self._beside is not None
            # of a firing beside training only the snapshot costs it time, whatever its size; about that of a batch
            self._budget.planned_steps = 1 if beside else share * chain_steps(self._settings)
            self._budget.least_size = 1.0 if beside else least_size(self._settings)
            # what passed since the last fit, or since a crash, is nobody's training; and every rank asks at once
            self._earned_until, self._ask_at = now, 0
        self._done_fast_run = False
        self._last_step = max(self._last_step, before)
        self._open_publisher(trainer)
        self._open_background(trainer, pl_module)
        trainer.callback_metrics.setdefault(f"{self._prefix}/diag/valid", torch.tensor(0.0))
        if before == 0 and not self.estimates and 0 in self._explicit and not _is_smoke_test(trainer):
            self._consider(trainer, pl_module, step=0, x=0)

    def _forget(self) -> None:
        """A run that starts at its first step has no history, whatever this object has measured before."""
        self.estimates, self.influences, self.susceptibilities = [], [], []
        settings = self._settings
        self._course = Course(settings.localization, settings.method, self._course.warm_start)
        self._last_step, self._seconds, self._run_seconds = 0, 0.0, 0.0
        self._said_method = self._said_overhead = self._said_dropped = False
        self._resumed_folder = None
        self._skipped = 0
        if self._beside is not None:
            self._beside.forget()
        if self._budget is not None:
            self._budget.forget()

    def _open_publisher(self, trainer: Trainer) -> None:
        """The folder and the loggers of this run; none of either under ``fast_dev_run``."""
        if _is_smoke_test(trainer):
            self._publisher = RunPublisher([], None, self._prefix)
            return
        folder = None
        if not getattr(trainer, "barebones", False):
            folder = run_folder(trainer, self._resumed_folder, self._dirpath, self._prefix)
        resumed = bool(self.estimates) or (self._beside is not None and bool(self._beside.awaited))
        if folder is not None and trainer.is_global_zero:
            if not resumed or folder != self._resumed_folder:
                folder = fresh(folder)
            if resumed:
                restore_record(RunRecord(folder), self._last_step, self.estimates, self.influences)
                restore_susceptibilities(folder, self._last_step, self.susceptibilities)
        self.folder = self._resumed_folder = folder
        self._publisher = RunPublisher(trainer.loggers, folder, self._prefix)
        self._publisher.start(self._config())

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
            "restrict": [str(r) if isinstance(r, str) else type(r).__name__ for r in _listed(self._restrict)] or None,
            "seed": settings.seed,
            "warm_start": self._course.warm_start,
            "samples": self._samples.describe(),
            "background": self._beside.describe() if self._beside is not None else None,
        }

    # --- while training -------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._data is not None and self._data.replays:
            self._data.see(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._collect(trainer, pl_module)
        if self._budget is not None and self._earned_until is not None:
            self._budget.saw_batch(self._earn())
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        # one behind here: Lightning counts the batch after this hook, and logs its metrics at the count before
        x = loop._batches_that_stepped
        step, last = x + 1, self._last_step
        if step <= last:
            return
        self._last_step = step
        if _is_smoke_test(trainer):
            if not self._done_fast_run:
                self._done_fast_run = True
                self._fire(trainer, pl_module, step, x)
        elif self._schedule.due(last, step, self._explicit):
            self._consider(trainer, pl_module, step, x)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collect(trainer, pl_module)
        if _is_smoke_test(trainer) or not self._schedule.due_epoch(trainer.current_epoch + 1):
            return
        if self.estimates and self.estimates[-1].step == self._last_step:
            return
        if self._beside is not None and self._beside.last_step == self._last_step:
            return
        # Lightning takes its count one back to log an epoch's values: they share the x of the last batch
        self._consider(trainer, pl_module, self._last_step, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)

    def _earn(self) -> float:
        """Credit the budget with the time since it was last credited, and return it.

        All that is not a firing is the run to its user: validation, loading data and checkpoints as much as batches.
        """
        assert self._budget is not None and self._earned_until is not None
        now = time.monotonic()
        seconds, self._earned_until = now - self._earned_until, now
        self._budget.earn(seconds)
        return seconds

    def _consider(self, trainer: Trainer, pl_module: LightningModule, step: int, x: int) -> None:
        """Fire at a step that the schedule names, where the budget covers it or there is none.

        The first rank decides, and tells the others at which step to ask next: clocks differ between ranks, and an
        exchange at every step would be dear.
        """
        budget = self._budget
        if budget is None:
            self._fire(trainer, pl_module, step, x)
            return
        decision: Optional[Decision] = None
        if step >= self._ask_at:
            self._earn()
            decision = self._collective.exchange(lambda: budget.decide(step))[0]
            self._ask_at = decision.ask_at
        if decision is not None and decision.fire:
            self._fire(trainer, pl_module, step, x, decision)
        else:
            self._skipped += 1

    def _account(self, begin: float, size: float = 1.0, failed: bool = False) -> None:
        """What a firing of this size that began then has cost, a failed one too."""
        now = time.monotonic()
        self._seconds += now - begin
        if self._budget is not None and self._earned_until is not None:
            if failed:
                self._budget.fail(now - begin)
            else:
                self._budget.spend(now - begin, size)
            self._earned_until = now

    def _fire(
        self, trainer: Trainer, pl_module: LightningModule, step: int, x: int, decision: Optional[Decision] = None
    ) -> None:
        """Measure now, on all ranks, and publish; a failure follows ``on_failure``."""
        begin = time.monotonic()
        settings = self._settings if decision is None else sized(self._settings, decision.size)
        if self._beside is not None and not _is_smoke_test(trainer):
            self._send(trainer, pl_module, step, x, decision)
            return
        try:
            with preserve_rng(), FiringProgress(trainer, f"{self._prefix} at step {step}") as progress:
                estimate, influence = self._measure(trainer, pl_module, progress, settings)
        except Exception as error:
            self._hook_owner = None
            if self._on_failure == "raise" or _is_smoke_test(trainer) or isinstance(error, RankLostError):
                raise
            _warn_of_failure(step, f"{type(error).__name__}: {error}")
            self._account(begin, failed=True)
            return
        size = size_of(settings, self._settings)
        estimate = estimate.replace(seconds=time.monotonic() - begin, step=step, x=x, epoch=trainer.current_epoch)
        if decision is not None:
            estimate = estimate.replace(
                firing_size=size,
                credit_seconds=decision.credit_seconds,
                predicted_seconds=decision.predicted_seconds,
                skipped=self._skipped,
            )
            self._skipped = 0
        self._take_up(trainer, pl_module, estimate, influence, begin)
        if self._measures.susceptibility:
            self._measure_beside(trainer, pl_module, estimate, settings)
        # drawing and logging count as overhead too, from the next firing's figure on
        self._account(begin, size)
        self._warn_if_large()

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
        self.estimates.append(estimate)
        trainer.callback_metrics.update(
            {
                f"{self._prefix}/llc/mean": torch.tensor(estimate.mean),
                f"{self._prefix}/llc/se": torch.tensor(estimate.se),
                f"{self._prefix}/diag/valid": torch.tensor(float(estimate.valid)),
            }
        )
        if self._publisher is not None:
            self._publisher.estimate(estimate)
        if influence is not None:
            self._keep_influence(trainer, influence, estimate)
        for listener in self._listeners:
            self._tell(listener, trainer, pl_module, estimate)

    def _tell(
        self, listener: EstimateListener, trainer: Trainer, pl_module: LightningModule, estimate: Estimate
    ) -> None:
        """What fails in it follows ``on_failure``, and is warned about once."""
        try:
            listener.on_estimate(trainer, pl_module, self, estimate, self._publisher)
        except Exception as error:
            if self._on_failure == "raise":
                raise
            if not self._said_listener:
                self._said_listener = True
                rank_zero_warn(
                    f"{type(listener).__name__} failed at step {estimate.step}; training goes on, further failures are "
                    f"not reported. {type(error).__name__}: {error}"
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
            rank_zero_warn(f"SLTMonitor: the suspects could not be shown: {type(error).__name__}: {error}")
        large = influence.num_chains * influence.num_draws >= LARGE_BUDGET
        self._publisher.influence(influence, rendered, pairs=large)

    def _warn_if_large(self) -> None:
        """Say once that there is a budget, where the cadence alone takes much of the run."""
        # the first firings of a run come close together, and prove nothing
        overhead = self.estimates[-1].overhead
        large = len(self.estimates) > 3 and overhead > LARGE_OVERHEAD
        if self._budget is not None or self._said_overhead or not large:
            return
        self._said_overhead = True
        rank_zero_warn(
            f"SLTMonitor: measuring has taken {overhead:.0%} of this run's wall-clock so far. "
            "SLTMonitor(max_overhead=0.05) keeps it to 5 %, by leaving firings out; or choose a wider cadence."
        )

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, progress: FiringProgress, settings: ChainSettings
    ) -> tuple[Estimate, Optional[InfluenceEstimate]]:
        assert self._data is not None
        data = self._data

        def build() -> tuple[Objective, MinibatchSource]:
            objective = make_objective(
                trainer,
                pl_module,
                self._collective,
                loss_fn=self._loss_fn,
                restrict=self._restrict,
                context=_loss_context(trainer),
            )
            self._hook_owner = objective.module
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
            self._source = source = share_batches(source, self._collective)
            self._share_buffers(objective)
            return objective, source

        objective, source = open_anew()
        settings = dataclasses.replace(settings, second_moment=self._moments(trainer, objective))
        smoke_test = _is_smoke_test(trainer)
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
                    lambda: probes.append(self._samples.read(trainer, source, self._transfer(trainer)))
                )
                measured = self._course.measure(
                    objective, source, settings, probes[0], self._collective, progress, smoke_test
                )
            except Exception as error:
                if self._on_failure == "raise" or smoke_test or isinstance(error, RankLostError):
                    raise
                # work that failed on one rank failed on all of them, so that all of them come here. What is not the
                # samples' fault fails again below, and is then said as any failure is
                influence_error = f"{type(error).__name__}: {error}"
                self._source = None
                objective, source = open_anew()
        if measured is None:
            measured = self._course.measure(objective, source, settings, None, self._collective, progress, smoke_test)
            if influence_error:
                self._samples.failed = True
                rank_zero_warn(
                    "SLTMonitor: influence is left out of this run from here on, the learning coefficient is measured "
                    f"all the same. {influence_error}"
                )
        estimate, influence = measured
        self._hook_owner = None
        self._say_how(estimate, influence)
        return estimate, influence

    def _measure_beside(
        self, trainer: Trainer, pl_module: LightningModule, estimate: Estimate, settings: ChainSettings
    ) -> None:
        """Susceptibility after the learning coefficient, which stands whatever becomes of it."""
        source, step = self._source, estimate.step or 0
        begin = time.monotonic()

        def make(restrict: Any) -> Objective:
            objective = make_objective(
                trainer,
                pl_module,
                self._collective,
                loss_fn=self._loss_fn,
                restrict=restrict,
                context=_loss_context(trainer),
            )
            self._hook_owner = objective.module
            return objective

        try:
            with preserve_rng():
                assert source is not None
                transfer = self._transfer(trainer)
                probes: list[ProbeSet] = []
                self._hook_owner = shadow_copy(pl_module)
                self._collective.exchange(lambda: probes.append(self._samples.read(trainer, source, transfer)))
                found = measure_beside(
                    self._measures,
                    self._restrict,
                    make,
                    source,
                    transfer,
                    probes[0],
                    settings,
                    self._collective,
                    self._share_buffers,
                )
        except Exception as error:
            if self._on_failure == "raise" or _is_smoke_test(trainer) or isinstance(error, RankLostError):
                raise
            warn_of(error, step)
            return
        finally:
            self._hook_owner = None
        found = found.replace(
            step=step, x=estimate.x, epoch=estimate.epoch, monitor=self._prefix, seconds=time.monotonic() - begin
        )
        self.susceptibilities.append(found)
        publish(found, self._publisher, self.folder, self._prefix, trainer.is_global_zero)

    def _say_how(self, estimate: Estimate, influence: Optional[InfluenceEstimate]) -> None:
        """What there is to be said of the first firing, and of the first samples that were left out."""
        if not self._said_method:
            self._said_method = True
            rank_zero_info(
                f"SLTMonitor: {estimate.num_chains} {estimate.method} chains over {estimate.num_weights} weights "
                f"({estimate.method_reason}), n = {estimate.num_samples}, nbeta = {estimate.nbeta:.4g}, localization = "
                f"{estimate.localization:.4g}, step size {estimate.step_size:.2g}"
            )
            if influence is not None:
                notes = "".join(f"; {note}" for note in influence.notes)
                rank_zero_info(
                    f"SLTMonitor: influence of {len(influence.train_index)} training samples on "
                    f"{len(influence.query_index)} queries{notes}"
                )
        if influence is not None and influence.dropped and not self._said_dropped:
            self._said_dropped = True
            named = ", ".join(f"{d.kind} {d.index} ({d.reason})" for d in influence.dropped[:5])
            rank_zero_warn(f"SLTMonitor: {len(influence.dropped)} samples are left out of influence: {named}")

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
        buffers = list(objective.module.buffers())
        if self._collective.world_size == 1 or objective.borrowed or not buffers:
            return
        first = self._collective.rank == 0
        told = self._collective.exchange(lambda: [b.cpu() for b in buffers] if first else None)[0]
        for buffer, value in zip(buffers, told or [], strict=True):
            buffer.copy_(value)

    # --- beside training ------------------------------------------------------------------------------------------

    @property
    def measures_later(self) -> bool:
        """Whether estimates come after training has gone on from their weights."""
        return self._beside is not None

    def _open_background(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the workers, and find again what was out when the run broke off."""
        beside, data, course = self._beside, self._data, self._course
        if beside is None or data is None or _is_smoke_test(trainer):
            return
        beside.open(
            trainer,
            pl_module,
            self.folder,
            data,
            self._loss_fn,
            self._restrict,
            self._settings,
            _loss_context(trainer) is not None,
            course.state_dict,
            course.warm_start,
        )
        known = {} if self.folder is None else recorded(self.folder, beside.awaited)
        # what reached the record after the checkpoint is known, and not published a second time
        for step, (estimate, influence) in known.items():
            self.estimates.append(estimate)
            if influence is not None:
                self.influences.append(influence)
            left = beside.left_by(step)
            if left is not None:
                course.load_state_dict(left)
        late, lost = beside.recover(known)
        warn_of_lost(lost)
        for result in late:
            self._take_late(trainer, pl_module, result)
        beside.begin()

    def _send(
        self, trainer: Trainer, pl_module: LightningModule, step: int, x: int, decision: Optional[Decision]
    ) -> None:
        """Have the weights as they are measured beside training; leave it out where the queue is full."""
        beside, data = self._beside, self._data
        assert beside is not None and data is not None
        begin = time.monotonic()
        with FiringProgress(trainer, f"{self._prefix} at step {step}, waiting for the background") as progress:
            for late in beside.make_room(progress):
                self._take_late(trainer, pl_module, late)
        if beside.broken is not None:
            return
        if beside.full:
            self._skipped += 1
            if not self._said_full:
                self._said_full = True
                rank_zero_warn(f"SLTMonitor: the firing at step {step} is left out, since {beside.full_text()}")
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
                probes = self._probes_of(trainer, pl_module) if self._measures.influence else None
                self._course.settle(flat_weights(pl_module, self._restrict))
                settings = dataclasses.replace(
                    self._settings,
                    localization=self._course.localization,
                    second_moment=self._moments_now(trainer, pl_module),
                )
                beside.send(trainer, pl_module, self._restrict, settings, data, probes, notes)
        except Exception as error:
            if self._on_failure == "raise":
                raise
            _warn_of_failure(step, f"{type(error).__name__}: {error}")
            self._account(begin, failed=True)
            return
        finally:
            self._hook_owner = None
        self._skipped = 0
        for listener in self._listeners:
            listener.on_snapshot(trainer, pl_module, step)
        self._account(begin)

    def _probes_of(self, trainer: Trainer, pl_module: LightningModule) -> ProbeSet:
        """The samples to look at, read at the first firing."""
        assert self._data is not None
        if self._source is None or self._data.replays:
            self._hook_owner = shadow_copy(pl_module)
            self._source = self._data.source(self._transfer(trainer))
        return self._samples.read(trainer, self._source, self._transfer(trainer))

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
        if self._budget is not None and self._earned_until is not None:
            self._earn()
        begin = time.monotonic()
        result = late.result
        if result.course is not None:
            self._course.load_state_dict(result.course)
        if result.estimate is None:
            if self._on_failure == "raise":
                raise RuntimeError(f"the measurement at step {result.step} failed in the background: {result.error}")
            _warn_of_failure(result.step, str(result.error))
            return
        with preserve_rng():
            self._say_how(result.estimate, result.influence)
            self._take_up(trainer, pl_module, result.estimate.replace(**late.notes), result.influence, begin)
        seconds = time.monotonic() - begin
        self._seconds += seconds
        if self._budget is not None and self._earned_until is not None:
            self._budget.charge(seconds)
            self._earned_until = begin + seconds

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
                f"SLTMonitor: the results of steps {beside.pending} did not come within max_wait={beside.max_wait:g} s "
                "of the end of fit, and are left out."
            )

    # --- after training -------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._await_the_last(trainer, pl_module)
        self._finish(trainer, "finished")
        tried = self.estimates or self._seconds > 0
        if self._budget is not None and self._skipped and not tried and math.isfinite(self._budget.predicted_seconds):
            self._warn_of_nothing(self._budget)

    def _warn_of_nothing(self, budget: OverheadBudget) -> None:
        """The budget never sufficed: what a firing would have cost, and what can be done."""
        predicted = budget.wanted_size * budget.predicted_seconds
        rank_zero_warn(
            f"SLTMonitor(max_overhead={budget.max_overhead:g}): nothing was measured. The smallest firing would have "
            f"cost about {predicted:.3g} s, which {predicted / budget.rate:.3g} s of training earn, and training "
            f"lasted {budget.trained_seconds:.3g} s. Raise max_overhead, make a firing cheaper (num_chains, num_draws, "
            "batch_size), or train for longer."
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._beside is not None:
            self._beside.close()  # what is out stays on disk, for a resume
        self._finish(trainer, "failed")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._beside is not None:
            self._beside.close()
        self._source, self._data, self._hook_owner = None, None, None
        close_collective(self._collective)
        self._collective = Alone()

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
        if self._beside is not None:
            self._beside.close(finished=status == "finished")
        if self.influences:
            publisher.finish_influence(self.influences)
        transitions: list[Transition] = []
        for listener in self._listeners:
            try:
                transitions += listener.on_monitor_end(trainer, self, publisher)
            except Exception as error:  # the record and the loggers must be closed whatever it met
                rank_zero_warn(f"{type(listener).__name__} failed at the end: {type(error).__name__}: {error}")
        publisher.finish(self.estimates, status, transitions)  # last: it flushes
        if self.estimates and self.folder is not None:
            rank_zero_info(f"SLTMonitor: {len(self.estimates)} estimates in {self.folder}")

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._earned_until is not None:
            self._earn()
        run_seconds = time.monotonic() - self._start if self._start is not None else self._run_seconds
        return {
            "estimates": [estimate.state_dict() for estimate in self.estimates],
            "influences": [influence.without_pairs().state_dict() for influence in self.influences],
            "susceptibilities": [found.state_dict() for found in self.susceptibilities],
            "last_step": self._last_step,
            **self._course.state_dict(),
            "seconds": self._seconds,
            "run_seconds": run_seconds,
            "folder": str(self.folder) if self.folder is not None else None,
            "budget": self._budget.state_dict() if self._budget is not None else None,
            "skipped": self._skipped,
            "pending": self._beside.state_dict() if self._beside is not None else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.estimates = [Estimate.from_state_dict(state) for state in state_dict["estimates"]]
        self.influences = [InfluenceEstimate.from_state_dict(state) for state in state_dict.get("influences", [])]
        self.susceptibilities = [
            SusceptibilityEstimate.from_state_dict(state) for state in state_dict.get("susceptibilities", [])
        ]
        self._last_step = int(state_dict["last_step"])
        self._course.load_state_dict(state_dict)
        if self._settings.localization is not None:
            self._course.localization = self._settings.localization
        self._seconds = float(state_dict["seconds"])
        self._run_seconds = float(state_dict["run_seconds"])
        folder = state_dict.get("folder")
        self._resumed_folder = Path(folder) if folder else None
        self._skipped = int(state_dict.get("skipped", 0))
        if self._beside is not None:
            self._beside.load_state_dict(state_dict.get("pending", []))
        else:
            warn_of_lost([int(notes["step"]) for notes in state_dict.get("pending", [])])
        if self._budget is not None and state_dict.get("budget") is not None:
            self._budget.load_state_dict(state_dict["budget"])

    def __getstate__(self) -> dict[str, Any]:
        """For strategies that spawn: what belongs to a running process stays behind."""
        state = dict(self.__dict__)
        state.update(_collective=Alone(), _publisher=None, _data=None, _source=None, _hook_owner=None, _start=None)
        state["_earned_until"] = None
        state["_listeners"] = []  # they come again in their own setup
        return state


def _warn_of_failure(step: int, reason: str) -> None:
    rank_zero_warn(f"SLTMonitor: the measurement at step {step} failed and is left out; training goes on. {reason}")


def _is_smoke_test(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _loss_context(trainer: Trainer) -> Optional[Callable[[], AbstractContextManager[Any]]]:
    """The trainer's precision around the loss: autocast where it is used, with float32 weights.

    float16 autocast needs the scaler of training, which chains must not touch: their losses are computed in float32.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.precision == "16-mixed":
        return None
    if isinstance(plugin, (MixedPrecision, HalfPrecision)) or plugin.precision != "32-true":
        return plugin.train_step_context
    return None


def second_moments(
    optimizers: Sequence[torch.optim.Optimizer], module: nn.Module, names: Sequence[str]
) -> Optional[Tensor]:
    """``[d]`` of what an Adam keeps of the squared gradients of the weights that move; None where some have none."""
    parameters, pieces = dict(module.named_parameters()), []
    for name in names:
        states = [o.state[parameters[name]] for o in optimizers if parameters.get(name) in o.state]
        moment = states[0].get("exp_avg_sq") if states else None
        if not isinstance(moment, Tensor) or moment.shape != parameters[name].shape:
            return None
        pieces.append(local_of(moment.detach()).flatten().to("cpu", torch.float32))
    return torch.cat(pieces)


def _as_sampler(sampler: Any) -> Any:
    """A sampler as it is, or built from a mapping (Hydra hands nested arguments over as untyped dicts).

    Raises:
        ValueError: for an unknown key, naming it; for a sampler of full batches.
        TypeError: for anything else.
    """
    if isinstance(sampler, MALA):
        raise ValueError(
            "sampler=MALA(): needs the loss of all the data at every step, which is no way to measure while training. "
            "Use SGLD, RMSpropSGLD or SGNHT here, and estimate_llc(..., sampler=MALA()) on a stored checkpoint."
        )
    if sampler is None or callable(getattr(sampler, "update_", None)):
        return sampler
    if isinstance(sampler, Mapping):
        return sampler_from(sampler)
    raise TypeError(f"sampler: expected a sampler such as SGLD(lr=...), got {type(sampler).__name__}.")


def _plain(restrict: Any) -> Any:
    """Lists of a configuration library as plain lists."""
    if restrict is None or isinstance(restrict, (str, nn.Module)):
        return restrict
    return list(restrict)


def _listed(restrict: Any) -> list[Any]:
    if restrict is None:
        return []
    return [restrict] if isinstance(restrict, (str, nn.Module)) else list(restrict)


__all__ = ["SLTMonitor"]
