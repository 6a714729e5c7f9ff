"""What influence adds to a firing: ``python benchmarks/firing.py``, with and without probed samples in turn.

The chains are those of a firing at the monitor's defaults (4 x 100 draws), from the weights of the speed cases. It
prints the processor time with the samples over that without, medians over the repeats, the engine fixed so that both
have the same one. ``--large`` prints the memory of one large estimate's arithmetic instead.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from exports import ROOT, SPEED_CASES
from models import load_case
from torch import Tensor, nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(ROOT))

from lightning_slt.estimate import ChainSettings, measure_llc
from lightning_slt.functional.influence import covariance
from lightning_slt.influence import measure_both, probe_set
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.objective import Objective

CASES = ("mlp64", "mlp256", "convnet32", "transformer16")


def firing(case: Path, probes: int, seed: int) -> float:
    """Processor seconds of one firing, with so many probed samples (0: without influence)."""
    known = load_case(case)

    def loss_fn(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return known.batch_loss(module(batch[0]), batch[1])

    source = DatasetSource(TensorDataset(known.x, known.y), known.batch_size)
    settings = ChainSettings(
        num_chains=4, num_draws=100, seed=seed, tolerance=0.05, max_steps_bw_draws=4, method="sequential"
    )
    objective = Objective(known.module, loss_fn)
    start = time.process_time()
    if probes:
        measure_both(objective, source, settings, probe_set(source, None, probes, None, 0))
    else:
        measure_llc(objective, source, settings)
    return time.process_time() - start


def large() -> str:
    """10,000 probe samples, 500 queries, 8 chains x 200 draws: high-water mark of the arithmetic."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generator = torch.Generator().manual_seed(0)
    trace = torch.randn(8, 200, 10_500, generator=generator)
    start = time.process_time()
    found = covariance(trace[:, :, :10_000], trace[:, :, 10_000:])
    seconds = time.process_time() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return f"{tuple(found.matrix.shape)} from 8 x 200 draws: {peak:.2f} GB above the start, {seconds:.1f} s"


def main() -> None:
    """Measure and print one markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(SPEED_CASES), default=list(CASES))
    parser.add_argument("--probes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--large", action="store_true", help="the memory of a large estimate alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.large:
        print(large())
        return
    print(f"{arguments.probes} probed samples, {arguments.threads} thread(s), medians of {arguments.repeats}.\n")
    print("| case | with / without | min-max |\n|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="lightning-slt-bench-") as folder:
        for case in arguments.cases:
            SPEED_CASES[case](Path(folder))
            path = Path(folder) / f"{case}.npz"
            ratios = []
            for seed in range(arguments.repeats):
                without = firing(path, 0, seed)
                ratios.append(firing(path, arguments.probes, seed) / without)
                print(f"{case} {seed}: {ratios[-1]:.2f} ({without:.1f} s)", file=sys.stderr, flush=True)
            print(f"| {case} | {statistics.median(ratios):.2f} | {min(ratios):.2f}-{max(ratios):.2f} |", flush=True)


if __name__ == "__main__":
    main()
