r"""Influence of samples on each other: covariances of their losses over the draws of chains, with standard errors.

The local Bayesian influence function (Kreer et al. 2025, arXiv 2509.26544) of training sample i on query q is

.. math:: \mathrm{BIF}(i, q) = -\mathrm{Cov}_w(\ell_i(w), \ell_q(w)),

here with the opposite sign, ``+Cov``, so that a positive number is a helpful sample. The covariance is taken within
chains and averaged over them: a difference between the means of two chains is not influence.

**Streaming.** Draws are cut into *blocks*: stretches of one chain. A block keeps a count n, the means m and m' of both
sides, and the comoment ``S = sum (x - m)(y - m')``; two parts of a block join by (Chan, Golub, LeVeque 1983)

.. math:: S = S_1 + S_2 + \frac{n_1 n_2}{n_1 + n_2} (m_2 - m_1)(m'_2 - m'_1)^\top ,

and so do the blocks of a chain. The result is that of two passes over all draws, in float64.

**Control variates.** Let ``delta = w - w*`` and let ``s = nbeta grad L + gamma delta`` be the slope of minus the log of
the posterior. Stein's identity says ``E[delta s'] = I`` for every posterior that falls off, so that, with the gradients
``g`` of two losses at ``w*`` and any symmetric M, the product of ``a_i = g_i . delta`` and ``b_q = g_q . M s`` has the
known mean ``g_i' M g_q``. Where M is near the posterior's covariance, ``M s`` is near ``delta`` and that product is
most of ``(l_i - E l_i)(l_q - E l_q)``: what is estimated is the difference alone, and the known mean is added. It has
the same expectation and less noise. Zero-variance estimators (Mira, Solgi, Imparato 2013, Statistics and Computing
23:653) use the same identity. The slopes of the losses on ``a`` and on ``b`` scale them, sample by sample.

**Errors** are those of :mod:`~lightning_slt.functional.block_errors`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from lightning_slt.functional.block_errors import block_edges, error_of_mean, error_of_sum, independent_stretches
from lightning_slt.kinds import check_number

COLUMNS = 64
"""Training samples that are worked on together: few enough that what is summed stays in the cache."""


@dataclass
class _Block:
    """Count, both means, and the comoment of the draws of one block."""

    count: int
    mean_x: Tensor
    mean_y: Tensor
    comoment: Tensor

    def join(self, other: _Block) -> _Block:
        n = self.count + other.count
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        share = other.count / n
        comoment = self.comoment + other.comoment
        comoment.addr_(dy, dx, alpha=self.count * share)
        return _Block(n, self.mean_x + share * dx, self.mean_y + share * dy, comoment)


@dataclass(frozen=True, eq=False)
class Covariance:
    """Within-chain covariance of two sets of losses.

    Attributes:
        matrix: ``[n_y, n_x]`` float64, averaged over chains.
        se: ``[n_y, n_x]``, its Monte-Carlo standard error; NaN where there are fewer than two blocks.
        mean_x, mean_y: ``[n_x]``, ``[n_y]``, means over all draws.
        num_blocks: independent stretches behind the errors: blocks, or chains where blocks are short.
    """

    matrix: Tensor
    se: Tensor
    mean_x: Tensor
    mean_y: Tensor
    num_blocks: int

    def scaled(self, factor: float) -> Covariance:
        """With matrix and errors times ``factor``."""
        return Covariance(self.matrix * factor, self.se * factor, self.mean_x, self.mean_y, self.num_blocks)

    def plus(self, known: Optional[Tensor], weight: float = 1.0) -> Covariance:
        """With a known part ``[n_y, n_x]`` added to ``weight`` times this one.

        The error stays that of weight 1 at the least. Where an entry stands out of its noise the weight takes more than
        that off it, and ``se²`` is ``weight² se² + (1 - weight)² (m² - se²)``: noise and what is missing.
        """
        matrix = self.matrix if known is None else torch.add(known, self.matrix, alpha=weight)
        se = self.se
        if weight < 1:
            se = se.clone()
            for found, error in zip(self.matrix.split(COLUMNS), se.split(COLUMNS), strict=True):
                square = error.square()
                missing = (found.square() - square).clamp_(min=0)
                whole = torch.add(weight**2 * square, missing, alpha=(1 - weight) ** 2)
                error.copy_(torch.maximum(square, whole).sqrt_())
        return Covariance(matrix, se, self.mean_x, self.mean_y, self.num_blocks)

    @property
    def stein_weight(self) -> float:
        r"""How much of this matrix is more than noise, the positive-part James-Stein factor

        .. math:: c = \max\left(0, 1 - \frac{\sum_{iq} se_{iq}^2}{\sum_{iq} m_{iq}^2}\right) .

        ``c m`` has a smaller expected square error than ``m`` (James and Stein 1961, Proc. 4th Berkeley Symposium
        1:361; Efron and Morris 1973, JASA 68:117), and c tends to 1 as the draws become many. 1 where there are no
        errors.

        Example:
            >>> noise, one = torch.full((2, 2), 0.5).double(), torch.ones(2, 2).double()
            >>> [Covariance(m * one, noise, one[0], one[0], 16).stein_weight for m in (0.4, 1.0, 5.0)]
            [0.0, 0.75, 0.99]
        """
        square = float(self.matrix.square().sum())
        noise = float(self.se.square().sum())
        if math.isnan(noise) or square <= 0:
            return 1.0
        return max(0.0, 1.0 - noise / square)


@dataclass(frozen=True, eq=False)
class LinearParts:
    """What the losses of n samples are to first order, along the same draws; see "Control variates" above.

    Attributes:
        direct: ``[num_chains, num_draws, n]``, ``g . delta``.
        pulled: ``[num_chains, num_draws, n]``, ``g . M s``.
    """

    direct: Tensor
    pulled: Tensor

    def fitted(self, x: Tensor) -> tuple[LinearParts, Tensor, Tensor]:
        """Both scaled by the slopes of the losses on them, and these slopes.

        Args:
            x: ``[num_chains, num_draws, n]``, the losses.

        Returns:
            The scaled parts, and two ``[n]`` float64 tensors.
        """
        down, across = _slope(x, self.direct), _slope(x, self.pulled)
        return LinearParts(self.direct * down, self.pulled * across), down, across

    def by_group(self, groups: Sequence[Optional[str]], names: Sequence[str]) -> LinearParts:
        """Means over groups, see :func:`group_means`."""
        return LinearParts(group_means(self.direct, groups, names), group_means(self.pulled, groups, names))


def _slope(x: Tensor, a: Tensor) -> Tensor:
    """``[n]``, of x on a within chains; 0 where a does not vary."""
    x, a = (v.double() - v.double().mean(dim=1, keepdim=True) for v in (x, a))
    square = a.square().sum(dim=(0, 1))
    return torch.where(square > 0, (x * a).sum(dim=(0, 1)) / square.clamp(min=torch.finfo(square.dtype).tiny), 0.0)


class CovarianceAccumulator:
    """Streams draws of two sets of losses into their within-chain covariance.

    Parts of the same work, in other processes or over other draws, are joined with :meth:`merge`; parts over other
    samples are joined by putting the results side by side.

    Args:
        n_x: losses on the one side (training samples; the columns of the result).
        n_y: losses on the other (queries; its rows).

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(2, 500, 3, generator=g)
        >>> acc = CovarianceAccumulator(3, 3)
        >>> for chain in range(2):
        ...     for block in range(5):
        ...         part = x[chain, 100 * block : 100 * (block + 1)]
        ...         acc.update(chain, block, part, part)
        >>> acc.result().matrix.diagonal().round(decimals=1).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, n_x: int, n_y: int) -> None:
        self.n_x, self.n_y = n_x, n_y
        self._blocks: dict[tuple[int, int], _Block] = {}

    def update(self, chain: int, block: int, x: Tensor, y: Tensor) -> None:
        """Add draws.

        Args:
            chain: number of the chain, unique over all processes.
            block: number of the block within it.
            x: ``[draws, n_x]`` losses, any float dtype. Differences to the losses at ``w*`` keep more digits.
            y: ``[draws, n_y]``, of the same draws.

        Raises:
            ValueError: where the shapes do not fit.
        """
        if x.shape != (len(x), self.n_x) or y.shape != (len(x), self.n_y):
            raise ValueError(
                f"x {tuple(x.shape)}, y {tuple(y.shape)}: expected [draws, {self.n_x}] and [draws, {self.n_y}]."
            )
        if not len(x):
            return
        x, y = x.double(), y.double()
        mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
        part = _Block(len(x), mean_x, mean_y, (y - mean_y).T @ (x - mean_x))
        self._add((chain, block), part)

    def _add(self, key: tuple[int, int], part: _Block) -> None:
        known = self._blocks.get(key)
        self._blocks[key] = part if known is None else known.join(part)

    def merge(self, other: CovarianceAccumulator) -> None:
        """Take over the draws of another accumulator, which must be other draws."""
        for key, block in other._blocks.items():
            self._add(key, block)

    def state(self) -> list[tuple[int, int, int, Tensor, Tensor, Tensor]]:
        """What there is, as plain numbers and tensors: to be sent to another process."""
        return [(c, b, k.count, k.mean_x, k.mean_y, k.comoment) for (c, b), k in self._blocks.items()]

    def load(self, state: Sequence[tuple[int, int, int, Tensor, Tensor, Tensor]]) -> None:
        """Merge the :meth:`state` of another accumulator."""
        for chain, block, count, mean_x, mean_y, comoment in state:
            self._add((chain, block), _Block(count, mean_x, mean_y, comoment.clone()))

    def _by_chain(self) -> dict[int, tuple[int, Tensor, Tensor]]:
        """Count and both means of each chain."""
        chains: dict[int, tuple[int, Tensor, Tensor]] = {}
        for (chain, _), block in sorted(self._blocks.items()):
            count, mean_x, mean_y = chains.get(chain, (0, block.mean_x, block.mean_y))
            share = block.count / (count + block.count)
            mean_x, mean_y = mean_x.lerp(block.mean_x, share), mean_y.lerp(block.mean_y, share)
            chains[chain] = (count + block.count, mean_x, mean_y)
        return chains

    def _about(self, key: tuple[int, int], chains: dict[int, tuple[int, Tensor, Tensor]]) -> Tensor:
        """Sum of the products of a block, about the means of its chain."""
        block, (_, mean_x, mean_y) = self._blocks[key], chains[key[0]]
        return torch.addr(block.comoment, block.mean_y - mean_y, block.mean_x - mean_x, alpha=block.count)

    def result(self, less: Sequence[CovarianceAccumulator] = ()) -> Covariance:
        """The covariance so far.

        Args:
            less: others of the same draws, whose mean is taken off, block by block.

        Raises:
            ValueError: where there are no draws, or no chain has two.
        """
        chains = self._by_chain()
        others = [(other, other._by_chain()) for other in less]
        degrees = sum(count - 1 for count, _, _ in chains.values())
        if degrees < 1:
            raise ValueError("no draws: a covariance needs two draws of a chain at least.")
        total, count = sum(count for count, _, _ in chains.values()), len(self._blocks)
        stretches = independent_stretches(len(chains), count, total)
        first = torch.zeros(self.n_y, self.n_x, dtype=torch.float64, device="cpu")
        square, square_of_chains = torch.zeros_like(first), torch.zeros_like(first)
        # blocks may differ a little in length: each counts by its share of the draws
        for chain in chains:
            of_chain = torch.zeros_like(first)
            for key in (key for key in self._blocks if key[0] == chain):
                value = self._about(key, chains)
                for other, of_chains in others:
                    value.sub_(other._about(key, of_chains), alpha=1 / len(others))
                of_chain += value
                square.addcmul_(value, value)
            first += of_chain
            square_of_chains.addcmul_(of_chain, of_chain)
        matrix = first / degrees
        se = error_of_sum(first, square, count, square_of_chains, len(chains)) / degrees
        mean_x = torch.stack([mean * (n / total) for n, mean, _ in chains.values()]).sum(dim=0)
        mean_y = torch.stack([mean * (n / total) for n, _, mean in chains.values()]).sum(dim=0)
        return Covariance(matrix, se, mean_x, mean_y, stretches)


