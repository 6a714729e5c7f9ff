"""The cases every runner measures: torch and numpy only, so that this file works in each peer's own environment.

A case is one ``.npz`` file (written by ``exports.py``) with the weights under study as ``w.<parameter name>``, the
data as ``x`` and ``y``, and the settings of the local posterior. ``load_case`` gives back a module that holds the
weights, the data as tensors and the loss, in two forms: the mean over a batch, and one number per sample (devinterp 2
wants those).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SEQUENCE_LENGTH = 32
VOCABULARY = 64
WIDTH = 64
IMAGE_SIDE = 28


class Block(nn.Module):
    """One pre-norm transformer block: causal attention through SDPA, then a GELU MLP four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        mixed = self.query_key_value(self.norm_attention(hidden))
        query, key, value = mixed.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.mlp(self.norm_mlp(hidden))


class Transformer(nn.Module):
    """A causal language model; tokens ``[batch, length]`` in, logits ``[batch, length, vocabulary]`` out."""

    def __init__(
        self,
        vocabulary: int = VOCABULARY,
        length: int = SEQUENCE_LENGTH,
        width: int = WIDTH,
        heads: int = 4,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.norm(self.blocks(self.token(tokens) + self.position[: tokens.shape[1]])))


def convnet(channels: tuple[int, ...]) -> nn.Sequential:
    """Padded 3x3 convolutions with ReLU and max pooling, then a linear layer; images ``[batch, 1, 28, 28]``."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((1, *channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    side = IMAGE_SIDE // 2 ** len(channels)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, 10))


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def deep_linear(sizes: tuple[int, ...]) -> nn.Sequential:
    """A product of matrices (reduced-rank regression when there are two)."""
    return nn.Sequential(*[nn.Linear(i, o, bias=False) for i, o in pairwise(sizes)])


def build_module(kind: str, sizes: tuple[int, ...]) -> nn.Module:
    """The untrained module of a case; ``sizes``: layer widths or channels, or what :class:`Transformer` takes."""
    if kind == "transformer":
        return Transformer(*sizes)
    if kind == "convnet":
        return convnet(sizes)
    if kind == "mlp":
        return mlp(sizes)
    if kind == "linear":
        return deep_linear(sizes)
    raise ValueError(f"no case is of kind {kind!r}: transformer, convnet, mlp, linear")


def next_token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of every next token, ``[batch, length - 1]``."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


def half_square_losses(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared error of each sample: the negative log likelihood of unit-variance noise, less its constant."""
    return 0.5 * (output - target).square().sum(-1)


def cross_entropy_losses(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def half_square_loss(output: Tensor, target: Tensor) -> Tensor:
    return half_square_losses(output, target).mean()


SampleLoss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[SampleLoss, SampleLoss]] = {
    "transformer": (next_token_loss, next_token_losses),
    "convnet": (F.cross_entropy, cross_entropy_losses),
    "mlp": (F.cross_entropy, cross_entropy_losses),
    "linear": (half_square_loss, half_square_losses),
}


@dataclass(frozen=True)
class Case:
    """One problem at one batch size, with the local posterior to sample."""

    name: str
    kind: str
    module: nn.Module
    x: Tensor
    y: Tensor
    batch_size: int
    nbeta: float
    localization: float
    lr: float
    batch_loss: SampleLoss
    """(output, target) -> the mean over the batch."""
    sample_losses: SampleLoss
    """(output, target) -> one loss per sample, or per token of each sample."""

    @property
    def n(self) -> int:
        return len(self.x)


def default_nbeta(n: int) -> float:
    return n / math.log(n)


def load_case(path: Path) -> Case:
    """Read what ``exports.py`` wrote."""
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files}
    kind = str(arrays["kind"])
    module = build_module(kind, tuple(int(size) for size in arrays["sizes"]))
    module.load_state_dict({key[2:]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith("w.")})
    batch_loss, sample_losses = LOSSES[kind]
    return Case(
        name=path.stem,
        kind=kind,
        module=module,
        x=torch.from_numpy(arrays["x"]),
        y=torch.from_numpy(arrays["y"]),
        batch_size=int(arrays["batch_size"]),
        nbeta=float(arrays["nbeta"]),
        localization=float(arrays["localization"]),
        lr=float(arrays["lr"]),
        batch_loss=batch_loss,
        sample_losses=sample_losses,
    )
