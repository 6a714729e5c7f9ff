"""SLTMonitor: the learning coefficient of the model that is being trained, with training left as it was."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_slt.callbacks.arguments import (
    as_sampler,
    is_smoke_test,
    plain,
    warn_of_other_curve,
    warn_of_other_number,
    warn_of_untrained,
)
from lightning_slt.callbacks.asked import Asked
from lightning_slt.callbacks.attempts import Attempts
from lightning_slt.callbacks.background.firings import BackgroundFirings, warn_of_lost
from lightning_slt.callbacks.background.late import LateFirings
from lightning_slt.callbacks.clock import RunClock
from lightning_slt.callbacks.component_firings import ComponentFirings
from lightning_slt.callbacks.data.following import FollowedData
from lightning_slt.callbacks.data.samples import Probed, ProbedSamples
from lightning_slt.callbacks.data.training import check_num_samples
from lightning_slt.callbacks.distribution import (
    check_strategy,
    close_collective,
    is_sharded,
    make_collective,
)
from lightning_slt.callbacks.evaluation import KeepsHistory
from lightning_slt.callbacks.inside_firings import InsideFirings
from lightning_slt.callbacks.listener import EstimateListener
from lightning_slt.callbacks.moment import Moment
from lightning_slt.callbacks.overhead import Decision, OverheadBudget
from lightning_slt.callbacks.remarks import say_when_first, warn_of_left_out, warn_of_no_step, warn_of_nothing
from lightning_slt.callbacks.reporting import Reporting
from lightning_slt.callbacks.said import Voice
from lightning_slt.callbacks.schedule import Schedule
from lightning_slt.callbacks.sizing import chain_steps, least_size
from lightning_slt.callbacks.susceptibilities import Measures
from lightning_slt.callbacks.turns import Turn, Turns
from lightning_slt.firing import Course, firing_settings
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.kinds import check_flag
from lightning_slt.record import Estimate
from lightning_slt.sampling.collective import Alone, Collective
from lightning_slt.sampling.restriction import AllFrozenError, select_parameters
from lightning_slt.sampling.samplers import SGLD, SGNHT, LeimkuhlerMatthews, RMSpropSGLD
from lightning_slt.sampling.samples import GroupFn
from lightning_slt.sampling.steps import LossFn, loss_function
from lightning_slt.susceptibility_record import SusceptibilityEstimate
from lightning_slt.warned import warn


class SLTMonitor(KeepsHistory):
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
            validation data (True for up to 1,000), or a Dataset.
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
        samples = ProbedSamples(probe, query, group_fn, render, seed)
        budget = OverheadBudget(max_overhead) if max_overhead is not None else None
        if max_overhead is not None and (every_n_train_steps, every_n_epochs, at_steps, log_spaced) == (None,) * 4:
            every_n_train_steps = 1
        self._asked = asked = Asked(
            schedule=Schedule.build(every_n_train_steps, every_n_epochs, at_steps, log_spaced),
            settings=firing_settings(
                sampler=as_sampler(sampler),
                num_chains=num_chains,
                num_draws=num_draws,
                num_burnin_steps=num_burnin_steps,
                num_steps_bw_draws=num_steps_bw_draws,
                nbeta=nbeta,
                localization=localization,
                seed=seed,
                method=method,
            ),
            measures=Measures(measures, samples.wanted),
            restrict=plain(restrict),
            loss_fn=loss_fn,
            batch_size=batch_size,
            num_samples=num_samples,
            on_failure=on_failure,
            name=name,
            dirpath=dirpath,
        )
        if asked.measures.susceptibility and execution == "background":
            raise ValueError(
                "execution='background': measures=['susceptibility'] is measured inside training: use "
                "execution='inline'."
            )
        check_flag("warm_start", warm_start, optional=False)
        self._samples = samples
        self._voice = voice = Voice(f"slt_{name}" if name else "slt")
        self._clock = clock = RunClock(budget)
        self._turns = Turns(asked.schedule, clock)
        self._course = course = Course(localization, method, warm_start)
        self._followed = followed = FollowedData(asked, voice)
        self._reporting = reporting = Reporting(asked, voice, clock, samples)
        inside = InsideFirings(asked, voice, samples, course, followed)
        components = ComponentFirings(asked, voice, samples, course, followed, inside)
        self._attempts = Attempts(asked, voice, clock, self._turns, inside, components, reporting)
        self._late: Optional[LateFirings] = None
        if execution == "background":
            self._late = LateFirings(beside, asked, voice, samples, course, followed, clock, reporting)
        self._collective: Collective = Alone()

    # --- what others see ------------------------------------------------------------------------------------------

    @property
    def estimates(self) -> list[Estimate]:
        """What was measured so far, oldest first."""
        return self._reporting.history.estimates

    @property
    def influences(self) -> list[InfluenceEstimate]:
        """Influence of the probed samples, oldest first."""
        return self._reporting.history.influences

    @property
    def susceptibilities(self) -> list[SusceptibilityEstimate]:
        """Susceptibility of components, oldest first."""
        return self._reporting.history.susceptibilities

    @property
    def folder(self) -> Optional[Path]:
        """Where the local record is, None where no files are written."""
        return self._reporting.folder

    @property
    def prefix(self) -> str:
        """The group in front of every key of this monitor; known from ``setup`` on."""
        return self._voice.prefix

    @property
    def measures_later(self) -> bool:
        """Whether estimates come after training has gone on from their weights."""
        return self._late is not None

    def add_listener(self, listener: EstimateListener) -> None:
        """Tell ``listener`` of every estimate from now on; adding it twice is adding it once."""
        self._reporting.add_listener(listener, self)

    def remove_listener(self, listener: EstimateListener) -> None:
        """Tell it no more; nothing happens where it is not told."""
        self._reporting.remove_listener(listener)

    # --- before training ------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """That of the name, where there is one; else it differs between monitors with other settings.

        Two monitors of the same settings on different submodules, or with different samplers, need names.
        """
        if self._asked.name is not None:
            return self._generate_state_key(name=self._asked.name)
        # a monitor without samples keeps the key that it had before there were any
        samples = {"samples": self._samples.describe()} if self._samples.wanted else {}
        return self._generate_state_key(**self._asked.key(), **samples)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.number_among(trainer)
        sampler = self._asked.settings.sampler
        check_strategy(trainer, sampler is None or sampler.elementwise, self._samples.wanted, self._voice.prefix)
        try:
            loss_function(pl_module, self._asked.loss_fn)
        except ValueError as error:
            raise MisconfigurationException(f"{self._voice.who}: {error}") from error
        if self._late is not None and (trainer.world_size > 1 or is_sharded(trainer)):
            raise MisconfigurationException(
                self._voice.called("execution='background'")
                + f" is for one training process with whole weights, and this run has {trainer.world_size} under "
                f"{type(trainer.strategy).__name__}: use execution='inline', where ranks share the chains."
            )
        self._collective = make_collective(trainer)

    def number_among(self, trainer: Trainer) -> None:
        """Find the prefix of a monitor without a name: they are numbered in the order of the trainer's callbacks.

        A number that another monitor has for its name is passed over.
        """
        if self._asked.name is None:
            monitors = [c for c in trainer.callbacks if isinstance(c, SLTMonitor)]  # type: ignore[attr-defined]
            unnamed = [c for c in monitors if c._asked.name is None]
            place = unnamed.index(self) if self in unnamed else 0
            free = (n for n in itertools.count(2) if str(n) not in {c._asked.name for c in monitors})
            self._voice.prefix = f"slt_{next(itertools.islice(free, place - 1, None))}" if place else "slt"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in setup: a module may build its layers in its own setup or configure_model, which come after
        try:
            select_parameters(pl_module, self._asked.restrict)
            self._asked.measures.check_weights(pl_module)
        except ValueError as error:
            finetuning = any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            if not (isinstance(error, AllFrozenError) and finetuning):  # what is frozen now may thaw
                raise MisconfigurationException(f"{self._voice.who}: {error}") from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        asked, voice, smoke_test = self._asked, self._voice, is_smoke_test(trainer)
        data = self._followed.open(trainer)
        self._samples.forget()
        try:
            self._samples.check(data.indexed)
            asked.measures.check_data(data.indexed)
        except ValueError as error:
            raise MisconfigurationException(f"{voice.who}: {error}") from error
        if not data.counts_batches:
            check_num_samples(data.num_samples, asked.settings.nbeta, voice.who)
        self._open_turns(trainer)
        begins = self._begins(trainer)
        if begins:
            self._forget()
        self._start_clock(trainer, earns=not smoke_test)
        if asked.restrict is None and not is_sharded(trainer):
            warn_of_untrained(trainer, pl_module, voice.who)
        last = self._turns.last
        self._turns.see(trainer)
        if begins:
            self._turns.began = self._turns.last
        self._course.go_on_from(self._reporting.open(trainer, self._turns.last, self._collective))
        self._reporting.start(self._config())
        if self._late is not None and not smoke_test:
            self._late.open(trainer, pl_module)
        self._reporting.show(trainer)  # a run that is resumed may be a while from its next firing
        turn = self._turns.before_training(trainer)
        if turn is not None and not self.estimates:
            self._consider(trainer, pl_module, turn)
        elif not begins:
            self._make_up_for(trainer, pl_module, self._turns.missed(trainer, last))

    def _open_turns(self, trainer: Trainer) -> None:
        called = self._voice.called(f"every_n_epochs={self._asked.schedule.every_n_epochs}")
        self._turns.open(trainer, self._collective, called)

    def _make_up_for(self, trainer: Trainer, pl_module: LightningModule, turn: Optional[Turn]) -> None:
        """Measure at the step of a checkpoint that was written between the end of its batch and the firing there."""
        if turn is None or self._has(turn.step):
            return
        self._turns.last = turn.step
        if self._followed.data.replays:
            warn(
                f"{self._voice.who}: the measurement at step {turn.step} is left out: the checkpoint was written "
                "before it, and the batches that training had seen, which chains replay, are not in it."
            )
            return
        self._consider(trainer, pl_module, turn)

    def _has(self, step: int) -> bool:
        """Whether a step has been measured, or sent to be."""
        return self._reporting.history.has(step) or (self._late is not None and self._late.has(step))

    def _start_clock(self, trainer: Trainer, earns: bool) -> None:
        others = [other._clock for other in trainer.callbacks if isinstance(other, SLTMonitor)]  # type: ignore[attr-defined]
        self._clock.start(earns, others)
        budget, settings = self._clock.budget, self._asked.settings
        if budget is not None and earns:
            share = math.ceil(settings.num_chains / self._collective.world_size)
            # of a firing beside training only the snapshot costs it time, whatever its size; about that of a batch
            budget.planned_steps = 1 if self.measures_later else share * chain_steps(settings)
            budget.least_size = 1.0 if self.measures_later else least_size(settings)

    def _config(self) -> dict[str, Any]:
        """The settings of the run, for the record and the loggers."""
        budget = self._clock.budget
        return {
            **self._asked.describe(),
            "max_overhead": budget.max_overhead if budget is not None else None,
            "num_samples": self._followed.num_samples,
            "localization": self._course.localization,
            "warm_start": self._course.warm_start,
            "samples": self._samples.describe(),
            "background": self._late.describe() if self._late is not None else None,
        }

    def _forget(self) -> None:
        """Another run has no history, whatever this object has measured before."""
        self._reporting.forget()
        self._course.forget(self._asked.settings.localization, self._asked.settings.method)
        self._clock.forget()
        self._voice.forget()
        self._turns.forget()
        if self._late is not None:
            self._late.forget()

    # --- while training -------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chains follow the data where ``reload_dataloaders_every_n_epochs`` has loaded it anew."""
        self._reporting.settle()
        if self._followed.follow_loaders(trainer) and self._late is not None:
            self._late.data_is_other()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._reporting.settle()
        self._turns.see(trainer)
        self._followed.see(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._late is not None:
            self._late.collect(trainer, pl_module)
        self._clock.saw_batch()
        turn = self._turns.after_batch(trainer)
        if turn is not None:
            every = trainer.log_every_n_steps  # type: ignore[attr-defined]
            logs_next = trainer.is_last_batch or (every > 0 and (turn.x + 1) % every == 0)
            # the module's own hook comes before Lightning's row, and may log a row at another x
            logs_next = logs_next and not is_overridden("on_train_batch_end", pl_module)
            self._consider(trainer, pl_module, turn, logs_next)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reporting.settle()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._late is not None:
            self._late.collect(trainer, pl_module)
        turn = self._turns.after_epoch(trainer)
        if turn is not None and not self._has(turn.step):
            self._consider(trainer, pl_module, turn, logs_next=True)

    def _consider(self, trainer: Trainer, pl_module: LightningModule, turn: Turn, logs_next: bool = False) -> None:
        """Fire where the budget covers it, or there is none, or the run is a smoke test.

        Args:
            logs_next: training logs at this x right after.
        """
        decision: Optional[Decision] = None
        budget = self._clock.budget
        if budget is not None and not is_smoke_test(trainer):
            decision = self._turns.decide(turn.step, self._collective)
            if decision is None:
                self._reporting.history.skipped += 1
                if budget.awaits_first and self._voice.first("first firing"):
                    say_when_first(self._voice, budget, turn.step, trainer)
                return
        self._fire(Moment(trainer, pl_module, turn.step, turn.x, self._collective, decision, logs_next))

    def _fire(self, moment: Moment) -> None:
        """Measure now, or have the weights of now measured; what is interrupted is still to be measured."""
        try:
            if self._late is not None and not moment.is_smoke_test:
                self._late.send(moment)
            else:
                self._attempts.fire(moment)
        except KeyboardInterrupt:
            step = moment.step
            if not self._has(step):
                self._turns.take_back(step)
                rank_zero_info(
                    f"{self._voice.who}: the measurement at step {step} was interrupted and is not recorded."
                )
            raise

    # --- after training -------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._late is not None:
            self._late.await_the_last(trainer, pl_module)
            self._late.close(finished=True)
        self._finish(trainer, "finished")
        if self.estimates or self._clock.measured_seconds > 0 or not self._turns.last:
            return
        budget = self._clock.budget
        if not self._reporting.history.skipped:
            warn_of_no_step(self._voice, self._asked.schedule, trainer, self._turns.last)
        elif budget is not None and math.isfinite(budget.predicted_seconds):
            warn_of_nothing(self._voice, budget)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning comes to no start and no end of training where a run that is resumed has nothing left to train."""
        if not self._given:
            return
        self._reporting.stay()
        self._open_turns(trainer)
        turn = self._turns.missed(trainer, self._turns.last)
        if turn is not None and not self._has(turn.step) and not self._reporting.has_recorded(turn.step):
            warn_of_left_out(self._voice, turn.step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._late is not None:
            self._late.close()  # what is out stays on disk, for a resume
        self._finish(trainer, "failed")

    def _finish(self, trainer: Trainer, status: str) -> None:
        self._clock.stop()
        self._reporting.finish(trainer, status)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._late is not None:
            self._late.close()
        self._followed.close()
        close_collective(self._collective)
        self._collective = Alone()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._reporting.history.state_dict(),
            "last_step": self._turns.last,
            "first_step": self._turns.began,
            **self._course.state_dict(),
            **self._clock.state_dict(),
            "folder": str(self.folder) if self.folder is not None else None,
            "prefix": self._voice.prefix,
            "pending": self._late.state_dict() if self._late is not None else [],
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING:
            states = checkpoint.get("callbacks", {})
            warn_of_other_curve(states, self, trainer, self._voice.who)
            warn_of_other_number(states.get(self.state_key) or {}, self._voice.prefix, self._voice.who)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._keeps(bool(self.estimates)) or not state_dict:
            return  # an empty state is of no run
        self._given = True
        self._reporting.history.load_state_dict(state_dict)
        self._turns.last, self._turns.began = int(state_dict["last_step"]), int(state_dict.get("first_step", 0))
        self._course.load_state_dict(state_dict)
        if self._asked.settings.localization is not None:
            self._course.localization = self._asked.settings.localization
        self._clock.load_state_dict(state_dict)
        folder = state_dict.get("folder")
        self._reporting.resumed_folder = Path(folder) if folder else None
        if self._late is not None:
            self._late.load_state_dict(state_dict.get("pending", []))
        else:
            steps = [int(notes["step"]) for notes in state_dict.get("pending", [])]
            warn_of_lost(steps, self._voice.who, "this monitor measures inside training (execution='inline')")

    def __getstate__(self) -> dict[str, Any]:
        """For strategies that spawn: what belongs to a running process stays behind, as its parts do."""
        return {**super().__getstate__(), "_collective": Alone(), "_trained_by": None}


__all__ = ["SLTMonitor"]
