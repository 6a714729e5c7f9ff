r"""Errors of covariances and means over the draws of chains, from blocks of draws and from chains as a whole.

With the means of its whole chain, each block gives ``B_b = mean (x - x̄_c)(y - ȳ_c)``; blocks longer than
the chains' memory are nearly independent, so that ``se² = var_b(B_b) / num_blocks`` counts the autocorrelation.
Shorter ones are not: they are about the same mean of the chain, and what is correlated for longer than a block
is not in their scatter. Chains are independent whatever their memory is. ``se²`` is therefore the larger of that and
``var_c(B_c) / num_chains``, each B of a whole chain, as in :func:`~lightning_slt.functional.standard_error`. Where
blocks are shorter than :data:`LONG_BLOCK_DRAWS` it is to be read as one of as many independent numbers as there are
chains (``num_blocks``). Of AR(1) draws, 4 chains of 8 or 20 whose memory is up to a quarter of their length, the true
error was 1.0 to 1.4 times that of the blocks, and is 0.9 to 1.05 times the larger one; of 4 to 8 chains of 200 or 400
whose memory (20 to 66 draws) is about that of their blocks of 33 to 50 draws or above it, it was 1.1 to 1.4 times that
of the blocks, and is 0.9 to 1.0 times the larger one.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

MIN_BLOCKS, MIN_BLOCK_DRAWS = 16, 4
"""Blocks to have at least, over all chains together, of so many draws at least."""
MANY_BLOCKS, LONG_BLOCK_DRAWS = 64, 32
"""Blocks to have where the chains are long enough for such long ones: errors from few blocks have wide tails."""


def blocks_per_chain(num_chains: int, num_draws: int) -> int:
    """Into how many blocks each chain is cut.

    Example:
        >>> [blocks_per_chain(16, 60), blocks_per_chain(16, 125), blocks_per_chain(16, 1250), blocks_per_chain(4, 100)]
        [1, 3, 4, 4]
    """
    chains = max(num_chains, 1)
    few = min(math.ceil(MIN_BLOCKS / chains), num_draws // MIN_BLOCK_DRAWS)
    many = min(math.ceil(MANY_BLOCKS / chains), num_draws // LONG_BLOCK_DRAWS)
    return max(1, few, many)


def block_edges(num_chains: int, num_draws: int) -> list[tuple[int, int]]:
    """First draw of each block of a chain, and the one after its last.

    Example:
        >>> block_edges(4, 18)
        [(0, 4), (4, 9), (9, 14), (14, 18)]
    """
    blocks = blocks_per_chain(num_chains, num_draws)
    return list(pairwise(torch.linspace(0, num_draws, blocks + 1, device="cpu").round().long().tolist()))


def independent_stretches(num_chains: int, num_blocks: int, num_draws: int) -> int:
    """How many stretches an error may count as independent: blocks, or chains where these are short.

    Args:
        num_chains, num_blocks, num_draws: of all chains together.

    Example:
        >>> [independent_stretches(4, 16, 16 * draws) for draws in (4, 31, 32)]
        [4, 4, 16]
    """
    short = num_blocks > num_chains > 1 and num_draws < LONG_BLOCK_DRAWS * num_blocks
    return num_chains if short else num_blocks


def error_of_sum(total: Tensor, squares: Tensor, num_blocks: int, squares_of_chains: Tensor, num_chains: int) -> Tensor:
    """Standard error of sums over all blocks.

    Args:
        total: the sums, of any shape.
        squares: the same shape, sums of the squares of the blocks' parts.
        num_blocks: of all chains together.
        squares_of_chains: the same shape, sums of the squares of the chains' parts; read where there are two or more.
        num_chains: that the blocks are of.

    Returns:
        The shape of ``total``; NaN where there are fewer than two blocks.
    """
    if num_blocks < 2:
        return torch.full_like(total, math.nan)
    error = _square_error(total, squares, num_blocks)
    if 1 < num_chains < num_blocks:
        error = torch.maximum(error, _square_error(total, squares_of_chains, num_chains))
    return error.sqrt_()


def _square_error(total: Tensor, squares: Tensor, count: int) -> Tensor:
    """Square error of a sum of ``count`` independent parts, from their sum and the sum of their squares."""
    return (squares - total.square() / count).clamp_(min=0) * (count / (count - 1))


def error_of_mean(values: Tensor) -> Tensor:
    """Standard error of the mean over all chains and draws.

    Args:
        values: ``[num_chains, num_draws, n]``.

    Returns:
        ``[n]`` float64; NaN where there are fewer than two blocks.
    """
    chains, draws, n = values.shape
    edges = block_edges(chains, draws)
    if chains * len(edges) < 2:
        return torch.full((n,), math.nan, dtype=torch.float64, device="cpu")
    # by its share of the draws, where blocks differ in length
    shares = torch.cat([values[:, a:b].double().sum(dim=1) * (len(edges) / draws) for a, b in edges])
    error = shares.std(dim=0) / math.sqrt(len(shares))
    if 1 < chains < len(shares):
        error = torch.maximum(error, values.double().mean(dim=1).std(dim=0) / math.sqrt(chains))
    return error


def mean_and_error(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of every loss over all draws, and its standard error, of blocks and of chains as for covariances.

    Args:
        x: ``[num_chains, num_draws, n]``.

    Returns:
        Two ``[n]`` float64 tensors.
    """
    x = x.double()
    # about their mean: of large losses the digits that scatter are the last ones
    mean = x.mean(dim=(0, 1))
    return mean, error_of_mean(x - mean)
