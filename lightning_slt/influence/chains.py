"""The chains that the influence of a single call is read off, on a posterior of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Optional

import torch

from lightning_slt.estimate import ChainSettings, run_chains
from lightning_slt.influence.posterior import influence_sampling
from lightning_slt.influence.probes import ProbeSet
from lightning_slt.influence.reader import InfluenceReader
from lightning_slt.influence.wide import with_wide_means
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.sampling.anchor import weighs_together
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.coupled import ALONE
from lightning_slt.sampling.kinetic import STEP, Beginning, KineticSampling, MakeSampler, run_kinetic
from lightning_slt.sampling.metric import curvature_at
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.readings import diverged
from lightning_slt.sampling.samplers import KineticLangevin
from lightning_slt.sampling.sums import misfit_of_sum
from lightning_slt.verdict import fit_for_covariances


@dataclass(eq=False)
class InfluenceChains:
    """Chains whose posterior and sampler are those asked for, or else the ones that predict retraining best.

    Attributes:
        objective: the loss.
        train: the training samples, as minibatches.
        probes: the samples whose losses are read.
        settings: of the chains; ``nbeta`` and ``localization`` of the kinetic chains are its own two.
        shrinkage: of :func:`~lightning_slt.estimate_influence`, as the next three.
        nbeta: None for what follows from ``localization``.
        localization: None for what follows from ``nbeta``, or from the weights.
        control_variates: whether gradients of all samples are taken for them.
    """

    objective: Objective
    train: DatasetSource
    probes: ProbeSet
    settings: ChainSettings
    shrinkage: Optional[float]
    nbeta: Optional[float]
    localization: Optional[float]
    control_variates: bool
    _reader: Optional[InfluenceReader] = None
    _together: bool = False

    def measure(self) -> InfluenceEstimate:
        """Off the chains of the sampler that was asked for; of kinetic ones where none was."""
        return self._kinetic() if self.settings.sampler is None else self._of_sampler()

    def _of_sampler(self) -> InfluenceEstimate:
        drawn, chains = self._run(None, Beginning())
        good = ~diverged(drawn.segment, chains.posterior.nbeta, len(self.objective.anchor))
        reasons, notes = fit_for_covariances(drawn, chains)
        reasons += misfit_of_sum(self.objective, self.train, chains.posterior.nbeta)
        return self._read(drawn, chains, good).with_verdict(reasons, notes)

    def _kinetic(self) -> InfluenceEstimate:
        ran = run_kinetic(self.objective, self.train, self.settings.seed, self._propose, self._run)
        found = self._read(ran.drawn, ran.chains, ran.good)
        found = found.with_verdict(ran.reasons(), ran.cooled.notes(self.train.batch_size))
        if self.nbeta is not None or self.localization is not None:
            return found
        reader, method = self._make_reader(), ran.chains.method
        return with_wide_means(found, reader, ran.sampling, self.objective, self.train, self.settings, method)

    def _propose(self, chains: Chains, batches: list[int], stream: torch.Generator) -> KineticSampling:
        """The posterior, and the metric of its curvature, measured at ``w*``."""
        reader, anchor = self._make_reader(), self.objective.anchor
        single = reader.take_gradients() if self.control_variates else None
        curvature = curvature_at(anchor, lambda w: chains.gradients(w, batches), stream, single=single)
        sampling = influence_sampling(anchor, curvature, self.nbeta, self.localization)
        reader.control_with(sampling)
        return sampling

    def _run(self, make_sampler: Optional[MakeSampler], beginning: Beginning) -> tuple[Drawn, Chains]:
        settings = self.settings
        if make_sampler is not None:
            burnin = beginning.burnin(settings.num_burnin_steps or 0)
            settings = dataclasses.replace(settings, sampler=KineticLangevin(STEP**2), num_burnin_steps=burnin)
        if beginning.cold:
            self._reader = None
        return run_chains(
            self.objective,
            self.train,
            settings,
            make_reader=self._make_reader,
            read_every=settings.num_steps_bw_draws or 1,
            make_sampler=make_sampler,
            spread=not beginning.cold,
        )

    def _make_reader(self) -> InfluenceReader:
        if self._reader is None:
            self._reader = InfluenceReader(self.objective, self.probes, self.settings.seed)
            if self._reader.slow:
                self.objective.say("one by one", self._reader.slow)
            self._together = weighs_together(self.objective, self.train)
        return self._reader

    def _read(self, drawn: Drawn, chains: Chains, good: torch.Tensor) -> InfluenceEstimate:
        assert drawn.segment.read is not None
        reader, n = self._make_reader(), self.train.num_samples
        found = reader.read(drawn.segment.read, good, chains.posterior, n, self.shrinkage)
        return found.with_verdict((), (ALONE,) if self._together else ())
