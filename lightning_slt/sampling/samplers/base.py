"""What a sampler is to the chains that it moves."""

from __future__ import annotations

from typing import Optional, Protocol, runtime_checkable

from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior


@runtime_checkable
class Sampler(Protocol):
    """One update rule, applied in place to one chain ``[d]`` or several ``[num_chains, d]``."""

    @property
    def lr(self) -> Optional[float]:
        """The step size; None where it is to be calibrated."""

    def update_(
        self, weights: Tensor, anchor: Tensor, grad: Tensor, noise: Tensor, lr: float, posterior: LocalPosterior
    ) -> None:
        """Move ``weights`` by one step. ``grad`` is that of the mean loss; ``noise`` is standard normal and may be
        overwritten."""
