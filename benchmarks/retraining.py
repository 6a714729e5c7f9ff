"""The retraining test: does a predicted influence say how a loss changes when training samples are left out?

Linear datamodelling score (Park et al. 2023, arXiv 2303.14186): the same small network is trained on random halves of
the training data, several times each; for every query the summed influence of the half's samples is ranked against the
loss the retrained networks have, and Spearman's correlation is averaged over the queries. All the networks are trained
at once as one batched product, by gradients written out by hand: a thousand of them take a minute on one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIZES = (64, 32, 10)
TRAIN, QUERIES = 800, 200
EPOCHS, BATCH_SIZE = 40, 64
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-3
AT_ONCE = 100
"""Networks whose losses are computed together."""

Weights = list[Tensor]
"""``[networks, 64, 32]``, ``[networks, 1, 32]``, ``[networks, 32, 10]``, ``[networks, 1, 10]``."""


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits: training samples, of which some have a wrong label, and queries with right ones."""

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor
    flipped: Tensor


def flip_labels(y: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels of which a share is wrong, and which ones are (bool)."""
    wrong = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    labels, flipped = y.clone(), torch.zeros(len(y), dtype=torch.bool)
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    flipped[wrong] = True
    return labels, flipped


def load_digits(num_train: int, num_queries: int, flipped: float, seed: int = 0) -> Digits:
    """A random part of the digits; pixels in [0, 1]."""
    from sklearn.datasets import load_digits as load

    digits = load()
    x, y = torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, query = order[:num_train], order[num_train : num_train + num_queries]
    labels, wrong = flip_labels(y[train], flipped, generator)
    return Digits(x[train], labels, x[query], y[query], wrong)


def _initial(networks: int, generator: torch.Generator) -> Weights:
    """As ``nn.Linear`` begins: uniform within one over the square root of the inputs."""
    weights = []
    for inputs, outputs in pairwise(SIZES):
        for rows in (inputs, 1):
            draw = torch.rand(networks, rows, outputs, generator=generator)
            weights.append((2 * draw - 1) / inputs**0.5)
    return weights


def _forward(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden layer and logits of every network, ``x`` being ``[networks, batch, 64]``."""
    w1, b1, w2, b2 = weights
    hidden = torch.baddbmm(b1, x, w1).clamp_min_(0)
    return hidden, torch.baddbmm(b2, hidden, w2)


def _gradients(weights: Weights, x: Tensor, y: Tensor) -> Weights:
    """Of the mean cross-entropy."""
    hidden, logits = _forward(weights, x)
    error = torch.softmax(logits, -1)
    error.scatter_add_(2, y.unsqueeze(-1), -torch.ones(*y.shape, 1))
    error /= y.shape[1]
    back = torch.bmm(error, weights[2].transpose(1, 2)) * (hidden > 0)
    return [
        torch.bmm(x.transpose(1, 2), back),
        back.sum(1, keepdim=True),
        torch.bmm(hidden.transpose(1, 2), error),
        error.sum(1, keepdim=True),
    ]


def train(
    x: Tensor, y: Tensor, samples: Tensor, seed: int, epochs: int = EPOCHS, weight_decay: float = WEIGHT_DECAY
) -> Weights:
    """SGD with momentum, weight decay and a cosine schedule; network m sees ``samples[m]``, in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    networks, n = samples.shape
    weights = _initial(networks, generator)
    velocities = [torch.zeros_like(w) for w in weights]
    steps, step = epochs * -(-n // BATCH_SIZE), 0
    for _ in range(epochs):
        order = torch.gather(samples, 1, torch.argsort(torch.rand(networks, n, generator=generator), 1))
        for chosen in order.split(BATCH_SIZE, dim=1):
            rate = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * step / steps))
            step += 1
            for w, v, g in zip(weights, velocities, _gradients(weights, x[chosen], y[chosen]), strict=True):
                v.mul_(MOMENTUM).add_(g).add_(w, alpha=weight_decay)
                w.add_(v, alpha=-rate)
    return weights


def losses(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    """``[networks, samples]``."""

    def parts() -> Iterator[Tensor]:
        for k in range(0, len(weights[0]), AT_ONCE):
            part = [w[k : k + AT_ONCE] for w in weights]
            logits = _forward(part, x.expand(len(part[0]), -1, -1))[1]
            yield F.cross_entropy(logits.transpose(1, 2), y.expand(len(logits), -1), reduction="none")

    return torch.cat(list(parts()))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Centred ranks along the first axis, of unit length (no ties in losses)."""
    ranks = values.argsort(axis=0).argsort(axis=0).astype(np.float64)
    ranks -= ranks.mean(axis=0)
    return ranks / np.linalg.norm(ranks, axis=0)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the columns of Spearman's correlation."""
    return float((_ranks(a) * _ranks(b)).sum(axis=0).mean())


@dataclass(frozen=True)
class Retrained:
    """What the retrained networks have shown.

    Attributes:
        member: ``[subsets, train]``, 1 where the sample was trained on.
        loss: ``[subsets, seeds, queries]``.
    """

    member: np.ndarray
    loss: np.ndarray

    @staticmethod
    def of(data: Digits, subsets: int, seeds: int) -> Retrained:
        """Train ``subsets * seeds`` networks on random halves."""
        n = len(data.x)
        generator = torch.Generator().manual_seed(7)
        halves = torch.stack([torch.randperm(n, generator=generator)[: n // 2] for _ in range(subsets)])
        weights = train(data.x, data.y, halves.repeat_interleave(seeds, dim=0), seed=99)
        loss = losses(weights, data.query_x, data.query_y).view(subsets, seeds, -1)
        member = torch.zeros(subsets, n).scatter_(1, halves, 1.0)
        return Retrained(member.double().numpy(), loss.double().numpy())

    def lds(self, influence: np.ndarray) -> float:
        """The score of a matrix ``[queries, train]`` whose positive entries say "lowers the loss"."""
        if not np.isfinite(influence).all():
            return float("nan")
        return spearman(self.member @ influence.astype(np.float64).T, -self.loss.mean(axis=1))

    def ceiling(self) -> float:
        """The score of a perfect prediction: the measured losses still hold the noise of the seeds (Spearman-Brown)."""
        half = spearman(self.loss[:, ::2].mean(axis=1), self.loss[:, 1::2].mean(axis=1))
        return float((2 * half / (1 + half)) ** 0.5)


def write_cases(folder: Path, name: str, data: Digits, models: int) -> list[Path]:
    """Networks trained on all the data, one ``.npz`` for the runners of each."""
    weights = train(data.x, data.y, torch.arange(len(data.x)).expand(models, -1), seed=5)
    paths = []
    for k in range(models):
        paths.append(folder / f"{name}-{k}.npz")
        np.savez(
            paths[-1],
            sizes=np.array(SIZES),
            x=data.x.numpy(),
            y=data.y.numpy(),
            query_x=data.query_x.numpy(),
            query_y=data.query_y.numpy(),
            **{
                f"w.{2 * i}.{kind}": weights[2 * i + bias][k]
                .T.reshape(-1 if bias else SIZES[i + 1], *([] if bias else [SIZES[i]]))
                .numpy()
                for i in range(2)
                for bias, kind in enumerate(("weight", "bias"))
            },
        )
    return paths
