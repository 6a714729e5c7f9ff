"""Influence of samples on each other as a torchmetrics.Metric."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_slt.functional.between_chains import between_share, factor_of
from lightning_slt.functional.block_errors import mean_and_error
from lightning_slt.functional.influence import correlation, covariance, shrink, variance
from lightning_slt.measures.draws import joined


class Influence(Metric):
    """``Cov_w(l_i(w), l_q(w))`` from the losses of samples along chains (Kreer et al. 2025, arXiv 2509.26544, negated).

    Feed it stretches of the chains in order of draws, every chain of this process at once; processes are merged by
    torchmetrics' own synchronisation, chain after chain. Losses are kept as float32 differences to those at ``w*``
    (67 MB for 8 chains x 200 draws of 10,500 samples); covariances are summed in float64. They are those within chains,
    times what a chain's own mean takes off them (:func:`~lightning_slt.functional.between_chains.factor_of`), as in an
    :class:`~lightning_slt.influence_record.InfluenceEstimate`.

    Args:
        shrinkage: see :func:`~lightning_slt.functional.influence.shrink`; 1 is the plain covariance.

    ``compute()`` gives a dict: ``matrix``, ``correlation`` and ``se`` ``[n_query, n_train]``, ``self_influence`` and
    ``mean_loss`` ``[n_train]``.

    Example:
        >>> metric = Influence()
        >>> g = torch.Generator().manual_seed(0)
        >>> shared = torch.randn(4, 500, 1, generator=g)
        >>> train = 1.0 + shared * torch.tensor([1.0, -0.5])
        >>> metric.update(train, shared, init_train=torch.ones(2), init_query=torch.zeros(1))
        >>> metric.compute()["matrix"].round(decimals=1).tolist()
        [[1.0, -0.5]]
    """

    full_state_update = True
    higher_is_better: Optional[bool] = None
    is_differentiable = False
    train_trace: list[Tensor]
    query_trace: list[Tensor]
    init_train: Tensor
    init_query: Tensor

    def __init__(self, shrinkage: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shrink(torch.zeros((), device="cpu"), torch.zeros((), device="cpu"), shrinkage)
        self.shrinkage = float(shrinkage)
        self.add_state("train_trace", default=[], dist_reduce_fx="cat")
        self.add_state("query_trace", default=[], dist_reduce_fx="cat")
        self.add_state("init_train", default=torch.empty(0, device="cpu"), dist_reduce_fx=None)
        self.add_state("init_query", default=torch.empty(0, device="cpu"), dist_reduce_fx=None)

    def update(
        self,
        train_losses: Tensor,
        query_losses: Optional[Tensor] = None,
        init_train: Optional[Tensor] = None,
        init_query: Optional[Tensor] = None,
    ) -> None:
        """Add draws.

        Args:
            train_losses: ``[num_chains, draws, n_train]``.
            query_losses: ``[num_chains, draws, n_query]``; None where the training samples are the queries.
            init_train: ``[n_train]``, losses at ``w*``, taken off before they are stored; None for zeros. The same at
                every update.
            init_query: ``[n_query]``, the same of the queries.

        Raises:
            ValueError: where the shapes do not fit each other or the draws before, or the losses at ``w*`` are others
                than before.
        """
        queries = train_losses if query_losses is None else query_losses
        if train_losses.ndim != 3 or queries.ndim != 3 or train_losses.shape[:2] != queries.shape[:2]:
            raise ValueError(
                f"train_losses {tuple(train_losses.shape)}, query_losses {tuple(queries.shape)}: expected "
                "[num_chains, draws, n] with the same chains and draws."
            )
        start = torch.zeros(train_losses.shape[2], device="cpu") if init_train is None else init_train
        offset = start if query_losses is None else init_query
        other = torch.zeros(queries.shape[2], device="cpu") if offset is None else offset
        trains = joined("train_losses", self.train_trace, _above(train_losses, start).to(self.device))
        asked = joined("query_losses", self.query_trace, _above(queries, offset).to(self.device))
        inits = {"init_train": start, "init_query": other}
        for name, value in inits.items():
            new, known = value.detach().double().to(self.device), getattr(self, name)
            if len(self.train_trace) and not torch.allclose(new, known, rtol=1e-4, atol=1e-6, equal_nan=True):
                raise ValueError(f"{name}: not that of the update before. Give the same at every update, or reset().")
            setattr(self, name, new)
        self.train_trace, self.query_trace = trains, asked

    def draws(self) -> tuple[Tensor, Tensor]:
        """``[num_chains, num_draws, n_train]`` and ``[..., n_query]`` losses above those at ``w*`` so far."""
        sides: list[Any] = [self.train_trace, self.query_trace]
        found = [dim_zero_cat(s) if len(s) else torch.empty(0, 0, 0, device="cpu") for s in sides]
        return found[0], found[1]

    def compute(self) -> dict[str, Tensor]:
        """What the draws so far say, see the class.

        Raises:
            ValueError: where there are no draws.
        """
        x, y = (side.cpu() for side in self.draws())
        if not x.numel() or not y.numel():
            raise ValueError("no draws: call update(train_losses, query_losses) first.")
        whole = factor_of(between_share(x), x.shape[1])
        result = covariance(x, y).scaled(whole)
        own, other = variance(x)[0] * whole, variance(y)[0] * whole
        rho = correlation(result.matrix, own, other)
        init = self.init_train.cpu().reshape(-1)[: x.shape[2]]
        return {
            "matrix": shrink(result.matrix, rho, self.shrinkage),
            "correlation": rho,
            "se": result.se,
            "self_influence": own,
            "mean_loss": init + mean_and_error(x)[0],
        }

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Heat map of the correlations, queries by training samples.

        Returns:
            ``(figure, axes)``, as torchmetrics does.
        """
        from matplotlib.figure import Figure

        values = self.compute() if val is None else val
        figure = ax.get_figure() if ax is not None else Figure(figsize=(6, 4), layout="constrained")
        axes = ax if ax is not None else figure.add_subplot()
        image = axes.imshow(values["correlation"].numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axes.set(xlabel="training sample", ylabel="query")
        figure.colorbar(image, ax=axes, label="correlation of losses (> 0: helpful)")
        return figure, axes


def _above(losses: Tensor, start: Optional[Tensor]) -> Tensor:
    """float32 differences: the subtraction in float64, so that a small difference of large losses keeps its digits."""
    losses = losses.detach().double()
    return (losses if start is None else losses - start.detach().double().to(losses.device)).float()
