"""Chain-steps on a GPU beside the bare loop of forward and backward: ``python benchmarks/gpu.py``.

A GPT-2-small-sized model of random weights (124 million in the blocks and the token embedding, 39 million more in the
unembedding, sequences of 256, batches of 8) with 1, 4 and 8 chains in float32 and under bfloat16 autocast, and the
small cases of ``speed.py`` with 8. Each is measured in turn with the bare loop, in one process; a whole estimate is
timed, its set-up included, the GPU waited for at the end. Memory is the allocator's peak beyond the model, in copies of
the weights, less the activations of one batch (the peak of one step whose gradients are there already).

``--peers`` adds devinterp 1.3 and canonical-interp where they are installed beside this package. ``--compile`` adds
what ``torch.compile`` of forward and backward costs and saves.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from exports import SPEED_CASES
from models import Case, Transformer, load_case, next_token_loss, next_token_losses
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slt import SGLD
from lightning_slt.estimate import ChainSettings, measure_llc
from lightning_slt.sampling.given_data import source_of
from lightning_slt.sampling.objective import Objective

Context = Callable[[], AbstractContextManager[Any]]
LENGTH, BATCH, ROWS = 256, 8, 256


def gpt2() -> Case:
    torch.manual_seed(0)
    with torch.device("cuda"):
        module = Transformer(vocabulary=50257, length=LENGTH, width=768, heads=12, layers=12)
        tokens = torch.randint(50257, (ROWS, LENGTH))
    return Case(
        "gpt2-small-sized", "transformer", module, tokens, tokens, BATCH, nbeta=46.0, localization=100.0, lr=1e-9,
        batch_loss=next_token_loss, sample_losses=next_token_losses,
    )  # fmt: skip


def to_gpu(case: Case) -> Case:
    return Case(**{**vars(case), "module": case.module.cuda(), "x": case.x.cuda(), "y": case.y.cuda()})


def bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16)


@dataclass(frozen=True)
class Run:
    case: Case
    chains: int
    draws: int
    context: Context = nullcontext


def bare(run: Run) -> None:
    """Forward and backward over minibatches drawn beforehand; gradients are freed, not zeroed."""
    case, module = run.case, run.case.module.train()
    generator = torch.Generator(device="cuda").manual_seed(0)
    per_epoch = case.n // case.batch_size
    for _ in range(run.chains):
        for step in range(run.draws):
            if step % per_epoch == 0:
                order = torch.randperm(case.n, generator=generator, device="cuda")
                batches = order[: per_epoch * case.batch_size].split(case.batch_size)
            chosen = batches[step % per_epoch]
            module.zero_grad(set_to_none=True)
            with run.context():
                loss = case.batch_loss(module(case.x[chosen]), case.y[chosen])
            loss.backward()
    module.zero_grad(set_to_none=True)


def ours(run: Run) -> str:
    case = run.case

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return case.batch_loss(module(batch[0]), batch[1])

    objective = Objective(case.module, loss, context=run.context)
    source = source_of(TensorDataset(case.x, case.y), case.batch_size, objective.device, 0)
    settings = ChainSettings(
        SGLD(lr=case.lr), run.chains, run.draws, 0, 1, nbeta=case.nbeta, localization=case.localization
    )
    return measure_llc(objective, source, settings).method


def devinterp1(run: Run) -> None:
    from devinterp.optim import SGMCMC
    from devinterp.slt.llc import LLCEstimator
    from devinterp.slt.sampler import sample

    case = run.case

    def evaluate(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with run.context():
            return case.batch_loss(model(batch[0]), batch[1])

    loader = DataLoader(
        TensorDataset(case.x.cpu(), case.y.cpu()), batch_size=case.batch_size, shuffle=True, drop_last=True
    )
    llc = LLCEstimator(run.chains, run.draws, init_loss=None, nbeta=case.nbeta, device="cuda")
    sample(
        case.module, loader, callbacks=[llc], evaluate=evaluate, sampling_method=SGMCMC.sgld,
        optimizer_kwargs={"lr": case.lr, "nbeta": case.nbeta, "localization": case.localization},
        num_draws=run.draws, num_chains=run.chains, num_burnin_steps=0, seed=0, verbose=False, device="cuda",
    )  # fmt: skip


def canonical(run: Run) -> None:
    from canonical_interp.slt import LLCEstimator

    case = run.case
    estimator = LLCEstimator(
        draws=run.draws, chains=run.chains, burnin_steps=0, steps_bw_draws=1, learning_rate=case.lr,
        localization=case.localization, nbeta=case.nbeta,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=case.batch_size, shuffle=True, drop_last=True)
    estimator.estimate_llc(
        case.module, loader, criterion_fn=case.batch_loss, seed=0, compile=False, show_progress=False, devices="cuda"
    )


PEERS = {"devinterp1": ("devinterp", devinterp1), "canonical-eager": ("canonical_interp", canonical)}


def clock(work: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds, the peak of memory beyond what was there, and what came back."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    said = work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before, said


def activation_bytes(run: Run) -> int:
    """Of one batch: forward and backward with all gradients held. Kernels are loaded and chosen on the way."""
    case, module = run.case, run.case.module.train()
    rows = slice(case.batch_size)

    def step() -> None:
        with run.context():
            loss = case.batch_loss(module(case.x[rows]), case.y[rows])
        loss.backward()

    for _ in range(3):
        step()
    peak = clock(step)[1]
    module.zero_grad(set_to_none=True)
    return peak


def row(run: Run, label: str, repeats: int, peers: bool) -> None:
    weights = 4 * sum(p.numel() for p in run.case.module.parameters())
    tools: dict[str, Callable[[Run], Any]] = {"bare": bare, "ours": ours}
    if peers:
        tools |= {name: tool for name, (package, tool) in PEERS.items() if importlib.util.find_spec(package)}
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    memory: dict[str, int] = {}
    path = ""
    activations = activation_bytes(run)
    for _ in range(repeats):
        for name, tool in tools.items():
            try:
                taken, peak, said = clock(lambda tool=tool: tool(run))  # type: ignore[misc]
            except Exception as error:  # a peer that does not take the case
                print(f"{label} {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            seconds[name].append(taken)
            memory[name] = peak
            path = said or path
    steps = run.chains * run.draws
    base = min(seconds["bare"])
    cells = [label, str(run.chains), path, f"{1000 * base / steps:.2f}"]
    for name in list(tools)[1:]:
        got = seconds[name]
        first = f"{base / got[0]:.2f}, {base / min(got):.2f}" if got else "failed"
        cells.append(
            f"{name} {first}, {(memory[name] - activations) / weights:.2f} copies" if got else f"{name} failed"
        )
    print(f"| {' | '.join(cells)} |", flush=True)


def compiling(case: Case, label: str, context: Context, steps: int = 30) -> None:
    """Seconds of compiling forward and backward, and of a step before and after."""
    module = case.module.train()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with context():
            return case.batch_loss(module(x), y)

    def loop(function: Callable[[Tensor, Tensor], Tensor], count: int) -> None:
        for k in range(count):
            rows = slice((k % 4) * case.batch_size, (k % 4 + 1) * case.batch_size)
            module.zero_grad(set_to_none=False)
            function(case.x[rows], case.y[rows]).backward()

    loop(loss, 3)
    compiled = torch.compile(loss)
    compile_seconds = clock(lambda: loop(compiled, 1))[0]
    turns = [(clock(lambda: loop(loss, steps))[0], clock(lambda: loop(compiled, steps))[0]) for _ in range(3)]
    eager, fast = (min(turn) / steps for turn in zip(*turns, strict=True))
    pays = compile_seconds / (eager - fast) if fast < eager else float("inf")
    cells = [label, f"{compile_seconds:.1f}", f"{1000 * eager:.2f}", f"{1000 * fast:.2f}", f"{eager / fast:.2f}"]
    print(f"| {' | '.join(cells)} | {pays:.0f} |", flush=True)
    module.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--draws", type=int, default=25, help="of the large model")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cases", nargs="*", choices=SPEED_CASES, default=list(SPEED_CASES))
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| case | chains | path | bare, ms a step | chain-steps/s of bare: first call, fastest; memory |")
    large = gpt2()
    for name, context in (("float32", nullcontext), ("bfloat16 autocast", bfloat16)):
        for chains in given.chains:
            row(Run(large, chains, given.draws, context), f"gpt2 {name}", given.repeats, given.peers and chains == 1)
    with tempfile.TemporaryDirectory(prefix="lightning-slt-bench-") as folder:
        small = {}
        for name in given.cases:
            SPEED_CASES[name](Path(folder))
            small[name] = to_gpu(load_case(Path(folder) / f"{name}.npz"))
    for name, case in small.items():
        row(Run(case, 8, 200), name, given.repeats, given.peers)
    if given.compile:
        print("| case | compiling, s | eager step, ms | compiled, ms | ratio | steps until it pays |")
        for name in [name for name in ("mlp64", "transformer64") if name in small]:
            compiling(small[name], name, nullcontext, 200)
        compiling(large, "gpt2 bfloat16", bfloat16)
        compiling(large, "gpt2 float32", nullcontext)


if __name__ == "__main__":
    main()
