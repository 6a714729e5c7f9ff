r"""Where SGLD stands beside the heat of its step: it leans to weights at which the loss is flatter.

To first order in the step eps, and for any potential U, the density of an SGLD chain has a factor
``exp(-(eps/8) (2 lap U - |grad U|²))`` that the posterior has not (the Euler-Maruyama scheme's expansion: Talay and
Tubaro 1990, *Stoch. Anal. Appl.* 8:483; for SGLD: Vollmer, Zygalakis and Teh 2016, arXiv 1501.00438). For
``f = n beta (L - L(w*))``, by parts, that is the heat of :mod:`~lightning_slt.sampling.step_size`, and one term more:

.. math:: E_\epsilon[f] - E[f] = \frac{\epsilon}{8} E[\nabla f \cdot \nabla U]
          - \frac{\epsilon}{8} \mathrm{Cov}(f, \Delta U)

The second is the lean. On a quadratic it is zero, since its curvature is the same everywhere. On a network whose
steepest directions are steeper where the loss is lower it is positive: chains keep away from there, and beyond 4 / eps
they cannot stay at all.

No Hessian is needed. Along steep directions a chain forgets within a few steps, so that over more the local mean of the
heat ``h = (eps/8) n beta g . G`` follows ``(eps/8) lap U``, and that of the loss is what it would be without heat, and
h on top. Covariances between readings that are some steps apart have what is slow alone, nothing of the fast motion and
of the minibatches' noise that the readings of one step share:

.. math:: \mathrm{lean} = \mathrm{Var}_{slow}(h) - \mathrm{Cov}_{slow}(f, h)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.readings import force_of
from lightning_slt.sampling.segment import STATS_EVERY, Segment

LAGS = range(2, 6)
"""Readings that are held against each other are so many readings apart: 8 to 20 steps. The covariance along a direction
of curvature A falls by ``(1 - eps A / 2)²`` a step: to 0.03 in 8 steps where a tenth of its variance is heat, and those
with less have little of the heat."""
LEAST_READINGS = 4 * LAGS[-1]
"""Of a chain: with fewer nothing slow can be seen."""
SURE = 3.0
"""Errors by which a lean must be below zero to count, of many chains: of 8 it is 4.2, of 4 it is 9."""
REMEMBERED = 0.007
"""Share of the LLC by which what is found is below zero on a quadratic at the most: the heat of directions that
remember those lags, ``(eps A / 4) (1 - eps A / 2)^(8 lag)`` of their part, the mean over the lags where it is most."""


def lean_of(segment: Segment, lr: float, posterior: LocalPosterior, keep: Tensor) -> float:
    """What the lean of the step adds to the LLC, in its units; 0 where it is not seen beyond its error.

    The estimate ``a`` is shrunk by its error ``b``, that of the mean over the chains, to ``a (1 - (b / a)²)``, and is 0
    below b: what is noise adds nothing worth mention (0.1 b in the mean). One below zero, where the loss is steeper
    where it is higher, must be so by :data:`SURE` errors, of chains apart from each other, and is an error alone:
    chains on their way up from ``w*`` have those too, and the posterior's tails, cut off by a step that is too large,
    look like them. Of a network with sine activations it was -0.9 ± 0.1, and the heat taken off 1.0 too much. It is 0
    as well where the steps are not as many as :data:`~lightning_slt.sampling.segment.STATS_EVERY` times the readings:
    draws whose number and distance were both given, or that may not be as far apart, and make no multiple of it.

    Args:
        segment: the draws.
        lr: their step.
        posterior: what they are draws of.
        keep: ``[chains]`` bool, which are pooled; with fewer than two the error is not known, and the lean is 0.
    """
    rows = keep.nonzero().flatten()
    heat = 0.125 * lr * posterior.nbeta * force_of(segment, posterior)[rows]
    count = heat.shape[1]
    # where pieces were no multiple of that many steps, readings and losses are not of the same moments
    if len(rows) < 2 or count < LEAST_READINGS or segment.steps != count * STATS_EVERY:
        return 0.0
    excess = posterior.nbeta * segment.difference[rows].reshape(len(rows), count, STATS_EVERY).mean(dim=2)
    found, error = _slow(heat - heat.mean(), excess - excess.mean())
    if found > error:
        return found - error**2 / found
    if len(rows) < 4:
        return 0.0
    # around the mean over the chains at each reading: what they have in common is their way up from w*
    below, error = _slow(heat - heat.mean(dim=0), excess - excess.mean(dim=0))
    below, error = (value * len(rows) / (len(rows) - 1) for value in (below, error))
    below += REMEMBERED * max(float(excess.mean()), 0.0)
    sure = SURE * error * (len(rows) - 1) / (len(rows) - 3)
    return below - error**2 / below if below < -sure else 0.0


def _slow(heat: Tensor, loss: Tensor) -> tuple[float, float]:
    """``Var(h) - Cov(f, h)`` of what is slow, the mean over the chains and its error; both centred."""
    each = torch.stack([_lagged(heat, heat - loss, lag) for lag in LAGS]).mean(dim=0)
    return float(each.mean()), float(each.std()) / math.sqrt(len(each))


def _lagged(a: Tensor, b: Tensor, lag: int) -> Tensor:
    """``[chains]``, covariances of readings so far apart, either one being the earlier; both centred."""
    return 0.5 * ((a[:, lag:] * b[:, :-lag]).mean(dim=1) + (b[:, lag:] * a[:, :-lag]).mean(dim=1))
