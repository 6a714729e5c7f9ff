r"""Control variates for covariances of losses: what they are to first order, whose covariance is known.

With ``delta = w - w*``, the slope ``s = nbeta grad L(w) + gamma delta`` of minus the log of the posterior, and a
symmetric M, Stein's identity ``E[delta s'] = I`` gives for the gradients g of any two losses at ``w*``

    E[(g_i . delta) (g_q . M s)] = g_i' M g_q,

exactly, whatever the posterior. M is the square of the metric that the chains move in: near the posterior's covariance,
so that ``M s`` is near ``delta``. A minibatch's gradient serves as well as that of all the data, since its noise is
independent of where the chain is. What is done with it: :mod:`lightning_slt.functional.influence`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.metric import LowRankMetric

ROWS = 1024
"""Samples at once in float64."""


class SteinControl:
    """The linear parts of losses along chains, and the covariances that are known of them.

    Args:
        gradients: ``[n, d]`` of the losses at ``w*``.
        anchor: ``[d]``, ``w*``.
        posterior: that the chains sample.
        metric: P; M is its square.
    """

    def __init__(self, gradients: Tensor, anchor: Tensor, posterior: LocalPosterior, metric: LowRankMetric) -> None:
        self._gradients = gradients
        self._anchor, self._posterior, self._metric = anchor, posterior, metric

    def __call__(self, weights: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """``g . delta`` and ``g . M s``, both ``[chains, n]``.

        Args:
            weights: ``[chains, d]``.
            slopes: ``[chains, d]``, gradients of the mean loss there.
        """
        delta = weights - self._anchor
        force = self._posterior.nbeta * slopes + self._posterior.localization * delta
        both = torch.cat([delta, self._metric(self._metric(force))]) @ self._gradients.T
        direct, pulled = both.split(len(weights))
        return direct, pulled

    def expected(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``g' M g``, ``[rows, columns]`` float64 on the CPU, of the samples of these numbers."""
        left, right = self._moved(rows), self._moved(columns)
        parts = [(some.double() @ right.double().T).cpu() for some in left.split(ROWS)]
        return torch.cat(parts)

    def diagonal(self, of: Tensor) -> Tensor:
        """``g' M g``, ``[n]`` float64 on the CPU, of these samples with themselves."""
        return torch.cat([some.double().square().sum(dim=1).cpu() for some in self._moved(of).split(ROWS)])

    def _moved(self, of: Tensor) -> Tensor:
        return self._metric(self._gradients[of.to(self._gradients.device)])
