"""Whether ``torch.compile`` of a chain's step pays back within a firing: ``python benchmarks/compiling.py``.

A step is forward and backward of one minibatch. Eager and compiled take turns in one process; processor time of a step,
the fastest of the turns, and wall-clock of the first compiled step. Run it twice with the same TORCHINDUCTOR_CACHE_DIR
to see what a cache on disk leaves of that.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from exports import SPEED_CASES
from models import Case, load_case
from torch import Tensor

TURNS = 7
FIRING = 1600
"""Steps of 8 chains x 200 draws."""


def measure(case: Case, steps: int) -> tuple[float, float, float]:
    """Seconds of compiling, of an eager step, and of a compiled one."""
    module, generator = case.module.train(), torch.Generator().manual_seed(0)
    rows = [torch.randint(case.n, (case.batch_size,), generator=generator) for _ in range(4)]
    batches = [(case.x[i], case.y[i]) for i in rows]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return case.batch_loss(module(x), y)

    def step(function: Callable[[Tensor, Tensor], Tensor], number: int) -> None:
        module.zero_grad(set_to_none=False)
        function(*batches[number % len(batches)]).backward()

    compiled = torch.compile(loss)
    start = time.perf_counter()
    step(compiled, 0)
    compiling = time.perf_counter() - start
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(TURNS):
        for name, function in (("eager", loss), ("compiled", compiled)):
            start = time.process_time()
            for number in range(steps):
                step(function, number)
            seconds[name].append((time.process_time() - start) / steps)
    return compiling, min(seconds["eager"]), min(seconds["compiled"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=SPEED_CASES, default=["mlp256", "transformer64"])
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| case | compiling, s | eager / compiled step | steps until it pays | of a firing |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="lightning-slt-bench-") as folder:
        for name in given.cases:
            SPEED_CASES[name](Path(folder))
            compiling, eager, compiled = measure(load_case(Path(folder) / f"{name}.npz"), given.steps)
            pays = compiling / (eager - compiled) if compiled < eager else float("inf")
            print(
                f"| {name} | {compiling:.1f} | {eager / compiled:.2f} | {pays:.0f} | {pays / FIRING:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
