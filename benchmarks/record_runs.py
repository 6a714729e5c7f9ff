"""Small real training runs with known boundaries: ``python benchmarks/record_runs.py --out runs``.

Each run is trained from scratch, stopped at 40 to 120 moments for an estimate of the learning coefficient, and written
as one ``FAMILY_sSEED.npz``: ``steps, llc, llc_se, loss, valid, comparable`` by point, and the boundaries in training
steps, ``true_on, true_step, true_off`` (10, 50 and 90 % of the change), with ``true_kind`` (A: the LLC rises, B: it
falls). The boundaries come from the weights or the task, never from an estimate:

- ``deep_linear``: two or three linear layers learn a teacher's singular modes; a boundary is a mode being learned.
  Modes of three layers often overlap.
- ``superposition``: the toy model of `examples/superposition.py` goes from one arrangement of columns to the next.
- ``modular``: a sum modulo a prime is memorised, and in some runs generalises: the rise of the test accuracy.
- ``induction``: two attention layers learn to copy a repeated half: the fall of the loss on that half.

Runs differ by seed in size, learning rate, spacing of the points, localisation, and in whether neighbouring points
share their noise (three of four). ``python benchmarks/transitions.py --runs runs`` scores the detectors on them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from superposition import SETTLED, ColumnRecorder, Superposition, sparse_inputs

from lightning_slt import estimate_llc
from lightning_slt.sampling.samplers import SGLD

Boundary = tuple[Sequence[float], str]


@dataclass
class Run:
    """A training run and how it is measured.

    Attributes:
        module, data, loss_fn: as ``estimate_llc`` takes them.
        train_step: makes one step of training.
        watch: called after each, with its number, to remember what tells the boundaries.
        boundaries: onset, middle and end of each, with its kind, once the run is over.
        steps: those after which the coefficient is estimated.
        nbeta, localization, lr, batch_size, num_chains, num_draws, num_burnin_steps: of the chains.
        paired: whether all points share their noise.
    """

    module: nn.Module
    data: TensorDataset
    loss_fn: Callable[[nn.Module, Any], Tensor]
    train_step: Callable[[], None]
    watch: Callable[[int], None]
    boundaries: Callable[[], list[Boundary]]
    steps: list[int]
    nbeta: float
    localization: float
    lr: float
    paired: bool
    batch_size: int
    num_chains: int = 4
    num_draws: int = 60
    num_burnin_steps: int = 50


def moments(rng: np.random.Generator, last: int, num: int) -> list[int]:
    """Steps of the estimates: even, with uneven gaps, or even in the logarithm."""
    kind = rng.integers(3)
    if kind == 0:
        places = np.linspace(0, last, num)
    elif kind == 1:
        places = np.cumsum(rng.uniform(0.3, 1.7, num))
        places = places / places[-1] * last
    else:
        places = np.concatenate([[0], np.geomspace(max(5, last / 200), last, num - 1)])
    return sorted({int(place) for place in places})


def crossings(values: np.ndarray, start: float, end: float) -> list[Optional[int]]:
    """First index at which values had gone 10, 50 and 90 % of the way from ``start`` to ``end``."""
    way = (values - start) / (end - start)
    return [int(np.argmax(way >= share)) if (way >= share).any() else None for share in (0.1, 0.5, 0.9)]


def whole(places: list[Optional[int]], kind: str) -> list[Boundary]:
    """The boundary with these crossings, where there are all three; steps count from 1."""
    return [([place + 1 for place in places if place is not None], kind)] if None not in places else []


def sgd_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def deep_linear(seed: int) -> Run:
    rng = np.random.default_rng([11, seed])
    torch.manual_seed(seed)
    width, layers, n = 8, int(rng.choice([2, 2, 3])), 256
    num_modes = int(rng.integers(2, 5))
    strengths = np.sort(rng.uniform(0.7, 5, num_modes))[::-1].copy()
    for i in range(1, num_modes):
        strengths[i] = min(strengths[i], strengths[i - 1] / rng.uniform(1.25, 2.0))
    left, right = (torch.linalg.qr(torch.randn(width, width)).Q[:, :num_modes] for _ in range(2))
    x = torch.randn(n, width)
    y = x @ right @ torch.diag(torch.tensor(strengths, dtype=torch.float32)) @ left.T + 0.1 * torch.randn(n, width)
    init = 1e-3 if layers == 2 else 0.12
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    for layer in net:
        nn.init.normal_(layer.weight, std=init)  # type: ignore[arg-type]
    lr = 5e-3 if layers == 2 else 8e-3
    learned: list[np.ndarray] = []

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return (module(batch[0]) - batch[1]).square().sum(1).mean() / 2

    def watch(_: int) -> None:
        product = net[0].weight.detach()
        for layer in net[1:]:
            product = layer.weight.detach() @ product  # type: ignore[operator]
        learned.append(torch.einsum("im,ij,jm->m", left, product, right).numpy())

    def boundaries() -> list[Boundary]:
        found: list[Boundary] = []
        for mode, strength in enumerate(strengths):
            onset, middle, end = crossings(np.array(learned)[:, mode], 0.0, strength)
            if middle is not None and onset is not None:
                found.append(([onset + 1, middle + 1, (len(learned) - 1 if end is None else end) + 1], "A"))
        return found

    if layers == 2:
        last = int(1.35 * math.log(strengths[-1] / (init**2 * 4)) / (2 * strengths[-1]) / lr)
    else:
        last = int(rng.integers(1200, 3000))
    nbeta = n / math.log(n)
    localization = 2 * nbeta * strengths[0] if seed % 3 != 2 else 20.0 * rng.uniform(1, 10)
    num = int(rng.choice([60, 80, 120]))
    return Run(
        net, TensorDataset(x, y), loss_fn,
        sgd_step(torch.optim.SGD(net.parameters(), lr=lr), lambda: loss_fn(net, (x, y))), watch, boundaries,
        steps=moments(rng, min(last, 6000), num), nbeta=nbeta, localization=localization,
        lr=0.25 / max(localization, nbeta * 2 * strengths[0]), paired=seed % 4 != 3, batch_size=64,
    )  # fmt: skip


def superposition(seed: int) -> Run:
    rng = np.random.default_rng([12, seed])
    torch.manual_seed(seed)
    features = int(rng.choice([5, 6, 6, 7]))
    module = Superposition(features, 10 ** rng.uniform(-3.3, -1.5), 0.1)
    data = sparse_inputs(1000, features)
    x, generator, recorder = data.tensors[0], torch.Generator().manual_seed(seed), ColumnRecorder()

    def loss_fn(net: Any, batch: Any) -> Tensor:
        return (relu(batch[0] @ net.weight.T @ net.weight + net.bias) - batch[0]).square().sum(1).mean()

    last, num = int(rng.integers(1200, 3000)), int(rng.choice([75, 100]))
    nbeta = 1000 / math.log(1000)
    curvature = nbeta * 4 / (3 * features)
    localization = 2 * curvature * (1.0 if seed % 3 != 2 else 0.1)

    def boundaries() -> list[Boundary]:
        phases = recorder.phases(SETTLED * last // num)
        kinds = ["A" if len(b.corners) >= len(a.corners) else "B" for a, b in pairwise(phases)]
        known = recorder.known(phases)
        return [([k.onset, k.step, k.end], kind) for k, kind in zip(known, kinds, strict=False)]

    return Run(
        module, data, loss_fn,
        sgd_step(
            torch.optim.SGD(module.parameters(), lr=0.1),
            lambda: loss_fn(module, (x[torch.randint(1000, (100,), generator=generator)],)),
        ),
        lambda _: recorder.weights.append(module.weight.detach().clone()), boundaries,
        steps=moments(rng, last, num), nbeta=nbeta, localization=localization,
        lr=0.15 / max(localization, curvature), paired=seed % 4 != 3, batch_size=100,
    )  # fmt: skip


def modular(seed: int) -> Run:
    rng = np.random.default_rng([13, seed])
    torch.manual_seed(seed)
    prime, embedding, width = int(rng.choice([17, 23])), 24, 96
    pairs = torch.cartesian_prod(torch.arange(prime), torch.arange(prime))
    sums, order, n = pairs.sum(1) % prime, torch.randperm(prime * prime), int(0.7 * prime * prime)
    train, test = order[:n], order[n:]
    net = nn.Sequential(
        nn.Embedding(prime, embedding),
        nn.Flatten(),
        nn.Linear(2 * embedding, width),
        nn.ReLU(),
        nn.Linear(width, prime),
    )
    decay = float(rng.choice([0.5, 1.0, 2.0]))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=decay, betas=(0.9, 0.98))
    accuracy: list[float] = []

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module(batch[0]), batch[1])

    def watch(_: int) -> None:
        with torch.no_grad():
            accuracy.append(float((net(pairs[test]).argmax(1) == sums[test]).float().mean()))

    def boundaries() -> list[Boundary]:
        values = np.array(accuracy)
        return whole(crossings(np.convolve(values, np.ones(9) / 9, "same"), values[:20].mean(), 1.0), "B")

    last, num = int(rng.integers(800, 1600)), int(rng.choice([40, 60]))
    return Run(
        net, TensorDataset(pairs[train], sums[train]), loss_fn,
        sgd_step(optimizer, lambda: loss_fn(net, (pairs[train], sums[train]))), watch, boundaries,
        steps=moments(rng, last, num), nbeta=n / math.log(n), localization=10.0, lr=2e-3, paired=seed % 4 != 3,
        batch_size=128, num_chains=2, num_draws=40,
    )  # fmt: skip


class Attention(nn.Module):
    """Two attention layers without products between them, causal; ``[batch, length]`` tokens to logits."""

    mask: Tensor

    def __init__(self, vocab: int, length: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocab, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width, bias=False) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(2)])
        self.norm = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.unembedding = nn.Linear(width, vocab, bias=False)
        self.register_buffer("mask", torch.full((length, length), -1e9).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        batch, length, width = x.shape
        for qkv, out, norm in zip(self.qkv, self.out, self.norm, strict=False):
            q, k, v = (z.view(batch, length, self.heads, -1).transpose(1, 2) for z in qkv(norm(x)).chunk(3, -1))
            weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + self.mask[:length, :length]).softmax(-1)
            x = x + out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return self.unembedding(self.norm[2](x))


def induction(seed: int) -> Run:
    rng = np.random.default_rng([14, seed])
    torch.manual_seed(seed)
    vocab, half, n = int(rng.choice([10, 14])), 8, 1024
    generator = torch.Generator().manual_seed(seed)

    def draw(num: int) -> Tensor:
        # uneven frequencies in every other run: they are learned before
        shares = torch.ones(vocab) if seed % 2 else 1 / torch.arange(1, vocab + 1).float()
        first = torch.multinomial(shares, num * half, True, generator=generator).view(num, half)
        return torch.cat([first, first], 1)

    data, probe = draw(n), draw(96)
    net = Attention(vocab, 2 * half, 24, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=float(rng.choice([2e-3, 3e-3])), weight_decay=0.01)
    repeated: list[float] = []  # loss on the half that can be copied

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())

    def watch(step: int) -> None:
        if step % 4 != 1:
            repeated.append(repeated[-1])
            return
        with torch.no_grad():
            logits = net(probe)[:, half:-1]
            repeated.append(float(cross_entropy(logits.flatten(0, 1), probe[:, half + 1 :].flatten())))

    def boundaries() -> list[Boundary]:
        smooth = np.convolve(np.pad(np.array(repeated), 7, "edge"), np.ones(15) / 15, "valid")
        plateau = float(np.median(smooth[30:90]))
        return whole(crossings(-smooth, -plateau, -smooth[-30:].mean()), "A") if plateau - smooth[-1] > 0.3 else []

    last = int(rng.integers(500, 900))
    return Run(
        net, TensorDataset(data), loss_fn, sgd_step(optimizer, lambda: loss_fn(net, (draw(48),))), watch, boundaries,
        steps=moments(rng, last, 50), nbeta=n / math.log(n), localization=100.0, lr=5e-4, paired=seed % 4 != 3,
        batch_size=32, num_chains=2, num_draws=24, num_burnin_steps=24,
    )  # fmt: skip


def record(run: Run) -> dict[str, np.ndarray]:
    """Trains and measures; the arrays of the file."""
    points, done = [], 0
    for i, step in enumerate(run.steps):
        while done < step:
            run.train_step()
            done += 1
            run.watch(done)
        e = estimate_llc(
            run.module, run.data, run.loss_fn, sampler=SGLD(lr=run.lr), nbeta=run.nbeta, localization=run.localization,
            num_chains=run.num_chains, num_draws=run.num_draws, num_burnin_steps=run.num_burnin_steps,
            num_steps_bw_draws=1, batch_size=run.batch_size, seed=0 if run.paired else 1000 + i, method="batched",
        )  # fmt: skip
        points.append((step, e.mean, e.chain_se, e.init_loss, e.valid, e.comparable))
    steps, llc, llc_se, loss, valid, comparable = np.array(points, dtype=np.float64).T
    boundaries = run.boundaries()
    onset, middle, end = np.array([places for places, _ in boundaries], dtype=np.float64).reshape(-1, 3).T
    return {
        "steps": steps, "llc": llc, "llc_se": llc_se, "loss": loss, "valid": valid > 0, "comparable": comparable > 0,
        "true_on": onset, "true_step": middle, "true_off": end, "true_kind": np.array([kind for _, kind in boundaries]),
    }  # fmt: skip


FAMILIES: dict[str, Callable[[int], Run]] = {
    "deep_linear": deep_linear,
    "superposition": superposition,
    "modular": modular,
    "induction": induction,
}

#: What the figures of benchmarks/README.md are of; a quarter of an hour or so on one core.
RUNS = (
    *("deep_linear:60:85", "superposition:60:78", "modular:60:66", "induction:60:68"),
    *("deep_linear:100:120", "superposition:100:115", "modular:100:105", "induction:100:106"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the files; runs that are there are left out")
    parser.add_argument("--runs", nargs="+", default=RUNS, help="family:first:last, last not counted")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for asked in given.runs:
        family, first, last = asked.split(":")
        for seed in range(int(first), int(last)):
            path = given.out / f"{family}_s{seed}.npz"
            if path.exists():
                continue
            start = time.perf_counter()
            arrays = record(FAMILIES[family](seed))
            np.savez(path, **arrays)  # type: ignore[arg-type]
            what = f"{arrays['steps'].size} points, boundaries at {arrays['true_step'].tolist()}"
            print(f"{path.name}: {what}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
