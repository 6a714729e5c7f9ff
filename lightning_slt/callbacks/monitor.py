"""SLTMonitor: the learning coefficient of the model that is being trained, with training left as it was."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_slt.callbacks.arguments import (
    as_sampler,
    check_dirpath,
    check_name,
    is_smoke_test,
    listed,
    plain,
    warn_of_other_curve,
    warn_of_untrained,
)
from lightning_slt.callbacks.background import BackgroundFirings, warn_of_lost
from lightning_slt.callbacks.data import TrainingData, check_num_samples
from lightning_slt.callbacks.distribution import (
    check_strategy,
    close_collective,
    is_sharded,
    make_collective,
)
from lightning_slt.callbacks.inside_firings import InsideFirings
from lightning_slt.callbacks.listener import EstimateListener
from lightning_slt.callbacks.overhead import Decision, OverheadBudget
from lightning_slt.callbacks.progress import FiringProgress
from lightning_slt.callbacks.said import Said
from lightning_slt.callbacks.samples import Probed, ProbedSamples
from lightning_slt.callbacks.schedule import Schedule, is_of_batch_norm, steps_of_run
from lightning_slt.callbacks.signals import SignalsHeld
from lightning_slt.callbacks.sizing import chain_steps, least_size, size_of, sized
from lightning_slt.callbacks.susceptibilities import Measures
from lightning_slt.firing import Course, firing_settings
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.kinds import check_count, check_flag
from lightning_slt.publish import RunPublisher
from lightning_slt.record import Estimate
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.collective import Alone, Collective, RankLostError
from lightning_slt.sampling.restriction import AllFrozenError, select_parameters
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.samplers import SGLD, SGNHT, LeimkuhlerMatthews, RMSpropSGLD
from lightning_slt.sampling.samples import GroupFn
from lightning_slt.sampling.steps import LossFn, check_loss_fn, loss_function
from lightning_slt.susceptibility_record import SusceptibilityEstimate


class SLTMonitor(InsideFirings):
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
            Firings start small and grow to the size that is asked for (:mod:`lightning_slt.callbacks.sizing`). Of this
            monitor alone: the budgets of several add.
        sampler: None for SGLD with a calibrated step; ``SGLD(lr=...)`` fixes the step. Also LeimkuhlerMatthews,
            RMSpropSGLD, which starts from the second moments of an Adam where there is one, and SGNHT.
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
        name: key prefix and folder of this monitor (``slt_<name>``); several monitors are numbered without it. Those
            that differ only in their sampler, or in submodules of one class, need names: a checkpoint could not tell
            them apart, and Lightning refuses them ("more than one stateful callback").
        dirpath: folder of the local record; None for ``<logger's run folder>/slt``, below ``default_root_dir`` or the
            current directory where the logger's is on a remote filesystem.
        method: ``"auto"``, ``"sequential"`` or ``"batched"``, see :func:`~lightning_slt.estimate_llc`.
        probe: measure the influence of training samples as well, from the same chains: True for the training set up
            to 1,000 samples, a number for another limit, or a Dataset of samples to look at, such as training has (of
            several loaders, one for each in a container like theirs: ``{"a": sample, "b": sample}``). The same samples
            are looked at at every firing.
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
        TypeError: for one of another kind.
        MisconfigurationException: before training starts, where the module, data or strategy cannot be measured.

    Attributes:
        estimates: what was measured so far, oldest first.
        influences: influence of the probed samples, oldest first; the last one with its pairs, where the readings are
            enough for them; those of the others are in the record.
        folder: where the local record is, None where no files are written.

    Example:
        >>> monitor = SLTMonitor(every_n_train_steps=500)
        >>> monitor.estimates
        []
    """

    def __init__(
        self,
        every_n_train_steps: Optional[int] = None,
        *,
        every_n_epochs: Optional[int] = None,
        at_steps: Optional[Sequence[int]] = None,
        log_spaced: Optional[int] = None,
        max_overhead: Optional[float] = None,
        sampler: Optional[Union[LeimkuhlerMatthews, SGLD, RMSpropSGLD, SGNHT]] = None,
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
        beside = BackgroundFirings(devices, max_pending, when_full, max_wait)
        self._beside = beside if execution == "background" else None
        self._samples = ProbedSamples(probe, query, group_fn, render, seed)
        self._measures = Measures(measures, self._samples.wanted)
        self.susceptibilities: list[SusceptibilityEstimate] = []
        self.influences: list[InfluenceEstimate] = []
        self._budget = OverheadBudget(max_overhead) if max_overhead is not None else None
        if max_overhead is not None and (every_n_train_steps, every_n_epochs, at_steps, log_spaced) == (None,) * 4:
            every_n_train_steps = 1
        self._schedule = Schedule.build(every_n_train_steps, every_n_epochs, at_steps, log_spaced)
        self._settings = firing_settings(
            sampler=as_sampler(sampler),
            num_chains=num_chains,
            num_draws=num_draws,
            num_burnin_steps=num_burnin_steps,
            num_steps_bw_draws=num_steps_bw_draws,
            nbeta=nbeta,
            localization=localization,
            seed=seed,
            method=method,
        )
        if on_failure not in ("warn", "raise"):
            raise ValueError(f"on_failure={on_failure!r}: must be 'warn' or 'raise'.")
        check_count("batch_size", batch_size, otherwise=", or None for that of the training loader")
        check_count("num_samples", num_samples, 2, ", or None to take it from the data")
        check_flag("warm_start", warm_start, optional=False)
        if loss_fn is not None:
            check_loss_fn(loss_fn)
        check_name(name)
        check_dirpath(dirpath)
        self._loss_fn = loss_fn
        self._restrict = plain(restrict)
        self._batch_size = batch_size
        self._num_samples = num_samples
        self._on_failure = on_failure
        self._name = name
        self._dirpath = dirpath
        self.estimates: list[Estimate] = []
        self.folder: Optional[Path] = None
        self._prefix = f"slt_{name}" if name else "slt"
        self._resumed_folder: Optional[Path] = None
        self._held_folder: Optional[Path] = None
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
        self._said = Said()
        self._said_failure: Optional[tuple[int, str]] = None
        self._done_fast_run = False
        self._listeners: list[EstimateListener] = []

    # --- before training ------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """That of the name, where there is one; else it differs between monitors with other settings.

        Two monitors of the same settings on different submodules, or with different samplers, need names.
        """
        restrict = self._restrict
        if restrict is not None and not isinstance(restrict, str):
            restrict = [r if isinstance(r, str) else type(r).__name__ for r in listed(restrict)]
        if self._name is not None:
            return self._generate_state_key(name=self._name)
        # by what was asked for: a setting that a later version adds keeps the keys of the checkpoints of this one
        asked = ((f.name, getattr(self._settings, f.name), f.default) for f in dataclasses.fields(self._settings))
        settings = repr({name: value for name, value, default in asked if name != "sampler" and value != default})
        # a monitor without samples keeps the key that it had before there were any
        samples = {"samples": self._samples.describe()} if self._samples.wanted else {}
        return self._generate_state_key(schedule=repr(self._schedule), settings=settings, restrict=restrict, **samples)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.number_among(trainer)
        try:
            self._measures.check()
        except ValueError as error:
            raise MisconfigurationException(f"{self._who}: {error}") from error
        if self._measures.susceptibility and self._beside is not None:
            raise MisconfigurationException(
                self._called("measures=['susceptibility']") + " is measured inside training: use execution='inline'."
            )
        sampler = self._settings.sampler
        check_strategy(trainer, sampler is None or sampler.elementwise, self._samples.wanted, self._prefix)
        try:
            loss_function(pl_module, self._loss_fn)
        except ValueError as error:
            raise MisconfigurationException(f"{self._who}: {error}") from error
        if self._beside is not None and (trainer.world_size > 1 or is_sharded(trainer)):
            raise MisconfigurationException(
                self._called("execution='background'")
                + f" is for one training process with whole weights, and this run has {trainer.world_size} under "
                f"{type(trainer.strategy).__name__}: use execution='inline', where ranks share the chains."
            )
        self._collective = make_collective(trainer)

    def number_among(self, trainer: Trainer) -> None:
        """Find the prefix of a monitor without a name: they are numbered in the order of the trainer's callbacks.

        A number that another monitor has for its name is passed over.
        """
        if self._name is None:
            monitors = [c for c in trainer.callbacks if isinstance(c, SLTMonitor)]  # type: ignore[attr-defined]
            unnamed = [c for c in monitors if c._name is None]
            place = unnamed.index(self) if self in unnamed else 0
            free = (n for n in itertools.count(2) if str(n) not in {c._name for c in monitors})
            self._prefix = f"slt_{next(itertools.islice(free, place - 1, None))}" if place else "slt"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in setup: a module may build its layers in its own setup or configure_model, which come after
        try:
            select_parameters(pl_module, self._restrict)
        except ValueError as error:
            finetuning = any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            if not (isinstance(error, AllFrozenError) and finetuning):  # what is frozen now may thaw
                raise MisconfigurationException(f"{self._who}: {error}") from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._data = self._data_of(trainer)
        self._source = None
        self._samples.forget()
        try:
            self._samples.check(self._data.indexed)
            self._measures.check_data(self._data.indexed)
        except ValueError as error:
            raise MisconfigurationException(f"{self._who}: {error}") from error
        if not self._data.counts_batches:
            check_num_samples(self._data.num_samples, self._settings.nbeta, self._who)
        self._explicit = self._steps_of_all(trainer)
        before = trainer.fit_loop.epoch_loop._batches_that_stepped
        begins = self._begins(trainer)
        if begins:
            self._forget()
        now = time.monotonic()
        self._start = now - self._run_seconds
        if self._budget is not None and not is_smoke_test(trainer):
            share = math.ceil(self._settings.num_chains / self._collective.world_size)
            beside = self._beside is not None
            # of a firing beside training only the snapshot costs it time, whatever its size; about that of a batch
            self._budget.planned_steps = 1 if beside else share * chain_steps(self._settings)
            self._budget.least_size = 1.0 if beside else least_size(self._settings)
            # what passed since the last fit, or since a crash, is nobody's training; and every rank asks at once
            self._earned_until, self._ask_at = now, 0
        if self._restrict is None and not is_sharded(trainer):
            warn_of_untrained(trainer, pl_module, self._who)
        self._done_fast_run = False
        last = self._last_step
        self._last_step = max(last, before)
        self._open_publisher(trainer)
        self._open_background(trainer, pl_module)
        self._show(trainer)  # a run that is resumed may be a while from its next firing
        if before == 0 and not self.estimates and 0 in self._explicit and not is_smoke_test(trainer):
            self._consider(trainer, pl_module, step=0, x=0)
        elif not begins and not is_smoke_test(trainer):
            self._make_up_for(trainer, pl_module, last)

    def _make_up_for(self, trainer: Trainer, pl_module: LightningModule, last: int) -> None:
        """Measure at the step of a checkpoint that was written between the end of its batch and the firing there.

        Another callback may have written it at the end of the batch, before this one's turn; and Lightning does not
        come to the end of an epoch again whose last batch a checkpoint has.

        Args:
            last: the step that this monitor was told of last, by the checkpoint.
        """
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        batches: Any = loop.batch_progress.total  # a tracker with more counts than its declared class has
        epochs = fit.epoch_progress.current
        at_batch_end = loop.restarting and batches.ready == batches.processed == batches.completed + 1
        if not at_batch_end or loop._should_accumulate():
            return
        x = loop._batches_that_stepped
        step = x + 1
        due = self._schedule.due(last, step, self._explicit)
        if epochs.completed == epochs.ready:  # the epoch is over
            due |= self._schedule.due_epoch(epochs.completed)
        if not due or self._has(step):
            return
        self._last_step = step
        if self._data is not None and self._data.replays:
            rank_zero_warn(
                f"{self._who}: the measurement at step {step} is left out: the checkpoint was written before it, and "
                "the batches that training had seen, which chains replay, are not in it."
            )
            return
        self._consider(trainer, pl_module, step, x)

    def _steps_of_all(self, trainer: Trainer) -> tuple[int, ...]:
        """The steps to measure at, those of the first rank for all: a rank that measures alone waits for the others.

        Raises:
            MisconfigurationException: where epochs are to be measured that end at another step on each rank.
        """
        told = self._collective.exchange(lambda: (trainer.num_training_batches, steps_of_run(trainer)))
        lengths = [batches for batches, _ in told]
        if self._schedule.every_n_epochs is not None and len(set(lengths)) > 1:
            raise MisconfigurationException(
                self._called(f"every_n_epochs={self._schedule.every_n_epochs}")
                + f": an epoch has {lengths} batches on the ranks, which would come to its end at different steps and "
                "wait for each other. Use every_n_train_steps=, or loaders of one length."
            )
        return self._schedule.explicit_steps(told[0][1])

    def _forget(self) -> None:
        """Another run has no history, whatever this object has measured before."""
        self.estimates, self.influences, self.susceptibilities = [], [], []
        settings = self._settings
        self._course = Course(settings.localization, settings.method, self._course.warm_start)
        self._last_step, self._seconds, self._run_seconds = 0, 0.0, 0.0
        self._said.forget()
        self._said_failure = None
        self._resumed_folder = None
        self._skipped = 0
        if self._beside is not None:
            self._beside.forget()
        if self._budget is not None:
            self._budget.forget()

    # --- while training -------------------------------------------------------------------------------------------

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
        if is_smoke_test(trainer):
            if not self._done_fast_run:
                self._done_fast_run = True
                self._fire(trainer, pl_module, step, x)
        elif self._schedule.due(last, step, self._explicit) and not is_of_batch_norm(trainer):
            self._consider(trainer, pl_module, step, x)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collect(trainer, pl_module)
        if is_smoke_test(trainer) or not self._schedule.due_epoch(trainer.current_epoch + 1):
            return
        if is_of_batch_norm(trainer):
            return
        if self.estimates and self.estimates[-1].step == self._last_step:
            return
        if self._beside is not None and self._beside.last_step == self._last_step:
            return
        # Lightning takes its count one back to log an epoch's values: they share the x of the last batch
        self._consider(trainer, pl_module, self._last_step, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)

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

    def _fire(
        self, trainer: Trainer, pl_module: LightningModule, step: int, x: int, decision: Optional[Decision] = None
    ) -> None:
        """Measure now, on all ranks, and publish; a failure follows ``on_failure``."""
        try:
            if self._beside is not None and not is_smoke_test(trainer):
                self._send(trainer, pl_module, step, x, decision)
                return
            with SignalsHeld() as held:
                self._fire_inside(trainer, pl_module, step, x, decision, held)
        except KeyboardInterrupt:
            if not self._has(step):
                # a checkpoint of now is of the weights that were to be measured: a resume makes up for it
                self._last_step = min(self._last_step, max(step - 1, 0))
                rank_zero_info(f"{self._who}: the measurement at step {step} was interrupted and is not recorded.")
            raise

    def _has(self, step: int) -> bool:
        """Whether a step has been measured, or sent to be."""
        sent = self._beside is not None and self._beside.last_step == step
        return sent or any(estimate.step == step for estimate in self.estimates)

    def _fire_inside(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: int,
        x: int,
        decision: Optional[Decision],
        held: SignalsHeld,
    ) -> None:
        begin = time.monotonic()
        settings = self._settings if decision is None else sized(self._settings, decision.size)
        smoke_test = is_smoke_test(trainer)
        # ranks with shards can only leave off together, and where failures raise a signal must not be one
        check = None if is_sharded(trainer) or smoke_test or self._on_failure == "raise" else held.check
        try:
            with preserve_rng(), FiringProgress(trainer, f"{self._prefix} at step {step}", check) as progress:
                estimate, influence = self._measure(trainer, pl_module, progress, settings)
        except Exception as error:
            self._hook_owner = None
            if self._on_failure == "raise" or smoke_test or isinstance(error, RankLostError):
                raise
            self._warn_of_failure(step, f"{type(error).__name__}: {error}")
            self._account(trainer, begin, failed=True)
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
        self._account(trainer, begin, size)
        self._warn_if_large()

    # --- after training -------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._await_the_last(trainer, pl_module)
        self._finish(trainer, "finished")
        if self.estimates or self._seconds > 0 or not self._last_step:
            return
        if not self._skipped:
            self._warn_of_no_step(trainer)
        elif self._budget is not None and math.isfinite(self._budget.predicted_seconds):
            self._warn_of_nothing(self._budget)

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

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING:
            warn_of_other_curve(checkpoint.get("callbacks", {}), self, trainer, self._who)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._keeps(bool(self.estimates)) or not state_dict:
            return  # an empty state is of no run
        self._given = True
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
            steps = [int(notes["step"]) for notes in state_dict.get("pending", [])]
            warn_of_lost(steps, self._who, "this monitor measures inside training (execution='inline')")
        if self._budget is not None and state_dict.get("budget") is not None:
            self._budget.load_state_dict(state_dict["budget"])

    def __getstate__(self) -> dict[str, Any]:
        """For strategies that spawn: what belongs to a running process stays behind."""
        state = super().__getstate__()
        state.update(_collective=Alone(), _publisher=None, _data=None, _source=None, _hook_owner=None, _start=None)
        state["_earned_until"] = state["_trained_by"] = None
        state["_listeners"] = []  # they come again in their own setup
        return state


__all__ = ["SLTMonitor"]
