"""Weight-sized storages alive at once, in copies of the model's weights: what C chains hold beside the model itself.

    python benchmarks/memory.py

The profiler's record of allocations is added up, of those that are larger than the activations of the (small) batch. So
the figure is exact and the same each time, where the resident set is not. Printed: the peak over a whole call of
``estimate_llc``, set-up, calibration and draws included, over the bytes of the weights, beside C + 2.

"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import estimate_llc
from lightning_slt.sampling.samplers import SGLD


def peak_bytes(least: int, work: Callable[[], object]) -> int:
    """The most bytes that allocations of at least ``least`` bytes each held at once while ``work`` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]" and abs(event.nbytes()) >= least]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def wide(width: int, depth: int) -> nn.Module:
    """``depth`` square layers: 20 million weights at 2,236 x 4."""
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])


def loss(module: nn.Module, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


def peak_copies(width: int, depth: int, chains: int, method: str, sampler: Any, draws: int = 8) -> float:
    """The most that was alive at once, in copies of the weights, those of the module not counted."""
    torch.manual_seed(0)
    module = wide(width, depth)
    data = TensorDataset(torch.randn(8, width), torch.randn(8, width))
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    largest_activation = 2 * chains * width * 4

    def work() -> None:
        estimate_llc(
            module, data, loss, sampler=sampler, num_chains=chains, num_draws=draws, num_burnin_steps=4,
            num_steps_bw_draws=1, batch_size=2, localization=1.0, method=method,
        )  # fmt: skip

    return peak_bytes(largest_activation + 1, work) / weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2236)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 4, 8])
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| chains | method | sampler | copies of the weights | C + 2 |\n|---|---|---|---|---|")
    for chains in given.chains:
        for method in ("sequential", "batched"):
            if method == "batched" and chains < 2:
                continue
            for name, sampler in (("SGLD(lr=...)", SGLD(lr=1e-7)), ("calibrated", None)):
                peak = peak_copies(given.width, given.depth, chains, method, sampler)
                print(f"| {chains} | {method} | {name} | {peak:.2f} | {chains + 2} |", flush=True)


if __name__ == "__main__":
    main()
