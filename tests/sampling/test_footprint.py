"""What chains hold at once, in copies of the weights and beside the user's module: the profiler's own record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import estimate_llc
from lightning_slt.sampling.engines import GRADIENT_BUDGET, chunk_width
from lightning_slt.sampling.layout import BLOCK
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.samplers import SGLD
from tests.sampling.helpers import mean_squared

WIDTH, DEPTH = 256, 8
DRAWS: dict[str, Any] = {"num_draws": 8, "num_burnin_steps": 4, "num_steps_bw_draws": 1, "batch_size": 2}


def module() -> nn.Module:
    return nn.Sequential(*[layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])


def peak_copies(chains: int, method: str, sampler: SGLD | None) -> float:
    """Allocations larger than the activations of a batch, added up as they come and go."""
    torch.manual_seed(0)
    net, data = module(), TensorDataset(torch.randn(8, WIDTH), torch.randn(8, WIDTH))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        estimate_llc(
            net, data, mean_squared, sampler=sampler, num_chains=chains, localization=1.0, method=method, **DRAWS
        )
    least = 2 * chains * WIDTH * 4
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes() if abs(event.nbytes()) > least else 0
        peak = max(peak, now)
    return peak / sum(p.numel() * p.element_size() for p in net.parameters())


def one_layer_and_noise() -> float:
    """The gradient that backward makes of one parameter before it is added, and the noise of a block of weights."""
    weights = DEPTH * (WIDTH * WIDTH + WIDTH)
    return (WIDTH * WIDTH + min(BLOCK["cpu"], weights)) / weights


@pytest.mark.parametrize("sampler", [SGLD(lr=1e-7), None], ids=["given", "calibrated"])
@pytest.mark.parametrize("chains", [2, 5])
def test_chains_one_after_another_hold_two_copies_beside_their_own(chains: int, sampler: SGLD | None) -> None:
    """``w*`` and one gradient; nothing more while the step is looked for."""
    assert peak_copies(chains, "sequential", sampler) <= chains + 2 + one_layer_and_noise() + 0.02


@pytest.mark.parametrize("sampler", [SGLD(lr=1e-7), None], ids=["given", "calibrated"])
def test_a_batched_chunk_holds_its_gradients_once_and_no_second_copy_of_the_anchor(sampler: SGLD | None) -> None:
    assert peak_copies(4, "batched", sampler) <= 2 * 4 + 1 + 4 * one_layer_and_noise() + 0.02


def test_the_gradients_of_a_chunk_stay_within_their_budget() -> None:
    def squares(net: nn.Module, batch: Any) -> Tensor:
        return net(batch[0]).square().mean()

    objective = Objective(nn.Linear(2**11, 2**11, bias=False), squares)  # 16 MiB
    assert GRADIENT_BUDGET == 2**27
    assert chunk_width(objective, 0, 32) == 8
    assert chunk_width(objective, 2**28, 32) == 1
