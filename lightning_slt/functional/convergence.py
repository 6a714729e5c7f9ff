"""Have the chains mixed, and how far may their mean be off? R-hat, effective sample size, Monte-Carlo standard error.

The definitions are those of Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021), *Rank-normalization, folding, and
localization: an improved R-hat*, Bayesian Analysis 16:667. All functions take draws ``[num_chains, num_draws]`` and
compute in float64.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats
from torch import Tensor

_Array = np.ndarray


def _as_array(draws: Tensor) -> _Array:
    array = np.asarray(draws.detach().cpu().numpy(), dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"draws: expected [num_chains, num_draws], got shape {tuple(array.shape)}.")
    return array


def _split(array: _Array) -> _Array:
    half = array.shape[1] // 2
    return np.concatenate([array[:, :half], array[:, array.shape[1] - half :]])


def _rank_normalise(array: _Array) -> _Array:
    ranks = stats.rankdata(array, method="average").reshape(array.shape)
    return stats.norm.ppf((ranks - 0.375) / (array.size + 0.25))


def _rhat(array: _Array) -> float:
    n = array.shape[1]
    within = array.var(axis=1, ddof=1).mean()
    between = n * array.mean(axis=1).var(ddof=1)
    if within == 0.0:
        return 1.0 if between == 0.0 else math.inf
    return math.sqrt((n - 1) / n + between / (n * within))


def _ess(array: _Array) -> float:
    """Effective sample size with Geyer's initial monotone sequence, chains combined as in Vehtari et al., eq. 10."""
    chains, n = array.shape
    centred = array - array.mean(axis=1, keepdims=True)
    size = 2 ** math.ceil(math.log2(2 * n))
    spectrum = np.fft.rfft(centred, n=size, axis=1)
    autocov = np.fft.irfft(np.abs(spectrum) ** 2, n=size, axis=1)[:, :n] / n
    within = (autocov[:, 0] * n / (n - 1)).mean()
    variance = within * (n - 1) / n
    if chains > 1:
        variance += array.mean(axis=1).var(ddof=1)
    if variance == 0.0:
        return float(array.size)
    rho = 1.0 - (within - autocov.mean(axis=0) * n / (n - 1)) / variance
    rho[0] = 1.0
    pairs = rho[: 2 * (n // 2)].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs < 0)
    pairs = pairs[: negative[0]] if negative.size else pairs
    tau = -1.0 + 2.0 * np.minimum.accumulate(pairs).sum()
    # antithetic chains may beat independent draws, but not without bound (Vehtari et al., section 3.2)
    return float(array.size / max(tau, 1.0 / math.log10(max(array.size, 11))))


def rhat(draws: Tensor) -> float:
    """Rank-normalised split R-hat: 1 where the chains agree with each other and each half with the other.

    Args:
        draws: ``[num_chains, num_draws]``, finite. Fewer than four draws give NaN: there is nothing to split.

    Returns:
        The larger of the bulk and the folded (tail) R-hat.

    Example:
        >>> import torch
        >>> rhat(torch.randn(4, 500, generator=torch.Generator().manual_seed(0))) < 1.01
        True
    """
    array = _as_array(draws)
    if array.shape[0] < 1 or array.shape[1] < 4:
        return math.nan
    split = _split(array)
    folded = np.abs(split - np.median(split))
    return float(max(_rhat(_rank_normalise(split)), _rhat(_rank_normalise(folded))))


def effective_sample_size(draws: Tensor) -> float:
    """Bulk effective sample size, in draws: rank-normalised split chains, Geyer's initial monotone sequence.

    Args:
        draws: ``[num_chains, num_draws]``, finite. Fewer than four draws give NaN.
    """
    array = _as_array(draws)
    if array.shape[0] < 1 or array.shape[1] < 4:
        return math.nan
    return _ess(_rank_normalise(_split(array)))


def standard_error(draws: Tensor) -> float:
    """Monte-Carlo standard error of the overall mean, the larger of two estimates.

    - between chains: ``sd(chain means) / sqrt(num_chains)``, which needs no model of the autocorrelation;
    - within and between: ``sd(draws) / sqrt(ESS)`` with the ESS of the draws themselves (not of their ranks).

    The second alone covers too rarely on short chains (84-90 % for a nominal 95 %), the first alone is a variance from
    few numbers; the larger of the two is slightly conservative.

    Args:
        draws: ``[num_chains, num_draws]``, finite.

    Returns:
        NaN where one chain has fewer than four draws.
    """
    array = _as_array(draws)
    chains, n = array.shape
    between = array.mean(axis=1).std(ddof=1) / math.sqrt(chains) if chains > 1 else math.nan
    within = array.std(ddof=1) / math.sqrt(_ess(array)) if n >= 4 else math.nan
    known = [value for value in (between, within) if not math.isnan(value)]
    return float(max(known)) if known else math.nan
