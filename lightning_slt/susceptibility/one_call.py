"""Susceptibility in one call, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Union

import torch
from torch import nn

from lightning_slt.estimate import ChainSettings, state_dict_of
from lightning_slt.kinds import check_count, check_flag
from lightning_slt.sampling.arguments import without_fabric
from lightning_slt.sampling.objective import Objective, told_once
from lightning_slt.sampling.restriction import Restriction, select_parameters
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.samplers import Sampler, as_sampler
from lightning_slt.sampling.samples import Samples, choose_samples, group_name, indexed_source
from lightning_slt.sampling.steps import LossFn
from lightning_slt.sampling.unlike import array_named, unlike_named
from lightning_slt.susceptibility.firing import measure_susceptibility
from lightning_slt.susceptibility.shift import Shift
from lightning_slt.susceptibility_record import SusceptibilityEstimate

MAX_SHIFTED = 1000
PURPOSE = "susceptibility"


def estimate_susceptibility(
    module: nn.Module,
    data: Any,
    shifted_data: Any,
    loss_fn: Optional[LossFn] = None,
    *,
    components: Optional[Mapping[str, Restriction]] = None,
    sampler: Optional[Union[Sampler, Mapping[str, Any]]] = None,
    nbeta: Optional[float] = None,
    localization: Optional[float] = None,
    num_chains: int = 16,
    num_draws: int = 200,
    num_burnin_steps: Optional[int] = None,
    num_steps_bw_draws: Optional[int] = None,
    batch_size: Optional[int] = None,
    weights: Optional[Mapping[str, Any]] = None,
    restrict: Restriction = None,
    seed: int = 0,
    device: Optional[torch.device | str] = None,
    full_batch: bool = False,
    max_shifted: Optional[int] = MAX_SHIFTED,
    groups: Optional[Sequence[Optional[str]]] = None,
    num_samples: Optional[int] = None,
    method: str = "auto",
) -> SusceptibilityEstimate:
    """How the LLC of each component answers to a shift of the data, ``-Cov_w(nbeta (L(w) - L(w*)), Delta L(w))``.

    Baker et al. 2025, arXiv 2504.18274; ``Delta L`` is the mean loss on the shifted data minus that on ``data``, and
    only the component's weights move. In units of the loss; ``response`` is ``nbeta`` times it, the derivative of the
    LLC by the share of the shift. The module is not changed, nor is any global random state.

    Args:
        module: a LightningModule (its ``training_step`` is the loss), or any module with ``loss_fn``.
        data: the original data: a map-style Dataset, or a DataLoader over one.
        shifted_data: the same of the shifted data; each sample is a shift of its own besides.
        loss_fn: ``loss_fn(module, batch)`` -> scalar or ``[batch]``.
        components: by name, which weights move, as in ``restrict``; None for one component, ``"all"``, of ``restrict``.
        sampler: None for :class:`~lightning_slt.sampling.samplers.KineticLangevin` in a metric that is measured, which
            a finite step does not heat on a quadratic loss; SGLD's step adds to the covariance.
        nbeta: None for ``n / log n``.
        localization: None for ``d / |w*|²`` of the component within [1, 100].
        num_chains: independent chains of each component.
        num_draws: readings of each.
        num_burnin_steps: None for 8, and more where chains are seen to be on their way from the weights still (with a
            sampler given: until the trace is flat).
        num_steps_bw_draws: steps between readings; None for 2.
        batch_size: None for all the data up to 2,048 samples; of more, for that of the loader, 512 at the least.
        weights: a ``state_dict`` (or a Lightning checkpoint with one) to study in place of the module's weights.
        restrict: which weights move, where there is one component.
        seed: determines the estimate and the subsets.
        device: None for where the module is.
        full_batch: every step sees all the data.
        max_shifted: samples of the shifted data at the most, a reproducible subset; None for all.
        groups: the group of each sample of ``shifted_data``, for ``group_chi``: names or numbers, None for none.
        num_samples: n, where it is not the length of ``data``.
        method: see :func:`~lightning_slt.estimate_llc`.

    Returns:
        A :class:`~lightning_slt.susceptibility_record.SusceptibilityEstimate`: ``chi``, ``se`` ``[components]``,
        ``per_chain``, ``matrix`` ``[components, samples]``; look at ``valid`` and ``reasons`` first.

    Raises:
        ValueError: for an argument out of range, ``components`` beside ``restrict``, no data, data without an index, a
            coupled loss, shifted data of another structure that the loss fails on, a component that matches no weight.
            The message names the argument and the remedy.
        TypeError: for an argument of another kind, likewise.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(60, 3, generator=g)
        >>> net = nn.Linear(3, 1, bias=False)
        >>> y = net(x).detach()
        >>> square = lambda m, b: (m(b[0]) - b[1]).square().mean() / 2
        >>> found = estimate_susceptibility(net, TensorDataset(x, y), TensorDataset(2 * x, 2 * y), square)
        >>> found.valid, bool(found.chi[0] < -5 * found.se[0]), found.matrix.shape
        (True, True, torch.Size([1, 60]))
    """
    if components is not None and restrict is not None:
        raise ValueError("components and restrict are both given: name the weights of each component in components.")
    if components is not None and not isinstance(components, Mapping):
        raise TypeError(
            f"components={components!r}: expected a mapping, got {type(components).__name__}. Give {{name: patterns}}."
        )
    if groups is not None and (isinstance(groups, (str, Mapping)) or not hasattr(groups, "__len__")):
        raise TypeError(
            f"groups={groups!r}: expected a list, got {type(groups).__name__}. Give one group for each sample of "
            "shifted_data."
        )
    if components is not None and not components:
        raise ValueError("components is empty: leave it None for all weights, or give {name: patterns}.")
    for name, value in (("batch_size", batch_size), ("max_shifted", max_shifted)):
        check_count(name, value)
    check_count("num_samples", num_samples, otherwise=", or None to take it from the data")
    check_flag("full_batch", full_batch)
    sampler = as_sampler(sampler)
    settings = ChainSettings(
        sampler=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin_steps=num_burnin_steps,
        num_steps_bw_draws=num_steps_bw_draws,
        nbeta=nbeta,
        localization=localization,
        seed=seed,
        method=method,
    )
    seed = settings.seed
    state = state_dict_of(weights)
    wanted: Mapping[str, Restriction] = components if components is not None else {"all": restrict}
    say = told_once()

    def made(restriction: Restriction) -> Callable[[], Objective]:
        return lambda: Objective(module, loss_fn, restriction, device, weights=state, say=say)

    if isinstance(module, nn.Module):  # what it is otherwise is said below
        for name, restriction in (components or {}).items():
            select_parameters(without_fabric(module), restriction, f"components[{name!r}]")
    with torch.inference_mode(False), preserve_rng(seed):
        # all of them once, so that a name that matches nothing is not found after an hour of chains
        objectives = {name: made(restriction)() for name, restriction in wanted.items()}
        target = next(iter(objectives.values())).device
        # where nothing is said, the size of the data decides
        full = True if full_batch or (sampler is not None and sampler.full_batch) else None
        source = indexed_source(PURPOSE, "data", data, batch_size, target, seed, full)
        source.num_samples = num_samples or source.num_samples
        other = indexed_source(PURPOSE, "shifted_data", shifted_data, 1, target, seed)
        total = other.num_indexed
        if groups is not None and len(groups) != total:
            raise ValueError(f"groups: {len(groups)} of them for {total} samples of shifted_data; give one a sample.")
        numbers = choose_samples(total, max_shifted, seed)
        group = [group_name(groups[i]) for i in numbers] if groups is not None else None
        shift = Shift.of(source, Samples.of(other, numbers), seed, group)
        with unlike_named("shifted_data", shift.shifted, source), array_named("data", data, source):
            return measure_susceptibility(
                {name: lambda o=o: o for name, o in objectives.items()},  # type: ignore[misc]
                source,
                shift,
                settings,
            )
