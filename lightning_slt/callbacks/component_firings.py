"""Measures of components, on chains of their own, after a firing of the learning coefficient."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lightning_slt.callbacks.asked import Asked
from lightning_slt.callbacks.clock import RunClock
from lightning_slt.callbacks.data.following import FollowedData
from lightning_slt.callbacks.data.samples import ProbedSamples
from lightning_slt.callbacks.data.structure import explained
from lightning_slt.callbacks.inside_firings import InsideFirings, share_buffers
from lightning_slt.callbacks.moment import Moment
from lightning_slt.callbacks.progress import FiringProgress
from lightning_slt.callbacks.said import Voice
from lightning_slt.callbacks.susceptibilities import measure_beside
from lightning_slt.estimate import ChainSettings
from lightning_slt.firing import Course
from lightning_slt.influence import ProbeSet
from lightning_slt.sampling.collective import RankLostError
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.shadow import CopyError, shadow_copy
from lightning_slt.susceptibility_record import SusceptibilityEstimate


class ComponentFirings:
    """Asks components, each with its own weights moving.

    Args:
        asked, voice, samples, course, followed: as of :class:`~lightning_slt.callbacks.inside_firings.InsideFirings`.
        inside: whose loss and data are those of the learning coefficient.
    """

    def __init__(
        self,
        asked: Asked,
        voice: Voice,
        samples: ProbedSamples,
        course: Course,
        followed: FollowedData,
        inside: InsideFirings,
    ) -> None:
        self._asked, self._voice, self._samples = asked, voice, samples
        self._course, self._followed, self._inside = course, followed, inside

    def measure(
        self,
        moment: Moment,
        settings: ChainSettings,
        before: Sequence[SusceptibilityEstimate],
        progress: FiringProgress,
    ) -> SusceptibilityEstimate:
        """Susceptibility after the learning coefficient of the same moment.

        Args:
            settings: what is asked of the chains of this firing.
            before: the estimates of this run so far.
            progress: told about chain-steps done; what it raises ends the chains.
        """
        begin, followed = RunClock.now(), self._followed
        source = followed.source
        assert source is not None, "the learning coefficient comes first"
        transfer = followed.transfer(moment.trainer)
        probes: list[ProbeSet] = []

        def read() -> None:
            self._asked.measures.check_weights(moment.module)  # what has been frozen since is named
            try:
                followed.hooks_of = shadow_copy(moment.module)
            except CopyError:
                followed.hooks_of = moment.module  # its chains call it in place as well
            probes.append(self._samples.read(moment.trainer, source, transfer, self._voice.prefix))

        try:
            with preserve_rng():
                moment.collective.exchange(read)
                found = measure_beside(
                    self._asked.measures,
                    self._asked.restrict,
                    lambda restrict: self._inside.objective_of(moment, restrict),
                    source,
                    transfer,
                    probes[0],
                    dataclasses.replace(settings, method=self._course.method),
                    moment.collective,
                    lambda objective: share_buffers(objective, moment.collective),
                    before,
                    progress,
                )
        except RankLostError:
            raise
        except Exception as error:
            named = explained(error, probes[0] if probes else None, source)
            if named is error:
                raise
            raise named from error
        finally:
            followed.hooks_of = None
        return found.replace(
            step=moment.step, x=moment.x, epoch=moment.epoch, monitor=self._voice.prefix, seconds=RunClock.now() - begin
        )


__all__ = ["ComponentFirings"]
