"""The local learning coefficient as a torchmetrics.Metric."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_slt.functional.learning_coefficient import Summary, learning_coefficient, summarise
from lightning_slt.kinds import check_number, positive
from lightning_slt.measures.draws import joined


class LearningCoefficient(Metric):
    """``nbeta * (E_w[L_n(w)] - L_n(w*))`` from the losses of chains (Lau et al. 2023, arXiv 2308.12108).

    Feed it stretches of the chains in order of draws, every chain of this process at once; processes are merged by
    torchmetrics' own synchronisation, chain after chain.

    Args:
        nbeta: inverse temperature times n.

    ``compute()`` gives a dict of scalar tensors: ``mean``, ``se`` (Monte-Carlo standard error), ``rhat``, ``ess``,
    ``num_bad_chains`` and ``valid`` (0 or 1).

    Example:
        >>> metric = LearningCoefficient(nbeta=100.0)
        >>> anchor = torch.full((4, 200), 0.3)
        >>> noise = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
        >>> metric.update(anchor + 0.05 + 0.005 * noise, anchor)
        >>> round(metric.compute()["mean"].item(), 1)
        5.0
    """

    full_state_update = True
    higher_is_better: Optional[bool] = None
    is_differentiable = False
    trace: list[Tensor]

    def __init__(self, nbeta: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("nbeta", nbeta, False, positive, "must be positive; n / log n is usual.")
        self.nbeta = float(nbeta)
        # one tensor [num_chains, draws] in a list: draws are joined here, chains between processes by torchmetrics,
        # which gathers list states of unequal size
        self.add_state("trace", default=[], dist_reduce_fx="cat")

    def update(self, loss: Tensor, init_loss: Tensor) -> None:
        """Add draws.

        Args:
            loss: ``[num_chains, draws]`` losses along the chains.
            init_loss: the same shape, losses of the same minibatches at ``w*``.

        Raises:
            ValueError: where the shapes do not fit each other, or the draws before.
        """
        if loss.ndim != 2:
            raise ValueError(f"loss {tuple(loss.shape)}: expected [num_chains, draws].")
        new = learning_coefficient(loss, init_loss, self.nbeta).to(self.device)
        self.trace = joined("loss", self.trace, new)

    def draws(self) -> Tensor:
        """``[num_chains, num_draws]``, the integrand so far; of all processes inside ``compute``."""
        joined: Any = self.trace  # after a synchronisation torchmetrics leaves the joined tensor itself
        return dim_zero_cat(joined) if len(joined) else torch.empty(0, 0, dtype=torch.float64, device="cpu")

    def summary(self) -> Summary:
        """All of what the trace says, with the reasons where it is not valid."""
        return summarise(self.draws())

    def compute(self) -> dict[str, Tensor]:
        s = self.summary()
        values = {
            "mean": s.mean,
            "se": s.se,
            "rhat": s.rhat,
            "ess": s.ess,
            "num_bad_chains": float((~s.good).sum()),
            "valid": float(s.valid),
        }
        return {k: torch.tensor(v, dtype=torch.float64, device="cpu") for k, v in values.items()}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Running mean of each chain over its draws.

        Returns:
            ``(figure, axes)``, as torchmetrics does.
        """
        from matplotlib.figure import Figure

        trace = self.draws().cpu()
        figure = ax.get_figure() if ax is not None else Figure(figsize=(6, 3.5), layout="constrained")
        axes = ax if ax is not None else figure.add_subplot()
        count = torch.arange(1, trace.shape[1] + 1, device="cpu")
        axes.plot(count.numpy(), (trace.cumsum(dim=1) / count).T.numpy(), linewidth=1)
        axes.set(xlabel="draw", ylabel="LLC, running mean of each chain")
        return figure, axes
