"""The stochastic gradient Nosé-Hoover thermostat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Optional

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.kinds import check_number
from lightning_slt.sampling.samplers.base import Calibration, Heating, MinibatchSampler, SamplerState, check_step_size


@dataclass(frozen=True)
class SGNHT(MinibatchSampler):
    r"""Stochastic gradient Nosé-Hoover thermostat (Ding et al. 2014, NeurIPS, algorithm 2), of the local posterior:

    .. math::
        p &\leftarrow (1 - \xi) p - \sqrt{(1 - \xi) \epsilon}\, [ n\beta \nabla L_B(w) + \gamma (w - w^*) ]
            + \sqrt{2 a}\, N(0, I) \\
        w &\leftarrow w + \sqrt{\epsilon}\, p \\
        \xi &\leftarrow \xi + \epsilon\, ( |p|^2 / d - 1 )

    The momentum p starts from N(0, I) and the thermostat xi (one number a chain) from a. It takes the minibatches'
    heat off as far as that is the same in all directions; where most directions are free, those that matter may stay
    warmer than the mean. epsilon is the square of the time step; Ding et al. write ``eta = epsilon`` and
    ``u = sqrt(epsilon) p``; the factor ``sqrt(1 - xi)`` of the force, half of the friction before it and half after, is
    not theirs: without it the positions' variance comes out too small by the share a / 2.

    What that leaves is measured, and taken off the LLC: with t the mean of the heat that friction a alone would leave,
    the thermostat's friction is a (1 + t), and a loss with heat H at a is at ``(LLC + H) / (1 + t)``.

    Args:
        lr: the squared time step epsilon; None takes a tenth of the inverse of the largest posterior precision (4 is
            unstable), at which the variance along the steepest direction is 2.6 % too large.
        diffusion_factor: a, the noise injected in a step, which is also the friction to begin with.

    Raises:
        ValueError: for a step size or a diffusion factor that is not positive and finite.
    """

    lr: Optional[float] = None
    diffusion_factor: float = 0.01

    calibration: ClassVar[Calibration] = "curvature"
    elementwise: ClassVar[bool] = False
    per_chain: ClassVar[tuple[str, ...]] = ("thermostat", "started")
    per_weight: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        check_step_size(self.lr)
        remedy = "must be between 0 and 1; 0.01 is usual."
        check_number("diffusion_factor", self.diffusion_factor, False, lambda a: 0 < a < 1, remedy)

    def heating(self, lr: float) -> Heating:
        """A kick ``sqrt(eps) nbeta xi`` in every step, held by the friction a alone, warms as SGLD at ``2 eps / a``."""
        return Heating(2.0 * lr / self.diffusion_factor, noise_alone=True, thermostat=True)

    def energy_memory(self, lr: float) -> float:
        """``1 / a``."""
        return 1.0 / self.diffusion_factor

    def update_(
        self,
        weights: Tensor,
        anchor: Tensor,
        grad: Tensor,
        noise: Tensor,
        lr: float,
        posterior: LocalPosterior,
        state: Optional[SamplerState] = None,
    ) -> None:
        """One step, in place; the equations are the class's.

        Raises:
            ValueError: without a state: it has momenta.
        """
        if state is None:
            raise ValueError("state=None: SGNHT has momenta, which need a state (see empty_state).")
        p, xi, started = (state.tensors[name] for name in ("momentum", "thermostat", "started"))
        fresh = started == 0
        if bool(fresh.any()):
            # the noise of a chain's first step is its momentum
            p[fresh] = noise[fresh]
            noise[fresh] = 0.0
            xi[fresh] = self.diffusion_factor
            started.fill_(1.0)
        root = math.sqrt(lr)
        p.mul_((1.0 - xi).to(p.dtype).unsqueeze(-1))
        pull = (root * (1.0 - xi).clamp(min=0.0).sqrt()).to(p.dtype).unsqueeze(-1)
        p.addcmul_(grad, pull.expand_as(grad), value=-posterior.nbeta)
        if posterior.localization:
            p.addcmul_(weights - anchor, pull.expand_as(p), value=-posterior.localization)
        p.add_(noise, alpha=math.sqrt(2.0 * self.diffusion_factor))
        weights.add_(p, alpha=root)
        xi.add_(lr * (torch.linalg.vecdot(p, p).double() / p.shape[-1] - 1.0))
