"""Standard normal numbers for the chains, a stream for each.

The noise of a step is most of what a chain costs beyond its gradient on a small model, and on the CPU it is the
logarithm and the cosine of torch's generator that take the time. :class:`TableNormal` looks the numbers up: 16 random
bits choose one of 65,536 values, the means of the normal distribution over as many intervals of equal probability.

Why that is enough: the error of a Langevin step of size epsilon is of order epsilon whatever the distribution of its
noise, as long as its first three moments are those of the normal one and the fourth is finite (Kloeden and Platen,
Numerical Solution of Stochastic Differential Equations, 1992, section 14.1: even two values would do). Here the odd
moments are exactly 0, the second is 1, and the fourth and sixth are 2.9998 and 14.99 in place of 3 and 15; no number
is beyond 4.39. A sampler that accepts and rejects needs the normal density itself, and gets it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from lightning_slt.sampling.rng import derive_seed, generator

INTERVALS = 2**16


class NormalStream:
    """Numbers of torch's own generator.

    Args:
        key: what the stream is known by, such as ``(seed, chain, NOISE)``: the same key gives the same numbers.
        device: where the tensors to fill are.
    """

    def __init__(self, *key: int, device: torch.device | str = "cpu") -> None:
        self._generator = generator(*key, device=device)

    def fill_(self, out: Tensor) -> Tensor:
        """The next numbers of the stream, put in place; ``out`` is returned."""
        return out.normal_(generator=self._generator)


class TableNormal(NormalStream):
    """Numbers looked up with the bits of NumPy's SFC64: about half of the time of torch's on a CPU core.

    Example:
        >>> stream = TableNormal(0, 1)
        >>> x = stream.fill_(torch.empty(100_000))
        >>> bool(x.mean().abs() < 0.02), bool((x.std() - 1).abs() < 0.02)
        (True, True)
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.SFC64(derive_seed(*key))
        self._table = normal_table()

    def fill_(self, out: Tensor) -> Tensor:
        """As of the parent; ``out`` is contiguous float32 on the CPU."""
        flat = out.detach().view(-1).numpy()
        chosen = self._bits.random_raw(-(-len(flat) // 4)).astype("<u8", copy=False).view("<u2")[: len(flat)]
        # not the default mode, which fills a buffer first
        np.take(self._table, chosen, out=flat, mode="wrap")
        return out


def normal_stream(*key: int, device: torch.device, dtype: torch.dtype, exact: bool = False) -> NormalStream:
    """The fastest stream for tensors of this kind.

    Args:
        exact: the density of the numbers is to be the normal one, not only their moments.
    """
    if device.type == "cpu" and dtype == torch.float32 and not exact:
        return TableNormal(*key)
    return NormalStream(*key, device=device)


@lru_cache(maxsize=1)
def normal_table() -> np.ndarray:
    """``[INTERVALS]`` float32, ascending: the mean of z over each interval of equal probability, of variance 1.

    The mean over the interval (a, b) of probability 1/N is N (phi(a) - phi(b)), phi the normal density.
    """
    edges = ndtri(np.arange(INTERVALS + 1) / INTERVALS)
    density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
    means = INTERVALS * (density[:-1] - density[1:])
    means = (means - means[::-1]) / 2  # odd to the last bit
    return (means / np.sqrt(np.mean(means**2))).astype(np.float32)
