"""Firings that are smaller than what was asked for: what is given up, in which order, and what is left at the least."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lightning_slt.estimate import ChainSettings
from lightning_slt.sampling.budget import FIRST_ROUNDS

MIN_DRAWS = 20
"""Draws of each chain that a firing keeps. The standard error counts the autocorrelation of the draws and the spread of
the chains, so that it is honest at this length too, and wide; below it there are too few readings to tell."""


def chain_steps(settings: ChainSettings) -> int:
    """The most steps that each chain of a firing makes, the search for the step size included."""
    budget = settings.budget()
    unit = settings.num_draws * (settings.num_steps_bw_draws or 1)
    search = sum(FIRST_ROUNDS) if budget.lr is None else 0
    return max(budget.most_steps, search + unit)


def sized(settings: ChainSettings, size: float) -> ChainSettings:
    """The largest firing of at most this size; the smallest one where none is that small.

    Steps between draws are given up first (they buy precision of the same draws), then draws down to
    :data:`MIN_DRAWS`; what the user has fixed, ``num_steps_bw_draws`` and ``num_burnin_steps``, stays. The number of
    chains stays too: warm starts, common noise and R-hat are theirs.

    Args:
        settings: those of a full firing.
        size: share of a full firing's :func:`chain_steps`.

    Example:
        >>> full = ChainSettings(num_draws=100, max_steps_bw_draws=4)
        >>> small = sized(full, 0.3)
        >>> small.num_draws, small.max_steps_bw_draws, chain_steps(small) / chain_steps(full)
        (100, 1, 0.25)
    """
    most = size * chain_steps(settings) * (1 + 1e-9)
    smaller = settings
    for smaller in _smaller_and_smaller(settings):
        if chain_steps(smaller) <= most:
            break
    return smaller


def size_of(settings: ChainSettings, full: ChainSettings) -> float:
    """The share of a full firing's chain-steps that these settings ask for."""
    return chain_steps(settings) / chain_steps(full)


def least_size(settings: ChainSettings) -> float:
    """The size of the smallest firing."""
    return size_of(sized(settings, 0.0), settings)


def _smaller_and_smaller(settings: ChainSettings) -> Iterator[ChainSettings]:
    yield settings
    if settings.num_steps_bw_draws is None and settings.num_burnin_steps is None:
        for between in range(settings.max_steps_bw_draws - 1, 0, -1):
            settings = dataclasses.replace(settings, max_steps_bw_draws=between)
            yield settings
    for draws in range(settings.num_draws - 1, MIN_DRAWS - 1, -1):
        yield dataclasses.replace(settings, num_draws=draws)


__all__ = ["MIN_DRAWS", "chain_steps", "least_size", "size_of", "sized"]
