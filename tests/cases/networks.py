"""The small trained networks of the cases: an MLP, a convnet with BatchNorm, an LSTM and a transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConvNet", "SequenceClassifier", "TinyTransformer", "mlp"]


def mlp() -> nn.Module:
    """The MLP 64-128-128-10 with ReLU: 26,122 weights."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, of the shape of x."""
        hidden = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(x + self.second_norm(self.second(hidden)))


class ConvNet(nn.Module):
    """ResNet-style: a stem of stride 2, two residual blocks, mean over the image, linear. Images ``[batch, 64]``."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(ResidualBlock(channels), ResidualBlock(channels))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, 10]``."""
        hidden = torch.relu(self.stem_norm(self.stem(x.view(-1, 1, 8, 8))))
        return self.head(self.blocks(hidden).mean(dim=(2, 3)))


class SequenceClassifier(nn.Module):
    """An LSTM over the 8 rows of an image; the last output is classified. Images ``[batch, 64]``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, 10]``."""
        output, _ = self.lstm(x.view(-1, 8, 8))
        return self.head(output[:, -1])


class TinyTransformer(nn.Module):
    """Pre-norm causal transformer with SDPA; tokens ``[batch, length]`` in, logits of the next ones out."""

    def __init__(
        self, vocabulary: int = 16, length: int = 12, width: int = 16, heads: int = 2, layers: int = 1, mlp: int = 4
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads, mlp) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, length, vocabulary]``."""
        hidden = self.token(tokens) + self.position[: tokens.shape[1]]
        return self.unembed(self.norm(self.blocks(hidden)))


class TransformerBlock(nn.Module):
    """Causal attention, then a GELU MLP ``mlp`` times as wide, each added to its input."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp * width), nn.GELU(), nn.Linear(mlp * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output, of the shape of hidden."""
        batch, length, width = hidden.shape
        mixed = self.query_key_value(self.norm_attention(hidden))
        query, key, value = mixed.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.mlp(self.norm_mlp(hidden))
