"""The posterior that influence is read in where nothing else is said, and the sampler for it."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.kinetic import KineticSampling
from lightning_slt.sampling.metric import Curvature

WIDTH = 0.35
"""Size of the region that influence is measured in, as a share of the weights' own norm."""
LEAST_SCALE = 1e-2
"""Root mean square of weights below which they have no scale of their own (a layer that begins at zero): in a region
of a share of that, losses would differ by less than their last digits."""
DAMPING = 2.5
"""Localisation in units of ``nbeta`` times the mean curvature of the loss."""


def influence_sampling(
    anchor: Tensor, curvature: Curvature, nbeta: Optional[float], localization: Optional[float]
) -> KineticSampling:
    """Posterior and sampler for influence, from the curvature at ``w*``.

    The damped influence function ``g_i' (H + gamma / nbeta)^-1 g_q`` predicts retraining best at a damping of a few
    times the mean curvature; a posterior that is cooled until it stays near ``w*`` (``gamma = d / (0.35 |w*|)²``) reads
    it off without the curvature changing on the way. docs/influence.md has the figures.

    Args:
        anchor: ``[d]``, ``w*``.
        curvature: there.
        nbeta: the temperature; None for ``gamma / damping``.
        localization: ``gamma``, which sets the width; None for the rule above.
    """
    square = max(float(anchor.double().square().sum()), len(anchor) * LEAST_SCALE**2)
    mean = max(curvature.mean, 1e-3 * curvature.largest, 1e-12)
    if localization is None:
        localization = len(anchor) / (WIDTH**2 * square) if nbeta is None else DAMPING * mean * nbeta
    if nbeta is None:
        nbeta = localization / (DAMPING * mean)
    return KineticSampling.of(LocalPosterior(nbeta, localization), curvature)
