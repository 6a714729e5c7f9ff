"""Firings inside training from end to end: how large they are, what waits meanwhile, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from lightning_slt.callbacks.asked import Asked
from lightning_slt.callbacks.clock import RunClock
from lightning_slt.callbacks.component_firings import ComponentFirings
from lightning_slt.callbacks.distribution import RankFailedError, is_sharded
from lightning_slt.callbacks.inside_firings import InsideFirings
from lightning_slt.callbacks.moment import Moment
from lightning_slt.callbacks.progress import FiringProgress
from lightning_slt.callbacks.remarks import say_what_is_due, warn_if_large
from lightning_slt.callbacks.reporting import Reporting
from lightning_slt.callbacks.said import Voice
from lightning_slt.callbacks.signals import BrokenOffError, SignalsHeld
from lightning_slt.callbacks.sizing import size_of, sized
from lightning_slt.callbacks.susceptibilities import warn_of
from lightning_slt.callbacks.turns import Turns
from lightning_slt.estimate import ChainSettings
from lightning_slt.sampling.collective import RankLostError
from lightning_slt.sampling.rng import preserve_rng


class Attempts:
    """Fires where training waits, and publishes what was measured; a failure follows ``on_failure``.

    Args:
        asked, voice, clock, turns: of the monitor.
        inside: measures the learning coefficient, and influence.
        components: measures components after it.
        reporting: where estimates go.
    """

    def __init__(
        self,
        asked: Asked,
        voice: Voice,
        clock: RunClock,
        turns: Turns,
        inside: InsideFirings,
        components: ComponentFirings,
        reporting: Reporting,
    ) -> None:
        self._asked, self._voice, self._clock, self._turns = asked, voice, clock, turns
        self._inside, self._components, self._reporting = inside, components, reporting

    def fire(self, moment: Moment) -> None:
        """Measure now, on all ranks.

        Raises:
            KeyboardInterrupt: where one came meanwhile.
            Exception: of the measurement, where failures raise, in a smoke test, and where a rank is gone.
        """
        # chains over shards run to their end on all ranks, which Ctrl-C need not wait for
        with SignalsHeld(1 if is_sharded(moment.trainer) else moment.collective.world_size) as held:
            self._fire(moment, held)

    def _fire(self, moment: Moment, held: SignalsHeld) -> None:
        asked, clock, decision = self._asked, self._clock, moment.decision
        begin = clock.now()
        settings = asked.settings if decision is None else sized(asked.settings, decision.size)
        raises = asked.raises or moment.is_smoke_test
        # ranks with shards can only leave off together, and where failures raise a signal must not be one
        check = None if is_sharded(moment.trainer) else held.check_interrupt if raises else held.check
        try:
            label = f"{self._voice.prefix} at step {moment.step}"
            with preserve_rng(), FiringProgress(moment.trainer, label, check) as progress:
                estimate, influence = self._inside.measure(moment, settings, progress)
        except Exception as error:
            if held.interrupted:
                return  # a KeyboardInterrupt comes now, whatever this is
            if raises or isinstance(error, RankLostError):
                self._turns.take_back(moment.step)
                raise
            signalled = _signalled(error, held)
            if signalled:
                self._turns.take_back(moment.step)
            self._voice.failed(moment.step, f"{type(error).__name__}: {error}", goes_on=not signalled)
            clock.took(begin, failed=True)
            return
        size = size_of(settings, asked.settings)
        history = self._reporting.history
        estimate = estimate.replace(**moment.notes(history.skipped), seconds=clock.now() - begin)
        if decision is not None:
            estimate = estimate.replace(firing_size=size)
            history.skipped = 0
        with self._reporting.one_row(joins=moment.x if moment.logs_next else None):
            self._reporting.take_up(moment.trainer, moment.module, estimate, influence, begin)
            if asked.measures.susceptibility:
                self._measure_components(moment, settings, raises, check, held)
                if held.interrupted:
                    return
        # drawing and logging count as overhead too, from the next firing's figure on
        clock.took(begin, size)
        if clock.budget is None and not moment.is_smoke_test:
            self._say_what_it_takes(moment.step, clock.now() - begin)

    def _say_what_it_takes(self, step: int, seconds: float) -> None:
        """Of a cadence that no budget holds: how long its firings are, and what share of the run they come to.

        Args:
            step: measured just now.
            seconds: that this took, drawing and logging with it.
        """
        estimates, ahead, at_end = self._reporting.history.estimates, self._turns.ahead(step), None
        if ahead is not None:
            if len(estimates) == 1:
                say_what_is_due(self._voice, seconds, ahead)
            at_end = self._clock.overhead_at_end(ahead.done, ahead.firings, seconds) if ahead.done > 0 else None
        warn_if_large(self._voice, estimates, at_end)

    def _measure_components(
        self,
        moment: Moment,
        settings: ChainSettings,
        raises: bool,
        check: Optional[Callable[[], None]],
        held: SignalsHeld,
    ) -> None:
        """Susceptibility after the learning coefficient, which stands whatever becomes of it.

        Args:
            raises: a failure ends the run.
            check: what ends the chains where a signal waits; None where they run to their end.
            held: the signals that wait.
        """
        label = f"{self._voice.prefix} at step {moment.step}, susceptibility"
        before = self._reporting.history.susceptibilities
        try:
            with FiringProgress(moment.trainer, label, check) as progress:
                found = self._components.measure(moment, settings, before, progress)
        except Exception as error:
            if held.interrupted:
                return  # a KeyboardInterrupt comes now, whatever this is
            if raises or isinstance(error, RankLostError):
                raise
            warn_of(error, moment.step, self._voice.who, goes_on=not _signalled(error, held))
            return
        self._reporting.take_up_susceptibility(moment.trainer, found)


def _signalled(error: Exception, held: SignalsHeld) -> bool:
    """Whether chains were broken off for a signal, on this rank or on another one, and so on all of them."""
    return held.waits or (isinstance(error, RankFailedError) and BrokenOffError.__name__ in error.kinds)


__all__ = ["Attempts"]
