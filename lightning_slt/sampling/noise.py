"""Standard normal numbers for the chains, a stream for each.

The noise of a step is most of what a chain costs beyond its gradient on a small model, and on the CPU it is the
logarithm and the cosine of torch's generator that take the time. :class:`TableNormal` takes the numbers of a window of
one cyclic sequence instead, from a random place on; a chain that moves alone need not even copy them. The sequence has
:data:`PERIOD` numbers, and is made so that a window of it looks like independent normal numbers: see
:func:`normal_sequence`.

Why that is enough: the error of a Langevin step of size epsilon is of order epsilon whatever the distribution of its
noise, as long as its moments up to the third, those of several weights together included, are those of the normal one
and the fourth are finite (Kloeden and Platen, Numerical Solution of Stochastic Differential Equations, 1992, section
14.1: even two values for each weight would do). Here every odd moment is exactly 0 and the covariance of a window is
the identity; the fourth moments of numbers up to 64 places apart are within 0.02 of the normal ones, and of those
further apart within 0.05; no number is beyond 4.4. Windows are independent of each other. What can be told is the
length of the longest: its square varies half as much as that of normal numbers, as do the products of two of them. A
sampler that accepts and rejects needs the normal density itself, and gets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from lightning_slt.sampling.rng import derive_seed, generator

PERIOD = 2**17
"""Numbers of the sequence."""
WINDOW = 2**15
"""Numbers that are taken from one place at the most."""
SEED = 105
"""Of 300 tried, the one whose fourth moments of numbers up to 64 places apart are nearest to the normal ones."""


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

    def read(self, buffer: Tensor) -> Tensor:
        """The next numbers, in the shape of ``buffer`` ``[1, n]``, to be read only: put there, or where they are."""
        return self.fill_(buffer)


class TableNormal(NormalStream):
    """Windows of :func:`normal_sequence`, from places that NumPy's SFC64 chooses.

    Example:
        >>> stream = TableNormal(0, 1)
        >>> x = stream.fill_(torch.empty(100_000))
        >>> bool(x.mean().abs() < 0.02), bool((x.std() - 1).abs() < 0.02)
        (True, True)
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.SFC64(derive_seed(*key))
        self._sequence = _unrolled()

    def fill_(self, out: Tensor) -> Tensor:
        """As of the parent; ``out`` is contiguous float32 on the CPU."""
        for part in out.view(-1).split(WINDOW):
            part.copy_(self._window(len(part))[0])
        return out

    def read(self, buffer: Tensor) -> Tensor:
        """As of the parent, of the numbers that :meth:`fill_` would give."""
        return self._window(buffer.shape[1]) if buffer.shape[1] <= WINDOW else self.fill_(buffer)

    def place(self) -> int:
        """Where in the sequence the next window begins."""
        return int(self._bits.random_raw() % PERIOD)

    def _window(self, size: int) -> Tensor:
        return self._sequence.narrow(1, self.place(), size)


def fill_rows_(streams: Sequence[NormalStream], out: Tensor) -> Tensor:
    """The next numbers of each stream in a row of ``out`` ``[k, n]``, which is returned; those of the table at once."""
    if all(type(stream) is TableNormal for stream in streams) and out.shape[1] <= WINDOW:
        places = torch.tensor([stream.place() for stream in streams], device="cpu")  # type: ignore[attr-defined]
        windows = _unrolled().as_strided((PERIOD, out.shape[1]), (1, 1))
        return torch.index_select(windows, 0, places, out=out)
    for stream, row in zip(streams, out, strict=True):
        stream.fill_(row)
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
def _unrolled() -> Tensor:
    """``[1, PERIOD + WINDOW]``: the sequence, and its beginning once more."""
    sequence = normal_sequence()
    return torch.from_numpy(np.concatenate([sequence, sequence[:WINDOW]])).unsqueeze(0)


def normal_sequence() -> np.ndarray:
    """``[PERIOD]`` float32, cyclic: numbers whose windows have mean 0 and the identity as covariance.

    The second half is the first one with its sign turned, so that a window from a random place is as likely as its
    negative and every odd moment is 0. Of such a sequence all even harmonics vanish; with the odd ones of equal size,
    numbers k places apart have no covariance for any k but multiples of half the period (Wiener and Khinchin). What
    equal harmonics do to the distribution of the numbers is undone by giving their ranks the means of the normal one
    over as many intervals of equal probability, and harmonics are made equal once more (Schreiber and Schmitz, Improved
    surrogate data for nonlinearity tests, 1996): the fourth moment of a number is 3.003, the sixth 15.00.
    """
    half = PERIOD // 2
    sizes = _half_normal(half)
    random = np.random.Generator(np.random.PCG64(SEED))
    numbers = _with_equal_harmonics(random.permutation(sizes) * random.choice([-1.0, 1.0], half))
    ranked = np.empty(half)
    ranked[np.argsort(np.abs(numbers))] = sizes
    numbers = _with_equal_harmonics(np.copysign(ranked, numbers)).astype(np.float32)
    return np.concatenate([numbers, -numbers])


def _with_equal_harmonics(half: np.ndarray) -> np.ndarray:
    """The first half of the sequence that begins with this one, all odd harmonics of equal size, of variance 1."""
    harmonics = np.fft.rfft(np.concatenate([half, -half]))
    harmonics[0::2] = 0.0  # up to rounding they are
    harmonics[1::2] /= np.abs(harmonics[1::2])
    numbers = np.fft.irfft(harmonics, PERIOD)[: PERIOD // 2]
    return numbers / np.sqrt(np.mean(numbers**2))


def _half_normal(count: int) -> np.ndarray:
    """``[count]`` ascending: the mean of |z| over each interval of equal probability, scaled to a mean square of 1.

    The mean of z over the interval (a, b) of probability p is (phi(a) - phi(b)) / p, phi the normal density.
    """
    edges = ndtri(0.5 + np.arange(count + 1) / (2 * count))
    density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
    means = density[:-1] - density[1:]
    return means / np.sqrt(np.mean(means**2))
