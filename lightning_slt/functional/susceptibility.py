r"""Susceptibility: how the learning coefficient of a component answers to a shift of the data.

Let the component's weights move under its local posterior, all others held at ``w*``. With the loss difference
``Delta L = L_q' - L_q`` between a shifted and the original data distribution, and the component's LLC integrand
``phi(w) = nbeta (L_q(w) - L_q(w*))``, the susceptibility (Baker et al. 2025, arXiv 2504.18274) is

.. math:: \chi = -\mathrm{Cov}_w(\phi(w), \Delta L(w)),

in units of the loss. It is ``1 / nbeta`` times the derivative of ``E[phi]`` by the share ``eps`` of the shift, where
the loss that is sampled is ``L_q + eps Delta L`` (fluctuation-dissipation). That paper's observable has no factor
``nbeta``: its susceptibility is this one over ``nbeta``.

The covariance is taken within chains and averaged: what lies between the means of chains is no response.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slt.functional.between_chains import between_share, factor_of
from lightning_slt.functional.convergence import standard_error


@dataclass(frozen=True, eq=False)
class Response:
    """Susceptibility to m shifts.

    Attributes:
        chi: ``[m]`` float64, in units of the loss.
        se: ``[m]``, Monte-Carlo standard errors, each as :func:`~lightning_slt.functional.standard_error` has it.
        per_chain: ``[num_chains, m]``.
        share: of the integrand's variance that lies between the chains' means; NaN with one chain.
    """

    chi: Tensor
    se: Tensor
    per_chain: Tensor
    share: float


def susceptibility(integrand: Tensor, shift: Tensor) -> Response:
    """``-Cov(phi, Delta L)`` within chains, with its error.

    Args:
        integrand: ``[num_chains, num_draws]``, ``nbeta (L(w) - L(w*))`` along the chains.
        shift: ``[num_chains, num_draws, m]``, ``Delta L`` of m shifts at the same draws, up to a constant each.

    Raises:
        ValueError: where the shapes do not fit, or there are fewer than two draws.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> phi = torch.randn(4, 1000, generator=g)
        >>> found = susceptibility(phi, torch.stack([phi, -2 * phi], dim=2))
        >>> found.chi.round(decimals=1).tolist()
        [-1.0, 2.0]
    """
    if integrand.ndim != 2 or shift.ndim != 3 or shift.shape[:2] != integrand.shape or integrand.shape[1] < 2:
        raise ValueError(
            f"integrand {tuple(integrand.shape)}, shift {tuple(shift.shape)}: expected [num_chains, num_draws] and "
            "[num_chains, num_draws, m] of the same chains and draws, at least two of them."
        )
    phi, delta = integrand.double(), shift.double()
    draws = phi.shape[1]
    share = between_share(phi.unsqueeze(2))
    # a chain's own mean takes a part of the covariance with it, the more the longer the chain's memory
    whole = factor_of(share, draws)
    above = (phi - phi.mean(dim=1, keepdim=True)).unsqueeze(2)
    products = -whole * draws / (draws - 1) * above * (delta - delta.mean(dim=1, keepdim=True))
    per_chain = products.mean(dim=1)
    se = torch.tensor(
        [standard_error(products[:, :, j]) for j in range(delta.shape[2])], dtype=torch.float64, device="cpu"
    )
    return Response(per_chain.mean(dim=0), se, per_chain, share)


def error_of_parts(parts: Tensor, others: Tensor) -> Tensor:
    """``[m]``, how far the covariance of a mean over parts with m others may be off by which samples are in the parts.

    Args:
        parts: ``[num_chains, num_draws, k]``, mean losses of k random parts of the samples.
        others: ``[num_chains, num_draws, m]``, at the same draws.

    Example:
        >>> error_of_parts(torch.tensor([[[0.0, 0.0], [1.0, 3.0]]]), torch.tensor([[[0.0], [2.0]]])).tolist()
        [1.0]
    """
    chains, draws, k = parts.shape
    above, delta = (x.double() - x.double().mean(dim=1, keepdim=True) for x in (parts, others))
    each = torch.einsum("ctk,ctm->km", above, delta) / (chains * (draws - 1))
    return each.std(dim=0) / k**0.5
