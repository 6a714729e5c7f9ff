"""What the chains of a component showed: its answer to the shift, sample by sample and group by group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from lightning_slt.functional.between_chains import MIXED, factor_of
from lightning_slt.functional.influence import group_means
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.functional.susceptibility import Response, error_of_parts, susceptibility
from lightning_slt.influence_record import in_order
from lightning_slt.sampling.readings import diverged
from lightning_slt.sampling.segment import Segment

MIN_READS = 8
NAMED = 5
"""Samples that a note names."""


@dataclass(frozen=True, eq=False)
class Component:
    """What one component's chains showed.

    Attributes:
        whole: its answer to the shift, one number.
        single: to each of the ``index``; NaN for a sample without a loss.
        by_group: to each group, None where there are none.
        per_chain: ``[num_chains]``, ``whole`` by chain; NaN for one that is left out.
        llc: mean of the integrand over the samples read.
        reasons: why it is not valid; none where it is.
        notes: what should be known besides.
    """

    whole: Response
    single: Response
    by_group: Optional[Response]
    per_chain: Tensor
    llc: float
    posterior: LocalPosterior
    num_weights: int
    num_draws: int
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    index: Tensor


def read_component(
    name: str,
    segment: Segment,
    posterior: LocalPosterior,
    num_weights: int,
    index: Tensor,
    group: Optional[Sequence[Optional[str]]],
    parts: int = 0,
    unread: float = 0.0,
) -> Component:
    """Covariances of the integrand with the losses, over the chains that have not diverged and the samples with a loss.

    Args:
        segment: with what a :class:`~lightning_slt.susceptibility.shift.ShiftReader` has read.
        index: of the shifted samples that it read.
        group: of each of them, None where there are none.
        parts: of each subset of the original data that were read besides; 0 where all of it was read.
        unread: share of the original data that is not in a subset; of two that have no sample in common, half and more.
    """
    assert segment.read is not None
    read, of_parts = segment.read.split([segment.read.shape[2] - 2 * parts, 2 * parts], dim=2)
    losses_read = torch.isfinite(read[:, :, :2]).all(2).all(1)
    good = ~diverged(segment, posterior.nbeta, num_weights) & losses_read
    reasons: list[str] = []
    notes: list[str] = []
    if not bool(good.all()):
        reasons.append(f"{name}: {int((~good).sum())} of {len(good)} chains have diverged")
    chains, draws, m = len(read), read.shape[1], read.shape[2] - 2
    if draws < MIN_READS:
        reasons.append(f"{name}: {draws} readings of a chain are too few")
    # a sample without a number is no fault of the chains
    usable = torch.isfinite(read[good][:, :, 2:]).all(1).all(0)
    if bool(good.any()) and not bool(usable.all()):
        left_out = index[~usable].tolist()
        some = ", ".join(map(str, left_out[:NAMED])) + (", ..." if len(left_out) > NAMED else "")
        said = f"{name}: the loss of {len(left_out)} of {m} shifted samples is not finite: left out ({some})"
        (notes if bool(usable.any()) else reasons).append(said)
    names = names_of(group)
    whole, single, grouped = (_nothing(k) for k in (1, m, len(names)))
    per_chain, llc = torch.full((chains,), math.nan, dtype=torch.float64, device="cpu"), math.nan
    if bool(good.any()) and bool(usable.any()) and draws >= 2:
        kept = read[good].double()
        phi, base, losses = posterior.nbeta * kept[:, :, 0], kept[:, :, 1:2], kept[:, :, 2:][:, :, usable]
        pieces = of_parts[good].double()

        def answer(shifted: Tensor) -> Response:
            found = susceptibility(phi, shifted - base)
            if not parts:
                return found
            of_observed = posterior.nbeta * error_of_parts(pieces[:, :, :parts], shifted - base)
            of_base = error_of_parts(pieces[:, :, parts:], phi.unsqueeze(2))
            # no sample is in both subsets: where one has too many of a kind the other has too few
            shared = 2 * (1 - unread) / unread * of_observed * of_base
            either = (of_observed.square() + of_base.square() + shared).sqrt()
            sampled = unread**0.5 * factor_of(found.share, draws) * either
            return replace(found, se=torch.hypot(found.se, sampled))

        whole = answer(losses.mean(dim=2, keepdim=True))
        single = _among(answer(losses), usable)
        if group:
            own = [g for g, kept_one in zip(group, usable.tolist(), strict=True) if kept_one]
            grouped = answer(group_means(losses, own, names))
        per_chain[good] = whole.per_chain[:, 0]
        llc = float(phi.mean())
        if whole.share > MIXED:
            reasons.append(f"{name}: {whole.share:.0%} of the integrand's variance lies between chains: not mixed")
    return Component(
        whole=whole,
        single=single,
        by_group=grouped if names else None,
        per_chain=per_chain,
        llc=llc,
        posterior=posterior,
        num_weights=num_weights,
        num_draws=draws,
        reasons=tuple(reasons),
        notes=tuple(notes),
        index=index,
    )


def names_of(group: Optional[Sequence[Optional[str]]]) -> tuple[str, ...]:
    """The groups that have a sample, in order."""
    return in_order({g for g in group if g is not None}) if group is not None else ()


def _among(response: Response, usable: Tensor) -> Response:
    """The response to every sample, NaN for those that are not usable."""
    if bool(usable.all()):
        return response
    chi, se = (torch.full((len(usable),), math.nan, dtype=torch.float64, device="cpu") for _ in range(2))
    per_chain = torch.full((len(response.per_chain), len(usable)), math.nan, dtype=torch.float64, device="cpu")
    chi[usable], se[usable], per_chain[:, usable] = response.chi, response.se, response.per_chain
    return Response(chi, se, per_chain, response.share)


def _nothing(m: int) -> Response:
    empty = torch.full((m,), math.nan, dtype=torch.float64, device="cpu")
    return Response(empty, empty, empty.unsqueeze(0), math.nan)