def covariance(
    x: Tensor,
    y: Tensor,
    columns: int = COLUMNS,
    x_parts: Optional[LinearParts] = None,
    y_parts: Optional[LinearParts] = None,
) -> Covariance:
    """Within-chain covariance of traces that are held whole, a few columns at a time.

    Args:
        x: ``[num_chains, num_draws, n_x]`` losses, such as of training samples.
        y: ``[num_chains, num_draws, n_y]``, of queries.
        columns: of ``x`` at once.
        x_parts, y_parts: what they are to first order, fitted to them. The covariance is then that of the rest, to
            which the known mean is to be added (:meth:`Covariance.plus`).

    Returns:
        A :class:`Covariance`, ``[n_y, n_x]``.
    """
    chains, draws = x.shape[:2]
    sides = [(x, y)]
    if x_parts is not None and y_parts is not None:
        sides += [(x_parts.direct, y_parts.pulled), (x_parts.pulled, y_parts.direct)]
    if draws < 2:
        raise ValueError("no draws: a covariance needs two draws of a chain at least.")

    def centred(v: Tensor) -> Tensor:
        v = v.double()
        return v - v.mean(dim=1, keepdim=True)

    # in one product for each block: the control variates are further draws of the same block, of negative weight
    weight = -1 / max(len(sides) - 1, 1)
    left = torch.cat([centred(side[0]) * (weight if k else 1.0) for k, side in enumerate(sides)], dim=1)
    right = torch.cat([centred(side[1]) for side in sides], dim=1)
    blocks = [
        (chain, torch.cat([torch.arange(low, high, device="cpu") + k * draws for k in range(len(sides))]))
        for chain in range(chains)
        for low, high in block_edges(chains, draws)
    ]
    rights = [right[chain, rows] for chain, rows in blocks]
    matrix = torch.zeros(y.shape[2], x.shape[2], dtype=torch.float64, device="cpu")
    se = torch.empty_like(matrix)
    degrees, count = chains * (draws - 1), len(blocks)
    stretches = independent_stretches(chains, count, chains * draws)
    for start in range(0, x.shape[2], columns):
        some = slice(start, start + columns)
        first = torch.zeros(y.shape[2], left[:, :, some].shape[2], dtype=torch.float64, device="cpu")
        square, value = torch.zeros_like(first), torch.empty_like(first)
        before, square_of_chains = torch.zeros_like(first), torch.zeros_like(first)
        for number, ((chain, rows), other) in enumerate(zip(blocks, rights, strict=True), start=1):
            torch.mm(other.T, left[chain, rows, some], out=value)
            first += value
            square.addcmul_(value, value)
            if 1 < chains < count and number % (count // chains) == 0:
                of_chain = first - before
                square_of_chains.addcmul_(of_chain, of_chain)
                before.copy_(first)
        matrix[:, some] = first / degrees
        se[:, some] = error_of_sum(first, square, count, square_of_chains, chains) / degrees
    return Covariance(matrix, se, x.double().mean(dim=(0, 1)), y.double().mean(dim=(0, 1)), stretches)


def variance(x: Tensor, parts: Optional[LinearParts] = None) -> tuple[Tensor, Tensor]:
    """Within-chain variance of every loss, and its standard error.

    Args:
        x: ``[num_chains, num_draws, n]``.
        parts: as in :func:`covariance`.

    Returns:
        Two ``[n]`` float64 tensors.
    """
    draws = x.shape[1]

    def centred(v: Tensor) -> Tensor:
        return v.double() - v.double().mean(dim=1, keepdim=True)

    squares = centred(x).square()
    if parts is not None:
        squares -= centred(parts.direct) * centred(parts.pulled)
    squares *= draws / (draws - 1)
    return squares.mean(dim=(0, 1)), error_of_mean(squares)


def correlation(matrix: Tensor, variance_x: Tensor, variance_y: Tensor) -> Tensor:
    """``Cov / (sd_y sd_x)``, ``[n_y, n_x]`` within [-1, 1]; 0 where a loss does not vary."""
    scale = variance_y.clamp(min=0).sqrt()[:, None] * variance_x.clamp(min=0).sqrt()[None]
    return torch.where(scale > 0, matrix / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0).clamp(-1.0, 1.0)


def shrink(matrix: Tensor, rho: Tensor, power: float) -> Tensor:
    """``sign(rho) |rho|^p s_y s_x``: weak correlations, which are mostly noise, are weighted down.

    A denoiser for few draws (it lowers the score of an exact covariance), under a name of its own: with ``power`` other
    than 1 the result is not the influence function.

    Args:
        matrix: ``[n_y, n_x]`` covariance.
        rho: ``[n_y, n_x]``, the correlation of the same.
        power: p >= 1; 1 changes nothing.

    Raises:
        ValueError: for a power below 1, or one that is not finite.
        TypeError: for one that is no number.
    """
    check_number("shrinkage", power, False, lambda p: 1 <= p < math.inf, "must be at least 1 (1 is none).")
    return matrix if power == 1 else matrix * rho.abs().pow(power - 1)


def group_means(x: Tensor, groups: Sequence[Optional[str]], names: Sequence[str]) -> Tensor:
    """Mean loss of each group at every draw.

    Args:
        x: ``[num_chains, num_draws, n]``.
        groups: the group of each of the n, None for none.
        names: the groups in the order wanted.

    Returns:
        ``[num_chains, num_draws, len(names)]`` float64; NaN for a group without samples.
    """
    place = {name: k for k, name in enumerate(names)}
    weights = torch.zeros(x.shape[2], len(names), dtype=torch.float64, device="cpu")
    for i, group in enumerate(groups):
        if group is not None and group in place:
            weights[i, place[group]] = 1.0
    return x.double() @ (weights / weights.sum(dim=0))
