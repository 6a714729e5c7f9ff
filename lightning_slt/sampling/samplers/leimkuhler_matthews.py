"""Langevin dynamics whose noise is the mean of two steps' draws: the posterior to second order of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_slt.sampling.samplers.sgld import SGLD


@dataclass(frozen=True)
class LeimkuhlerMatthews(SGLD):
    r"""SGLD with the noise of Leimkuhler & Matthews 2013 (Applied Mathematics Research eXpress 2013:34; the limit of
    large friction of their BAOAB), of the local posterior of Lau et al. 2023 (arXiv 2308.12108):

    .. math::
        w_{t+1} = w_t - \tfrac{\epsilon}{2} [ n\beta \nabla L_B(w_t) + \gamma (w_t - w^*) ]
            + \sqrt{\epsilon}\, \tfrac{1}{2} (R_t + R_{t-1}), \qquad R \sim N(0, I)

    One gradient a step, as SGLD. The noise of one step is shared with the next, and with it the error of the density
    that is sampled goes from first to second order in epsilon; on a quadratic the variance is exact at every stable
    step. SGLD heats along steep directions, and it leans to where the loss is flat: its density has a factor
    ``exp(-eps/8 (2 lap U - |grad U|²))``. Both are measured and taken off. Here neither is there at
    first order; what SGLD would have of the lean is an error, since these chains cannot stay beyond a curvature of
    4 / eps either. Minibatches heat the one as the other.

    Args:
        lr: the step size epsilon; None has it calibrated, see :mod:`lightning_slt.sampling.step_size`.

    Raises:
        ValueError: for a step size that is not positive and finite.

    Example:
        >>> import torch
        >>> w, ones = torch.tensor([1.0]), torch.ones(1)
        >>> LeimkuhlerMatthews().share_(w, ones, lr=0.04)
        >>> round(w.item(), 6)  # 1 + 0.5 * sqrt(0.04)
        1.1
    """

    keeps_noise: ClassVar[bool] = True
    shares_noise: ClassVar[bool] = True
    _noise_share: ClassVar[float] = 0.5
    """Of a draw in the step that makes it; the rest comes with the next one."""

    def share_(self, weights: Tensor, last_noise: Tensor, lr: float) -> None:
        """The half of the draw of the step before that belongs to this one, in place."""
        weights.add_(last_noise, alpha=self._noise_share * math.sqrt(lr))
