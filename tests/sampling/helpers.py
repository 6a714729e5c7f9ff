"""Small modules, ranks that live in threads, and chains without an estimate around them."""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_slt.functional import LocalPosterior
from lightning_slt.sampling.anchor import open_window
from lightning_slt.sampling.batches import DatasetSource, MinibatchSource
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.collective import Alone, Collective
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.samplers import SGLD
from tests.cases.problems import regular
from tests.sampling.segments import SPECTRUM

T = TypeVar("T")

CPU = torch.device("cpu")


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(make: Callable[[], T], seed: int = 0) -> T:
    """What ``make`` builds with the global generator at ``seed``, which is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


_MLP = seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))  # built once: ranks are threads


def mean_squared(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return 0.5 * (module(x) - y).square().sum(-1).mean()


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(module(x), y)


def mlp() -> nn.Module:
    return copy.deepcopy(_MLP)


def regression(n: int = 96, inputs: int = 5, outputs: int = 3) -> TensorDataset:
    return TensorDataset(torch.randn(n, inputs, generator=gen(1)), torch.randn(n, outputs, generator=gen(2)))


def numbered(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(n), torch.arange(n) * 10)


def uses(source: MinibatchSource, windows: int = 1) -> Counter[int]:
    """How often each sample is seen in the first windows."""
    counts: Counter[int] = Counter()
    for k in range(windows):
        for batch in source.window(k).batches:
            counts.update(batch[0].tolist())
    return counts


def classification(shape: Sequence[int], classes: int = 4, n: int = 48) -> TensorDataset:
    return TensorDataset(torch.randn(n, *shape, generator=gen(3)), torch.randint(classes, (n,), generator=gen(4)))


def tokens(length: int = 6, vocabulary: int = 11, n: int = 48) -> TensorDataset:
    x = torch.randint(vocabulary, (n, length + 1), generator=gen(5))
    return TensorDataset(x[:, :-1], x[:, 1:])


def next_token(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(module(x).flatten(0, 1), y.flatten())


class Attention(nn.Module):
    """One causal block with F.scaled_dot_product_attention."""

    def __init__(self, vocabulary: int = 11, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, dim=-1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.norm(h + out.transpose(1, 2).flatten(-2)))


class Tied(nn.Module):
    """The head is the embedding's own parameter."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)).tanh())


class Scaled(nn.Module):
    """Outputs times a learned temperature: a weight without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.temperature


class Recurrent(nn.Module):
    def __init__(self, inputs: int = 4, classes: int = 4) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, 6, batch_first=True)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Conv(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module], classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Scripted(nn.Module):
    """A ScriptModule inside: its deepcopy is a clone that still hangs on the original's autograd graph."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.first = torch.jit.script(nn.Linear(5, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


class WithMetric(LightningModule):
    """Logs a loss and a torchmetric in its step, as many users do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 4)
        self.accuracy = MulticlassAccuracy(4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        self.log("acc", self.accuracy(logits, y), on_step=True, on_epoch=True)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("loss", loss, prog_bar=True)
        return loss


def make_chains(
    module: nn.Module,
    data: TensorDataset,
    loss_fn: Any,
    *,
    batch_size: int = 16,
    num_chains: int = 4,
    seed: int = 0,
    nbeta: float = 20.0,
    gamma: float = 1.0,
    method: str = "sequential",
    collective: Collective | None = None,
    source: MinibatchSource | None = None,
    restrict: Any = None,
    sampler: Any = None,
) -> Chains:
    objective = Objective(module, loss_fn, restrict)
    source = source or DatasetSource(data, batch_size, seed=seed)
    open_window(objective, source)
    posterior = LocalPosterior(nbeta, gamma)
    return Chains(objective, source, posterior, sampler or SGLD(), num_chains, seed, collective or Alone(), method)


class _ThreadRank:
    """One of several ranks in threads of this process; work is done by one rank at a time."""

    def __init__(self, rank: int, world_size: int, shared: _Shared) -> None:
        self.rank, self.world_size, self._shared = rank, world_size, shared

    def exchange(self, work: Callable[[], T]) -> list[T]:
        with self._shared.lock:
            self._shared.results[self.rank] = work()
        self._shared.barrier.wait(timeout=60)
        results: list[T] = list(self._shared.results)
        self._shared.barrier.wait(timeout=60)
        return results


class _Shared:
    def __init__(self, world_size: int) -> None:
        self.lock = threading.Lock()
        self.barrier = threading.Barrier(world_size)
        self.results: list[Any] = [None] * world_size


def on_ranks(world_size: int, work: Callable[[Collective], T]) -> list[T]:
    """What ``work`` returns on each of ``world_size`` ranks."""
    shared = _Shared(world_size)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(_ThreadRank(rank, world_size, shared))
        except BaseException as error:
            errors.append(error)
            shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class Stream(IterableDataset[Any]):
    def __init__(self, n: int = 20) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.n).unsqueeze(1))


def opened(noise: float = 0.0, seed: int = 0, gamma: float = 1.0) -> Chains:
    """Of a regular model with the curvatures ``SPECTRUM``."""
    case = regular(n=400, eigenvalues=SPECTRUM, noise=noise)
    source = DatasetSource(case.dataset, 64, seed=seed)
    return make_chains(
        case.module,
        case.dataset,
        case.loss_fn,
        source=source,
        num_chains=8,
        nbeta=case.nbeta,
        gamma=gamma,
        seed=seed,
        method="batched",
    )
