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

from lightning_slt.callbacks.data import TrainingData, check_num_samples, training_transfer
from lightning_slt.callbacks.distribution import Ranks, check_strategy, make_collective
from lightning_slt.callbacks.listener import EstimateListener
from lightning_slt.callbacks.overhead import Decision, OverheadBudget
from lightning_slt.callbacks.progress import FiringProgress
from lightning_slt.callbacks.samples import Probed, ProbedSamples
from lightning_slt.callbacks.schedule import Schedule
from lightning_slt.callbacks.sizing import chain_steps, least_size, size_of, sized
from lightning_slt.estimate import ChainSettings, default_localization, measure_llc
from lightning_slt.influence import ProbeSet, measure_both
from lightning_slt.influence_record import InfluenceEstimate, InfluenceRecord, suspicion_of
from lightning_slt.publish import RunPublisher
from lightning_slt.publish.render import Rendered
from lightning_slt.record import Estimate, RunRecord
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.collective import Alone, Collective
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.probe import GroupFn
from lightning_slt.sampling.restriction import select_parameters
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.samplers import MALA, SGLD, SGNHT, RMSpropSGLD, sampler_from
from lightning_slt.sampling.steps import LossFn, loss_function
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
    ) -> None:
        self._samples = ProbedSamples(probe, query, group_fn, render, seed)
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
        self._method = method
        self._localization = localization
        self._warm_start = warm_start
        self._memory = ChainMemory()
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
        check_strategy(trainer)
        try:
            loss_function(pl_module, self._loss_fn)
        except ValueError as error:
            raise MisconfigurationException(f"SLTMonitor: {error}") from error
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
            self._budget.planned_steps = share * chain_steps(self._settings)
            self._budget.least_size = least_size(self._settings)
            # what passed since the last fit, or since a crash, is nobody's training; and every rank asks at once
            self._earned_until, self._ask_at = now, 0
        self._done_fast_run = False
        self._last_step = max(self._last_step, before)
        self._open_publisher(trainer)
        trainer.callback_metrics.setdefault(f"{self._prefix}/diag/valid", torch.tensor(0.0))
        if before == 0 and not self.estimates and 0 in self._explicit and not _is_smoke_test(trainer):
            self._consider(trainer, pl_module, step=0, x=0)

    def _forget(self) -> None:
        """A run that starts at its first step has no history, whatever this object has measured before."""
        self.estimates, self.influences = [], []
        self._localization, self._memory = self._settings.localization, ChainMemory()
        self._last_step, self._seconds, self._run_seconds = 0, 0.0, 0.0
        self._said_method, self._method = False, self._settings.method
        self._said_overhead = self._said_dropped = False
        self._resumed_folder = None
        self._skipped = 0
        if self._budget is not None:
            self._budget.forget()

    def _open_publisher(self, trainer: Trainer) -> None:
        """The folder and the loggers of this run; none of either under ``fast_dev_run``."""
        if _is_smoke_test(trainer):
            self._publisher = RunPublisher([], None, self._prefix)
            return
        folder = self._run_folder(trainer) if not getattr(trainer, "barebones", False) else None
        resumed = bool(self.estimates)
        if folder is not None and trainer.is_global_zero:
            if not resumed or folder != self._resumed_folder:
                folder = _fresh(folder)
            if resumed:
                self._restore_record(RunRecord(folder))
        self.folder = self._resumed_folder = folder
        self._publisher = RunPublisher(trainer.loggers, folder, self._prefix)
        self._publisher.start(self._config())

    def _run_folder(self, trainer: Trainer) -> Path:
        if self._resumed_folder is not None and RunRecord(self._resumed_folder).path.exists():
            return self._resumed_folder
        if self._dirpath is not None:
            return Path(self._dirpath) if self._prefix == "slt" else Path(self._dirpath) / self._prefix
        logger = trainer.loggers[0] if trainer.loggers else None
        if logger is None or logger.version is None:
            return Path(trainer.default_root_dir) / self._prefix
        root = Path(logger.save_dir or trainer.default_root_dir)
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return root / str(logger.name or "") / version / self._prefix

    def _restore_record(self, record: RunRecord) -> None:
        """The history of a resumed run, complete in its folder: what came after the checkpoint is forgotten."""
        try:
            record.drop_after(self._last_step)
            InfluenceRecord(record.folder).drop_after(self._last_step)
            known = {e.step for e in record.read(traces=False)}
            for estimate in self.estimates:
                if estimate.step not in known:
                    record.append(estimate)
            samples = InfluenceRecord(record.folder)
            for influence in self.influences:
                if not all(path.exists() for path in samples.paths(influence.step)):
                    samples.save(influence)
        except OSError as error:
            rank_zero_warn(f"lightning_slt could not restore its record in {record.folder}: {error}")

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
            "nbeta": settings.nbeta,
            "num_samples": self._data.num_samples if self._data else self._num_samples,
            "localization": self._localization,
            "restrict": [str(r) if isinstance(r, str) else type(r).__name__ for r in _listed(self._restrict)] or None,
            "seed": settings.seed,
            "warm_start": self._warm_start,
            "samples": self._samples.describe(),
        }

    # --- while training -------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._data is not None and self._data.replays:
            self._data.see(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
        if _is_smoke_test(trainer) or not self._schedule.due_epoch(trainer.current_epoch + 1):
            return
        if self.estimates and self.estimates[-1].step == self._last_step:
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
        try:
            with preserve_rng(), FiringProgress(trainer, f"{self._prefix} at step {step}") as progress:
                estimate, influence = self._measure(trainer, pl_module, progress, settings)
        except Exception as error:
            self._hook_owner = None
            if self._on_failure == "raise" or _is_smoke_test(trainer):
                raise
            rank_zero_warn(
                f"SLTMonitor: the measurement at step {step} failed and is left out; training goes on. "
                f"{type(error).__name__}: {error}"
            )
            self._account(begin, failed=True)
            return
        seconds = time.monotonic() - begin
        elapsed = time.monotonic() - (self._start if self._start is not None else begin)
        estimate = estimate.replace(
            step=step,
            x=x,
            epoch=trainer.current_epoch,
            seconds=seconds,
            overhead=(self._seconds + seconds) / max(elapsed, 1e-9),
            component=self._name or "",
        )
        size = size_of(settings, self._settings)
        if decision is not None:
            estimate = estimate.replace(
                firing_size=size,
                credit_seconds=decision.credit_seconds,
                predicted_seconds=decision.predicted_seconds,
                skipped=self._skipped,
            )
            self._skipped = 0
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
        # drawing and logging count as overhead too, from the next firing's figure on
        self._account(begin, size)
        self._warn_if_large(estimate)

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

    def _warn_if_large(self, estimate: Estimate) -> None:
        """Say once that there is a budget, where the cadence alone takes much of the run."""
        # the first firings of a run come close together, and prove nothing
        large = len(self.estimates) > 3 and estimate.overhead > LARGE_OVERHEAD
        if self._budget is not None or self._said_overhead or not large:
            return
        self._said_overhead = True
        rank_zero_warn(
            f"SLTMonitor: measuring has taken {estimate.overhead:.0%} of this run's wall-clock so far. "
            "SLTMonitor(max_overhead=0.05) keeps it to 5 %, by leaving firings out; or choose a wider cadence."
        )

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, progress: FiringProgress, settings: ChainSettings
    ) -> tuple[Estimate, Optional[InfluenceEstimate]]:
        assert self._data is not None
        data = self._data

        def build() -> tuple[Objective, MinibatchSource]:
            objective = Objective(
                pl_module, self._loss_fn, self._restrict, trainer=trainer, context=_loss_context(trainer)
            )
            self._hook_owner = objective.module
            if self._source is None or data.replays:
                self._source = data.source(self._transfer(trainer))
            else:
                self._source.forget()
            return objective, self._source

        # the objects stay here: only the word that it worked is exchanged
        built: list[tuple[Objective, MinibatchSource]] = []
        self._collective.exchange(lambda: built.append(build()))
        objective, source = built[0]
        self._share_buffers(objective)
        if self._localization is None:
            self._localization = default_localization(objective.anchor)
        settings = dataclasses.replace(
            settings,
            localization=self._localization,
            method=self._method,
            second_moment=self._moments(trainer, objective),
        )
        memory: Optional[ChainMemory] = self._memory
        if _is_smoke_test(trainer):
            settings = dataclasses.replace(
                settings, num_chains=1, num_draws=4, num_burnin_steps=2, num_steps_bw_draws=1, sampler=SMOKE_SAMPLER
            )
            memory = None
        influence: Optional[InfluenceEstimate] = None
        influence_error = ""
        estimate: Optional[Estimate] = None
        if self._samples.wanted and not self._samples.failed:
            probes: list[ProbeSet] = []
            try:
                self._collective.exchange(
                    lambda: probes.append(self._samples.read(trainer, source, self._transfer(trainer)))
                )
                estimate, influence = measure_both(
                    objective, source, settings, probes[0], self._collective, progress, memory
                )
            except Exception as error:
                if self._on_failure == "raise" or _is_smoke_test(trainer):
                    raise
                # work that failed on one rank failed on all of them, so that all of them come here. What is not the
                # samples' fault fails again below, and is then said as any failure is
                influence_error = f"{type(error).__name__}: {error}"
                self._source = None
                self._collective.exchange(lambda: built.append(build()))
                objective, source = built[-1]
                self._share_buffers(objective)
        if estimate is None:
            estimate = measure_llc(objective, source, settings, self._collective, progress, memory)
            if influence_error:
                self._samples.failed = True
                rank_zero_warn(
                    "SLTMonitor: influence is left out of this run from here on, the learning coefficient is measured "
                    f"all the same. {influence_error}"
                )
        self._hook_owner = None
        if not self._warm_start:
            self._memory = ChainMemory(lr=self._memory.lr)
        if estimate.method == "sequential":
            # it always works, so it stays: another path rounds otherwise, and points would not share their noise
            self._method = "sequential"
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
        return estimate, influence

    def _transfer(self, trainer: Trainer) -> Callable[[Any], Any]:
        """What the trainer does to a batch, with the hooks of the private copy there is when it is read."""
        return lambda batch: training_transfer(trainer, self._hook_owner)(batch)  # type: ignore[arg-type]

    def _moments(self, trainer: Trainer, objective: Objective) -> Optional[Tensor]:
        """``[d]`` second moments of the optimisers, the first rank's, for a sampler that wants them and starts cold."""
        sampler = self._settings.sampler
        if sampler is None or not sampler.preconditioned or self._memory.displacements is not None:
            return None
        first, module = self._collective.rank == 0, trainer.lightning_module
        return self._collective.exchange(
            lambda: second_moments(trainer.optimizers, module, objective) if first else None
        )[0]

    def _share_buffers(self, objective: Objective) -> None:
        """The first rank's buffers for all: BatchNorm statistics differ between ranks, and a chain must not."""
        buffers = list(objective.module.buffers())
        if self._collective.world_size == 1 or objective.borrowed or not buffers:
            return
        first = self._collective.rank == 0
        told = self._collective.exchange(lambda: [b.cpu() for b in buffers] if first else None)[0]
        for buffer, value in zip(buffers, told or [], strict=True):
            buffer.copy_(value)

    # --- after training -------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
        self._finish(trainer, "failed")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._source, self._data, self._hook_owner = None, None, None
        if isinstance(self._collective, Ranks):
            self._collective.close()
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
            "last_step": self._last_step,
            "localization": self._localization,
            "memory": self._memory.state_dict(),
            "seconds": self._seconds,
            "run_seconds": run_seconds,
            "folder": str(self.folder) if self.folder is not None else None,
            "method": self._method,
            "budget": self._budget.state_dict() if self._budget is not None else None,
            "skipped": self._skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.estimates = [Estimate.from_state_dict(state) for state in state_dict["estimates"]]
        self.influences = [InfluenceEstimate.from_state_dict(state) for state in state_dict.get("influences", [])]
        self._last_step = int(state_dict["last_step"])
        if self._settings.localization is None:
            self._localization = state_dict["localization"]
        self._memory.load_state_dict(state_dict["memory"])
        self._seconds = float(state_dict["seconds"])
        self._run_seconds = float(state_dict["run_seconds"])
        folder = state_dict.get("folder")
        self._resumed_folder = Path(folder) if folder else None
        self._method = state_dict.get("method", self._method)
        self._skipped = int(state_dict.get("skipped", 0))
        if self._budget is not None and state_dict.get("budget") is not None:
            self._budget.load_state_dict(state_dict["budget"])

    def __getstate__(self) -> dict[str, Any]:
        """For strategies that spawn: what belongs to a running process stays behind."""
        state = dict(self.__dict__)
        state.update(_collective=Alone(), _publisher=None, _data=None, _source=None, _hook_owner=None, _start=None)
        state["_earned_until"] = None
        state["_listeners"] = []  # they come again in their own setup
        return state


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
    optimizers: Sequence[torch.optim.Optimizer], module: nn.Module, objective: Objective
) -> Optional[Tensor]:
    """``[d]`` of what an Adam keeps of the squared gradients of the weights that move; None where some have none."""
    parameters, pieces = dict(module.named_parameters()), []
    for name in objective.names:
        states = [o.state[parameters[name]] for o in optimizers if parameters.get(name) in o.state]
        moment = states[0].get("exp_avg_sq") if states else None
        if not isinstance(moment, Tensor) or moment.shape != parameters[name].shape:
            return None
        pieces.append(moment.detach().flatten().to("cpu", torch.float32))
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


def _fresh(folder: Path) -> Path:
    """A folder that no earlier run has its record in."""
    candidate, number = folder, 1
    while RunRecord(candidate).path.exists():
        candidate, number = folder.with_name(f"{folder.name}_run{number}"), number + 1
    return candidate


__all__ = ["SLTMonitor"]
