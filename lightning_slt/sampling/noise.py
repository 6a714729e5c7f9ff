"""Standard normal numbers for the chains, a stream for each.

The noise of a step is most of what a chain costs beyond its gradient on a small model, and on the CPU it is the
logarithm and the cosine of torch's generator that take the time. :class:`TableNormal` looks the numbers up, four at
once: 16 random bits choose one of 65,536 rows. Each column of the rows holds the means of the normal distribution over
as many intervals of equal probability, in an order of its own, so that the rows lie in four dimensions as the points of
a lattice (a rank-1 lattice of Korobov's kind; Niederreiter, Random Number Generation and Quasi-Monte Carlo Methods,
1992, chapter 5).

Why that is enough: the error of a Langevin step of size epsilon is of order epsilon whatever the distribution of its
noise, as long as its moments up to the third, those of several weights together included, are those of the normal one
and the fourth are finite (Kloeden and Platen, Numerical Solution of Stochastic Differential Equations, 1992, section
14.1: even two values for each weight would do). Here a row turned in sign is a row, so that every odd moment is exactly
0; the covariance of the columns is the identity; each fourth moment is within 0.005 and each sixth of one column within
0.02 of the normal one; no number is beyond 4.4. Rows are independent of each other. A sampler that accepts and rejects
needs the normal density itself, and gets it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from lightning_slt.sampling.rng import derive_seed, generator

INTERVALS = 2**16
TOGETHER = 4
"""Numbers that are looked up at once."""
MULTIPLIER = 40485
"""Of the lattice: of 1,500 tried, two have fourth moments within 0.005 of the normal ones; this one's covariances are
the smaller."""


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
    """Numbers looked up with the bits of NumPy's SFC64: about a quarter of the time of torch's on a CPU core.

    Example:
        >>> stream = TableNormal(0, 1)
        >>> x = stream.fill_(torch.empty(100_000))
        >>> bool(x.mean().abs() < 0.02), bool((x.std() - 1).abs() < 0.02)
        (True, True)
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.SFC64(derive_seed(*key))
        self._rows = normal_rows()

    def fill_(self, out: Tensor) -> Tensor:
        """As of the parent; ``out`` is contiguous float32 on the CPU."""
        flat = out.detach().view(-1).numpy()
        whole, rest = divmod(len(flat), TOGETHER)
        count = whole + (rest > 0)
        chosen = self._bits.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
        # not the default mode, which fills a buffer first
        np.take(self._rows, chosen[:whole], axis=0, out=flat[: whole * TOGETHER].reshape(whole, TOGETHER), mode="wrap")
        if rest:
            flat[whole * TOGETHER :] = self._rows[chosen[whole], :rest]
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
def normal_rows() -> np.ndarray:
    """``[INTERVALS, TOGETHER]`` float32: the rows that are chosen from, of mean 0 and the identity as covariance.

    Column j of row i is the mean number of the interval ``a^j (i + 1/2) mod N``, a the multiplier; what covariance is
    left between columns (below 3e-4) is taken off.
    """
    table = normal_table()
    odd = 2 * np.arange(INTERVALS) + 1
    columns = []
    for j in range(TOGETHER):
        place = pow(MULTIPLIER, j, 2 * INTERVALS) * odd % (2 * INTERVALS)  # odd again, and -place of the row turned
        columns.append(table[(place - 1) // 2])
    rows = np.stack(columns, axis=1)
    values, axes = np.linalg.eigh(rows.T @ rows / INTERVALS)
    rows = rows @ (axes * values**-0.5) @ axes.T
    return np.ascontiguousarray((rows - rows[::-1]) / 2, dtype=np.float32)  # odd to the last bit


def normal_table() -> np.ndarray:
    """``[INTERVALS]`` float64, ascending: the mean of z over each interval of equal probability, of variance 1.

    The mean over the interval (a, b) of probability 1/N is N (phi(a) - phi(b)), phi the normal density.
    """
    edges = ndtri(np.arange(INTERVALS + 1) / INTERVALS)
    density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
    means = INTERVALS * (density[:-1] - density[1:])
    means = (means - means[::-1]) / 2  # odd to the last bit
    return means / np.sqrt(np.mean(means**2))
