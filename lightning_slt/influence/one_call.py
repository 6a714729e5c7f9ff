"""Per-sample influence at the weights of a module: one call without a Trainer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
from torch import nn

from lightning_slt.estimate import ChainSettings, state_dict_of
from lightning_slt.functional.influence import shrink
from lightning_slt.influence.chains import InfluenceChains
from lightning_slt.influence.probes import probe_set
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.kinds import check_callable, check_count, check_flag, check_number
from lightning_slt.sampling.eval_mode import misfit_of_eval
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.restriction import Restriction
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.samplers import Sampler, as_sampler
from lightning_slt.sampling.samples import GroupFn, indexed_source
from lightning_slt.sampling.steps import LossFn
from lightning_slt.sampling.unlike import array_named, unlike_named

MAX_TRAIN = 10_000
"""Training samples of a one-call estimate where nothing else is said."""


def estimate_influence(
    module: nn.Module,
    train_data: Any,
    query_data: Any = None,
    loss_fn: Optional[LossFn] = None,
    *,
    sampler: Optional[Union[Sampler, Mapping[str, Any]]] = None,
    nbeta: Optional[float] = None,
    localization: Optional[float] = None,
    num_chains: int = 16,
    num_draws: int = 20,
    num_burnin_steps: int = 6,
    num_steps_bw_draws: int = 2,
    batch_size: Optional[int] = None,
    weights: Optional[Mapping[str, Any]] = None,
    restrict: Restriction = None,
    seed: int = 0,
    device: Optional[torch.device | str] = None,
    full_batch: Optional[bool] = None,
    max_train: Optional[int] = MAX_TRAIN,
    max_query: Optional[int] = None,
    group_fn: Optional[GroupFn] = None,
    per_token: bool = False,
    shrinkage: Optional[float] = None,
    control_variates: bool = True,
    num_samples: Optional[int] = None,
    method: str = "auto",
) -> InfluenceEstimate:
    """Influence of training samples on queries: the covariance of their losses over the local posterior.

    ``matrix[q, i] = Cov_w(l_i(w), l_q(w))``, the negative of the local Bayesian influence function (Kreer et al. 2025,
    arXiv 2509.26544): positive where more weight on training sample i lowers the loss of query q. The module is not
    changed, nor is any global random state.

    By default the chains are kinetic Langevin ones in the metric of the curvature, on a posterior whose damping
    ``localization / nbeta`` and width are those that predict retraining best (see docs/influence.md); it is cooler than
    that of the learning coefficient, since it is to be read near ``w*``. ``mean_loss``, by which suspects are ranked,
    is read over the latter's posterior, from a few more draws (with ``nbeta`` or ``localization`` given, over theirs).

    Args:
        module: a LightningModule (its ``training_step`` is the loss), or any module with ``loss_fn``.
        train_data: a map-style Dataset, or a DataLoader over one.
        query_data: the same for the queries; None for the training samples themselves.
        loss_fn: ``loss_fn(module, batch)`` -> scalar, ``[batch]`` or ``[batch, tokens]``.
        sampler: None for :class:`~lightning_slt.sampling.samplers.KineticLangevin` in a metric that is measured; any
            other with its ``lr`` calibrated where it is None.
        nbeta: None for ``localization / (2.5 x mean curvature)``; with a sampler given, for ``n / log n``.
        localization: None for ``d / (0.35 |w*|)²`` (with nbeta given: ``2.5 x mean curvature x nbeta``).
        num_chains: independent chains.
        num_draws: readings of each.
        num_burnin_steps: steps before the first; more where chains are seen to be on their way from the weights still.
        num_steps_bw_draws: steps between them.
        batch_size: of the chains; None for all the data up to 2,048 samples, else 512 or the DataLoader's where larger.
        weights: a ``state_dict`` (or a Lightning checkpoint with one) to study in place of the module's weights.
        restrict: which weights move.
        seed: determines the estimate and the subset of samples.
        device: None for where the module is.
        full_batch: True for all the data at every step, whatever its size.
        max_train, max_query: samples at the most; a reproducible subset of larger data. None for all.
        group_fn: the group of a sample, for ``group_matrix``; None takes the class where there is one.
        per_token: every token of a query is a row, ``query_token`` says which; ``loss_fn`` must give
            ``[batch, tokens]``.
        shrinkage: None for the least square error: what the draws say beyond the first order, which is known without
            noise, counts by its James-Stein factor (``rest_weight`` of the result, 1 for many draws). 1 for the plain
            covariance, which has no bias; 1.25 to 1.5 weighs weak correlations, mostly noise, down.
        control_variates: take the part of the covariance that is known out of the noise, see
            :mod:`lightning_slt.sampling.control`. Needs the gradients of all samples at ``w*``: done without where they
            are more than 67 million numbers, or the samples' losses are computed one by one; with a sampler given; and
            where there is no metric. ``notes`` says so.
        num_samples: n, where it is not the length of ``train_data``.
        method: ``"auto"``, ``"sequential"`` or ``"batched"``, see :func:`~lightning_slt.estimate_llc`.

    Returns:
        An :class:`~lightning_slt.influence_record.InfluenceEstimate`: ``matrix``, ``correlation`` and ``se``
        ``[n_query, n_train]``, ``self_influence`` ``[n_train]``, ``top(query, k)``, ``bottom(query, k)``.

    Raises:
        ValueError: for an argument out of range, no data, data without an index, queries of another structure than the
            training samples that the loss fails on, a coupled loss, a module without a usable loss, a non-finite
            starting loss. The message names the argument and the remedy.
        TypeError: for an argument of another kind, likewise.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(40, 3, generator=g)
        >>> net = nn.Linear(3, 1, bias=False)
        >>> y = net(x).detach() + 0.1 * torch.randn(40, 1, generator=g)
        >>> inf = estimate_influence(net, TensorDataset(x, y), None, lambda m, b: (m(b[0]) - b[1]).square().mean())
        >>> inf.matrix.shape, inf.valid, bool((inf.matrix.diagonal() - inf.self_influence).abs().max() < 1e-9)
        (torch.Size([40, 40]), True, True)
    """
    start = time.perf_counter()
    shrink(torch.zeros((), device="cpu"), torch.zeros((), device="cpu"), 1.0 if shrinkage is None else shrinkage)
    sampler = as_sampler(sampler)
    for name, value in (("nbeta", nbeta), ("localization", localization)):
        check_number(name, value)
    for name, flag in (("per_token", per_token), ("control_variates", control_variates)):
        check_flag(name, flag, optional=False)
    check_callable("group_fn", group_fn, "sample")
    settings = ChainSettings(
        sampler=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin_steps=num_burnin_steps,
        num_steps_bw_draws=num_steps_bw_draws,
        nbeta=nbeta if sampler is not None else nbeta or 1.0,
        localization=localization if sampler is not None else localization or 1.0,
        seed=seed,
        method=method,
    )
    check_count("batch_size", batch_size)
    check_count("num_samples", num_samples, otherwise=", or None to take it from the data")
    check_flag("full_batch", full_batch)
    seed = settings.seed
    if sampler is None and localization == 0 and nbeta is None:
        raise ValueError(f"localization={localization}: gives no nbeta. Give nbeta= too, or a positive localization.")
    with torch.inference_mode(False), preserve_rng(seed):
        objective = Objective(module, loss_fn, restrict, device, weights=state_dict_of(weights))
        train = indexed_source("influence", "train_data", train_data, batch_size, objective.device, seed, full_batch)
        train.num_samples = num_samples or train.num_samples
        query = None
        if query_data is not None:
            query = indexed_source("influence", "query_data", query_data, 1, objective.device, seed)
        probes = probe_set(train, query, max_train, max_query, seed, group_fn, per_token)
        asked = shrinkage, nbeta, localization, control_variates
        with unlike_named("query_data", probes.query, train), array_named("train_data", train_data, train):
            found = InfluenceChains(objective, train, probes, settings, *asked).measure()
        found = found.with_verdict(misfit_of_eval(objective))
    return found.replace(seconds=time.perf_counter() - start)
