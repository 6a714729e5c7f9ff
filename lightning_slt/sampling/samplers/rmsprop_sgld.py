"""SGLD with a diagonal preconditioner from the second moments of the gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Optional

from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.kinds import check_number, positive
from lightning_slt.sampling.samplers.base import MinibatchSampler, SamplerState, check_step_size


@dataclass(frozen=True)
class RMSpropSGLD(MinibatchSampler):
    r"""SGLD in a diagonal metric from squared gradients (Li et al. 2016, arXiv 1512.07666), frozen before it counts:

    .. math::
        w \leftarrow w - \tfrac{\epsilon}{2} P [ n\beta \nabla L_B(w) + \gamma (w - w^*) ]
            + \sqrt{\epsilon P}\, N(0, I),
        \qquad P = \frac{(1 + \kappa)\, s}{\sqrt{v} + \kappa s}, \quad s^2 = \mathrm{mean}(v)

    v is the mean of the squared minibatch gradient over all chains, taken in the rounds in which the step size is
    found, each round with the P of the one before; then P is frozen. Within every round it is constant, so that the
    chain samples the stated posterior and the term with the divergence of P, which Li et al. drop, is zero. It may
    start from the optimiser's own second moments: :class:`~lightning_slt.SLTMonitor` hands over those of Adam and its
    kind, of RMSprop and of Adadelta.

    P is scaled so that a weight with a typical gradient has P = 1: step sizes are comparable to those of
    :class:`~lightning_slt.SGLD`. Weights without any gradient have ``P = (1 + kappa) / kappa``.

    Args:
        lr: the step size epsilon; None has it calibrated.
        kappa: how far the metric may go, in units of the root mean square gradient: the smaller, the further.

    Raises:
        ValueError: for a step size or a kappa that is not positive and finite.

    Example:
        >>> import torch
        >>> p = RMSpropSGLD(kappa=0.25).preconditioner(torch.tensor([4.0, 4.0, 0.0]))
        >>> [round(x, 3) for x in p.tolist()]
        [0.848, 0.848, 5.0]
    """

    lr: Optional[float] = None
    kappa: float = 0.1

    preconditioned: ClassVar[bool] = True
    keeps_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_step_size(self.lr)
        check_number("kappa", self.kappa, False, positive, "must be positive; with 0.1 P goes up to 11.")

    def preconditioner(self, second_moment: Tensor, mean: Optional[float] = None) -> Tensor:
        """P of the class's equation.

        Args:
            second_moment: ``[d]``, v: mean squared gradient, of any scale; not all zero and finite, else P is 1.
            mean: of v, where ``second_moment`` is a part of it.
        """
        mean = float(second_moment.double().mean()) if mean is None else mean
        scale = math.sqrt(mean) if mean >= 0 else math.nan
        if not (math.isfinite(scale) and scale > 0):
            return second_moment.new_ones(second_moment.shape)
        return (1 + self.kappa) * scale / (second_moment.clamp(min=0).sqrt() + self.kappa * scale)

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
        """One step, in place; the equation is the class's, with P from ``state`` (1 where there is none)."""
        p = state.preconditioner if state is not None else None
        if p is None:
            p = anchor.new_ones(())
        weights.lerp_(anchor.expand_as(weights), (0.5 * lr * posterior.localization * p).expand_as(weights))
        weights.addcmul_(grad, p, value=-0.5 * lr * posterior.nbeta)
        weights.addcmul_(noise, p.sqrt(), value=math.sqrt(lr))
