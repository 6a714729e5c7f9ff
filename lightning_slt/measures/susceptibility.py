"""Susceptibility of a component as a torchmetrics.Metric."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_slt.functional.susceptibility import Response, susceptibility
from lightning_slt.kinds import check_number, positive
from lightning_slt.measures.draws import joined


class Susceptibility(Metric):
    """``-Cov_w(nbeta (L(w) - L(w*)), Delta L(w))`` from losses along the chains of one component.

    Baker et al. 2025, arXiv 2504.18274; in units of the loss. Feed it stretches of the chains in order of draws, every
    chain of this process at once; processes are merged by torchmetrics' own synchronisation, chain after chain.

    Args:
        nbeta: ``n * beta``.

    ``compute()`` gives a dict: ``chi`` and ``se`` ``[m]``, ``per_chain`` ``[num_chains, m]``.

    Raises:
        ValueError: where ``nbeta`` is not positive.

    Example:
        >>> import torch
        >>> metric = Susceptibility(nbeta=10.0)
        >>> loss = torch.rand(4, 500, generator=torch.Generator().manual_seed(0))
        >>> metric.update(loss, loss + 3.0 * loss.unsqueeze(2).mean(dim=2))
        >>> bool((metric.compute()["chi"] + 30.0 * loss.double().var(dim=1).mean()).abs() < 0.1)
        True
    """

    full_state_update = True
    higher_is_better: Optional[bool] = None
    is_differentiable = False
    loss_trace: list[Tensor]
    shift_trace: list[Tensor]

    def __init__(self, nbeta: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("nbeta", nbeta, False, positive, "must be positive; n / log n is usual.")
        self.nbeta = float(nbeta)
        self.add_state("loss_trace", default=[], dist_reduce_fx="cat")
        self.add_state("shift_trace", default=[], dist_reduce_fx="cat")

    def update(self, loss: Tensor, shifted_loss: Tensor) -> None:
        """Add draws.

        Args:
            loss: ``[num_chains, draws]``, mean loss on the original data; a constant such as that at ``w*`` drops out.
            shifted_loss: ``[num_chains, draws, m]`` or ``[num_chains, draws]``, those on m shifted data.

        Raises:
            ValueError: where the shapes do not fit each other, or the draws before.
        """
        shifted = shifted_loss.unsqueeze(2) if shifted_loss.ndim == 2 else shifted_loss
        if loss.ndim != 2 or shifted.ndim != 3 or shifted.shape[:2] != loss.shape:
            raise ValueError(
                f"loss {tuple(loss.shape)}, shifted_loss {tuple(shifted_loss.shape)}: expected [num_chains, draws] and "
                "[num_chains, draws, m]."
            )
        own = loss.detach().double().to(self.device)
        delta = shifted.detach().double().to(self.device) - own.unsqueeze(2)
        shifts = joined("shifted_loss", self.shift_trace, delta)
        self.loss_trace, self.shift_trace = joined("loss", self.loss_trace, own), shifts

    def response(self) -> Response:
        """All of what the draws say.

        Raises:
            ValueError: where there are fewer than two draws.
        """
        sides: list[Any] = [self.loss_trace, self.shift_trace]  # tensors themselves after a synchronisation
        if not len(sides[0]):
            raise ValueError("no draws: call update(loss, shifted_loss) first.")
        loss, shift = (dim_zero_cat(side).cpu() for side in sides)
        return susceptibility(self.nbeta * loss, shift)

    def compute(self) -> dict[str, Tensor]:
        found = self.response()
        return {"chi": found.chi, "se": found.se, "per_chain": found.per_chain}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Susceptibilities with bars of two standard errors.

        Returns:
            ``(figure, axes)``, as torchmetrics does.
        """
        from matplotlib.figure import Figure

        values = self.compute() if val is None else val
        figure = ax.get_figure() if ax is not None else Figure(figsize=(6, 3.5), layout="constrained")
        axes = ax if ax is not None else figure.add_subplot()
        chi = values["chi"].numpy()
        axes.errorbar(range(len(chi)), chi, yerr=2 * values["se"].numpy(), fmt="o")
        axes.set(xlabel="shift", ylabel="susceptibility (units of the loss)")
        return figure, axes
