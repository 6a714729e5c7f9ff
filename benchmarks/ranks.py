"""Chain-steps per second of two ranks on two cores against one: ``python benchmarks/ranks.py``.

Two processes of one thread each, pinned to a core, with the process group that a data-parallel run has. In turn the
first measures alone while the other waits, and both share the chains; the whole of a firing counts, with the exchange
of what the ranks have. A ratio of 2 would be perfect. Each repeat gives one ratio, of neighbours in time; best, median
and worst of them are printed, with the load of the machine before and after: on a busy one, two cores are not to be
had all the time, and the ratio says more of the neighbours than of the ranks. The last column does not depend on them:
the processor time of the one rank over that of the busier of two. It leaves out waiting, and memory that is shared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from models import Transformer, mlp
from torch import Tensor, nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_slt.callbacks.distribution import Ranks
from lightning_slt.estimate import ChainSettings, measure_llc
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.collective import Alone, Collective
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.samplers import SGLD

WORLD = 2
TARGET = 1.6
CASES = ("mlp64", "mlp256", "transformer16")


def case_of(name: str) -> tuple[nn.Module, TensorDataset, int]:
    """A random-init module, random data and a batch size: the shapes of the speed cases."""
    torch.manual_seed(0)
    if name.startswith("mlp"):
        data = TensorDataset(torch.randn(1797, 64), torch.randint(10, (1797,)))
        return mlp((64, 128, 128, 10)), data, int(name[3:])
    tokens = torch.randint(64, (2048, 33))
    return Transformer(), TensorDataset(tokens[:, :-1], tokens[:, 1:]), int(name[11:])


def loss_fn(module: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]).flatten(0, -2), batch[1].flatten())


class Bench:
    """One firing after another of the same chains."""

    def __init__(self, name: str, chains: int, draws: int) -> None:
        module, data, batch_size = case_of(name)
        self.objective, self.source = Objective(module, loss_fn), DatasetSource(data, batch_size)
        self.settings = ChainSettings(
            sampler=SGLD(lr=1e-6), num_chains=chains, num_draws=draws, num_burnin_steps=0, num_steps_bw_draws=1,
            method="sequential",
        )  # fmt: skip

    def measure(self, collective: Collective) -> tuple[float, float]:
        """Chain-steps per second, and the processor time that this process took."""
        start, processor = time.perf_counter(), time.process_time()
        measure_llc(self.objective, self.source, self.settings, collective)
        seconds = time.perf_counter() - start
        return self.settings.num_chains * self.settings.num_draws / seconds, time.process_time() - processor


def rank_main(rank: int, port: int, arguments: argparse.Namespace, answers: multiprocessing.Queue[list[str]]) -> None:
    """What one process does: pinned, one thread, in step with the other."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD, timeout=timedelta(minutes=10)
    )
    ranks, rows = Ranks(), []
    for name in arguments.cases:
        bench = Bench(name, arguments.chains, arguments.draws)
        bench.measure(ranks)  # the first one warms up
        alone, both, processor = [], [], []
        for _ in range(arguments.repeats):
            spent = 0.0
            if rank == 0:
                speed, spent = bench.measure(Alone())
                alone.append(speed)
            dist.barrier()
            speed, share = bench.measure(ranks)
            both.append(speed)
            busier = max(ranks.exchange(lambda share=share: share))  # type: ignore[misc]
            processor.append(spent / busier)
        if rank == 0:
            ratios = [b / a for a, b in zip(alone, both, strict=True)]
            rows.append(
                f"| {name} | {statistics.median(alone):.0f} | {statistics.median(both):.0f} | {max(ratios):.2f} | "
                f"{statistics.median(ratios):.2f} | {min(ratios):.2f} | {statistics.median(processor):.2f} |"
            )
    if rank == 0:
        answers.put(rows)
    ranks.close()
    dist.destroy_process_group()


def main() -> None:
    """Measure and print one markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if cores < WORLD:
        raise SystemExit(f"this process may use {cores} core(s), and {WORLD} ranks need as many to gain anything")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[list[str]] = context.Queue()
    before = os.getloadavg()[0]
    ranks = [context.Process(target=rank_main, args=(rank, port, arguments, answers)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    rows = answers.get()
    for process in ranks:
        process.join()
    print(
        f"{arguments.chains} chains x {arguments.draws} steps, one thread a rank, {arguments.repeats} repeats in turn; "
        f"load of the machine {before:.1f} before and {os.getloadavg()[0]:.1f} after; aimed at: {TARGET}.\n"
    )
    print("| case | steps/s, one rank | steps/s, two ranks | ratio, best | median | worst | by processor time |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
