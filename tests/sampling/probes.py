"""Probes of small modules, and the losses that they should give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_slt.sampling.anchor import open_window
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.probe import Probe
from lightning_slt.sampling.samples import Samples
from tests.sampling.helpers import gen

functional = nn.functional


def probe_of(
    module: nn.Module,
    data: Any,
    loss_fn: Any = None,
    *,
    count: int = 12,
    batch_size: int = 4,
    collate: Any = None,
    per_token: bool = False,
    numbers: Any = None,
) -> Probe:
    objective = Objective(module, loss_fn)
    source = DatasetSource(data, batch_size, collate, None, lambda batch: batch, 0)
    open_window(objective, source)
    samples = Samples.of(source, range(count) if numbers is None else numbers)
    with objective.active():
        return Probe(objective, samples, per_token)


def elsewhere(probe: Probe, rows: int = 3) -> Tensor:
    """Weights near ``w*``."""
    anchor = probe._objective.anchor
    return anchor + 0.1 * torch.randn(rows, len(anchor), generator=gen(8), dtype=anchor.dtype)


def by_hand(
    module: nn.Module, probe: Probe, weights: Tensor, loss: Callable[[nn.Module, int], Tensor], count: int = 12
) -> Tensor:
    """``[rows, count]``, from a copy whose weights are set, one sample after another."""
    at, out = copy.deepcopy(module).eval(), []
    for row in weights:
        with torch.no_grad():
            for p, piece in zip(at.parameters(), probe._objective.pieces(row), strict=True):
                p.copy_(piece)
            out.append(torch.stack([loss(at, i) for i in range(count)]))
    return torch.stack(out)


def total(probe: Probe, weights: Tensor) -> Tensor:
    """Losses at the weights, not above those at ``w*``."""
    return (probe(weights).double() + probe.anchor).float()


def per_sample(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1], reduction="none")
