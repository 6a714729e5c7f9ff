"""What a stretch of steps showed, written down."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_slt.sampling.segment import Segment

SPECTRUM = [4.0, 4.0, 3.0, 2.0, 2.0, 1.5, 1.0, 1.0, 1.0, 1.0]


def segment(
    grad_square: float,
    grad_dot: float,
    square: float,
    chains: int = 2,
    difference: float = 1.0,
    noise_square: float | None = None,
) -> Segment:
    def table(value: float) -> Tensor:
        return torch.full((chains, 3), value, dtype=torch.float64)

    return Segment(
        list(range(chains)),
        table(difference),
        table(grad_square),
        table(grad_dot),
        table(square),
        {(0, 0, 0): 0.0},
        noise_square=table(noise_square) if noise_square is not None else None,
    )
