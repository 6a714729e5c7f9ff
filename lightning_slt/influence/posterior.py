"""The posterior that influence is read in where nothing else is said, and the sampler for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.metric import Curvature, LowRankMetric
from lightning_slt.sampling.samplers import KineticLangevin

WIDTH = 0.35
"""Size of the region that influence is measured in, as a share of the weights' own norm."""
DAMPING = 2.5
"""Localisation in units of ``nbeta`` times the mean curvature of the loss."""
STEP = 0.7
"""Time step in the coordinates in which the posterior is round; 2 is unstable there, and where the loss bends more
sharply away from ``w*`` a smaller one may be."""


@dataclass(frozen=True, eq=False)
class InfluenceSampling:
    """Posterior and sampler for influence, from the curvature at ``w*``.

    The damped influence function ``g_i' (H + gamma / nbeta)^-1 g_q`` predicts retraining best at a damping of a few
    times the mean curvature; a posterior that is cooled until it stays near ``w*`` (``gamma = d / (0.35 |w*|)²``) reads
    it off without the curvature changing on the way. docs/influence.md has the figures.

    Attributes:
        posterior: ``gamma`` sets the width, ``nbeta = gamma / damping`` the temperature.
        sampler: kinetic Langevin in the metric of the curvature.
        curvature: at ``w*``.
    """

    posterior: LocalPosterior
    sampler: KineticLangevin
    curvature: Curvature

    @staticmethod
    def of(
        anchor: Tensor, curvature: Curvature, nbeta: Optional[float], localization: Optional[float], lr: float = STEP**2
    ) -> InfluenceSampling:
        """What is not given is chosen by the rule above."""
        square = max(float(anchor.double().square().sum()), 1e-12)
        mean = max(curvature.mean, 1e-3 * curvature.largest, 1e-12)
        if localization is None:
            localization = len(anchor) / (WIDTH**2 * square) if nbeta is None else DAMPING * mean * nbeta
        if nbeta is None:
            nbeta = localization / (DAMPING * mean)
        posterior = LocalPosterior(nbeta, localization)
        return InfluenceSampling.with_posterior(posterior, curvature, lr)

    @staticmethod
    def with_posterior(posterior: LocalPosterior, curvature: Curvature, lr: float) -> InfluenceSampling:
        """Of this posterior, in the metric in which the curvature makes it round."""
        metric = LowRankMetric.of(curvature, posterior)
        return InfluenceSampling(posterior, KineticLangevin(lr, metric=metric), curvature)
