"""Draws that do not go with those of before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_slt import Influence, LearningCoefficient, Susceptibility


def loss(chains: int, samples: int = 3) -> Tensor:
    return torch.rand(chains, 10, samples, generator=torch.Generator().manual_seed(chains))


METRICS: dict[str, tuple[Any, Callable[[int, int], tuple[Tensor, ...]]]] = {
    "llc": (LearningCoefficient(nbeta=10.0), lambda chains, _: (loss(chains)[..., 0], loss(chains)[..., 1])),
    "influence": (Influence(), lambda chains, samples: (loss(chains, samples),)),
    "susceptibility": (Susceptibility(nbeta=10.0), lambda c, samples: (loss(c)[..., 0], loss(c, samples))),
}


@pytest.mark.parametrize("name", METRICS)
def test_other_chains_than_before_are_refused_and_nothing_is_lost(name: str) -> None:
    metric, draws = METRICS[name]
    metric.reset()
    metric.update(*draws(2, 3))
    before = metric.compute()
    with pytest.raises(ValueError, match=r"\(3, 10.*the draws before are \(2, 10.* or reset\(\)"):
        metric.update(*draws(3, 3))
    metric._computed = None
    for key, value in metric.compute().items():
        torch.testing.assert_close(value, before[key], rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("name", ["influence", "susceptibility"])
def test_other_samples_than_before_are_refused(name: str) -> None:
    metric, draws = METRICS[name]
    metric.reset()
    metric.update(*draws(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 10, 4\): the draws before are \(2, 10, 3\)"):
        metric.update(*draws(2, 4))
