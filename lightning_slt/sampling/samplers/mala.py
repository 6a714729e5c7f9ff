"""The Metropolis-adjusted Langevin algorithm: exact up to its Monte-Carlo error, at a full batch a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Optional

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.samplers.base import Calibration, MinibatchSampler, SamplerState, check_step_size


@dataclass(frozen=True)
class MALA(MinibatchSampler):
    r"""Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996) on the whole data set:

    .. math::
        w' = w - \tfrac{\epsilon}{2} G(w) + \sqrt{\epsilon}\, N(0, I), \qquad
        U = n\beta L_n + \tfrac{\gamma}{2} |w - w^*|^2, \quad G = \nabla U

    accepted with probability ``min(1, exp(U(w) - U(w') + (w' - w).(G + G')/2 + eps/8 (|G|² - |G'|²)))``, else w is kept
    and counts once more. The posterior is met exactly whatever the step: no heat, and nothing to correct. Every step
    costs the loss and gradient of all the data, so this is for small problems, and for checking the others.

    Args:
        lr: the step size epsilon; None has it calibrated to an acceptance of 0.57 (the optimum for many dimensions:
            Roberts & Rosenthal 1998).

    Raises:
        ValueError: for a step size that is not positive and finite.
    """

    lr: Optional[float] = None

    calibration: ClassVar[Calibration] = "acceptance"
    elementwise: ClassVar[bool] = False
    full_batch: ClassVar[bool] = True
    per_chain: ClassVar[tuple[str, ...]] = (
        "potential",
        "accepted_loss",
        "started",
        "proposed_with",
        "proposed",
        "accepted",
    )
    per_weight: ClassVar[tuple[str, ...]] = ("accepted_weights", "accepted_grad")

    def __post_init__(self) -> None:
        check_step_size(self.lr)

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
        """Decide on the weights, which are a proposal, and put the next proposal in their place.

        ``state.loss`` becomes the loss of the accepted weights, which are ``state.tensors["accepted_weights"]``, their
        gradient of the mean loss ``"accepted_grad"``.

        Raises:
            ValueError: without a state with losses and uniform numbers.
        """
        if state is None or state.loss is None or state.uniform is None:
            raise ValueError("state: MALA needs the losses at the weights and a uniform random number a chain.")
        tensors = state.tensors
        old, old_grad = tensors["accepted_weights"], tensors["accepted_grad"]
        u = (weights - anchor).double()
        potential = posterior.nbeta * state.loss.double() + 0.5 * posterior.localization * u.square().sum(-1)
        force = posterior.nbeta * grad.double() + posterior.localization * u
        old_force = posterior.nbeta * old_grad.double() + posterior.localization * (old - anchor).double()
        move, step = (weights - old).double(), tensors["proposed_with"]
        log_ratio = (
            tensors["potential"]
            - potential
            + 0.5 * (move * (force + old_force)).sum(-1)
            + step / 8 * (old_force.square().sum(-1) - force.square().sum(-1))
        )
        first = tensors["started"] == 0
        take = (state.uniform.double().log() < torch.nan_to_num(log_ratio, nan=-math.inf)) | first
        tensors["proposed"] += (~first).double()
        tensors["accepted"] += (take & ~first).double()
        tensors["started"].fill_(1.0)
        step.fill_(lr)
        chosen = take.unsqueeze(-1)
        old.copy_(torch.where(chosen, weights, old))
        old_grad.copy_(torch.where(chosen, grad, old_grad))
        tensors["potential"].copy_(torch.where(take, potential, tensors["potential"]))
        tensors["accepted_loss"].copy_(torch.where(take, state.loss.double(), tensors["accepted_loss"]))
        state.loss = tensors["accepted_loss"].to(state.loss.dtype)
        weights.copy_(old)
        weights.lerp_(anchor.expand_as(weights), 0.5 * lr * posterior.localization)
        weights.add_(old_grad, alpha=-0.5 * lr * posterior.nbeta)
        weights.add_(noise, alpha=math.sqrt(lr))
