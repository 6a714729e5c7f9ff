"""Stochastic gradient Langevin dynamics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Optional

from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.samplers.base import MinibatchSampler, SamplerState, check_step_size


@dataclass(frozen=True)
class SGLD(MinibatchSampler):
    r"""Stochastic gradient Langevin dynamics (Welling & Teh 2011), localised (Lau et al. 2023, arXiv 2308.12108):

    .. math::
        w \leftarrow w - \tfrac{\epsilon}{2} [ n\beta \nabla L_B(w) + \gamma (w - w^*) ] + \sqrt{\epsilon}\, N(0, I)

    Args:
        lr: the step size epsilon; None has it calibrated, see :mod:`lightning_slt.sampling.step_size`.

    Raises:
        ValueError: for a step size that is not positive and finite.

    Example:
        >>> import torch
        >>> from lightning_slt.functional import LocalPosterior
        >>> w, zero = torch.tensor([1.0]), torch.zeros(1)
        >>> SGLD().update_(w, zero, torch.tensor([0.5]), zero.clone(), lr=0.1, posterior=LocalPosterior(10.0, 2.0))
        >>> round(w.item(), 6)  # 1 - 0.05 * (10 * 0.5 + 2 * 1)
        0.65
    """

    lr: Optional[float] = None

    keeps_noise: ClassVar[bool] = True
    _noise_share: ClassVar[float] = 1.0

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
        """One step, in place; the equation is the class's. ``weights``: ``[d]`` or ``[num_chains, d]``."""
        weights.lerp_(anchor, 0.5 * lr * posterior.localization)
        weights.add_(grad, alpha=-0.5 * lr * posterior.nbeta)
        weights.add_(noise, alpha=self._noise_share * math.sqrt(lr))
