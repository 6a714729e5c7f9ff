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

LEAST_BATCHES = 8
"""Batches whose means the error is taken from, of all chains together; two of each chain at the least."""
_Array = np.ndarray


def _as_array(draws: Tensor) -> _Array:
    array = np.asarray(draws.detach().cpu().double().numpy())  # NumPy has no bfloat16
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
        draws: ``[num_chains, num_draws]``. Fewer than four draws give NaN, there is nothing to split; so do draws
            that are not finite.

    Returns:
        The larger of the bulk and the folded (tail) R-hat.

    Example:
        >>> import torch
        >>> rhat(torch.randn(4, 500, generator=torch.Generator().manual_seed(0))) < 1.01
        True
    """
    array = _as_array(draws)
    if array.shape[0] < 1 or array.shape[1] < 4 or not np.isfinite(array).all():
        return math.nan
    split = _split(array)
    folded = np.abs(split - np.median(split))
    return float(max(_rhat(_rank_normalise(split)), _rhat(_rank_normalise(folded))))


def effective_sample_size(draws: Tensor) -> float:
    """Bulk effective sample size, in draws: rank-normalised split chains, Geyer's initial monotone sequence.

    Args:
        draws: ``[num_chains, num_draws]``. Fewer than four draws give NaN, and so do draws that are not finite.
    """
    array = _as_array(draws)
    if array.shape[0] < 1 or array.shape[1] < 4 or not np.isfinite(array).all():
        return math.nan
    return _ess(_rank_normalise(_split(array)))


def standard_error(draws: Tensor) -> float:
    """Monte-Carlo standard error of the overall mean, the largest of three estimates.

    - between chains: ``sd(chain means) / sqrt(num_chains)``, which needs no model of the autocorrelation;
    - within and between: ``sd(draws) / sqrt(ESS)`` with the ESS of the draws themselves (not of their ranks);
    - batch means of all chains around their common mean, with V the variance of the overall mean as batches of that
      length have it, ``2 V - V(a third of the length)``, which takes the correlation of neighbouring batches off to
      first order, and Student's t for the few batches there are. Replicated batch means: Gupta & Vats 2020, *Estimating
      Monte Carlo variance from multiple Markov chains* (arXiv 2007.04229); the difference: Vats & Flegal 2022,
      *Lugsail lag windows*, Biometrika 109:735 (arXiv 1809.04541).

    The first is a variance from as few numbers as there are chains, the second is too small on short chains: together
    they cover 82 to 96 % for a nominal 95 % (two to eight AR(1) chains of 2 to 100 autocorrelation times, with and
    without white noise on top). With the third 92 to 97 %; what is returned is 1.1 to 1.3 times the true error.

    Args:
        draws: ``[num_chains, num_draws]``.

    Returns:
        NaN where one chain has fewer than four draws, or where draws are not finite.

    Example:
        >>> import torch
        >>> standard_error(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))  # too short but for the first
        2.0
    """
    array = _as_array(draws)
    chains, n = array.shape
    if not np.isfinite(array).all():
        return math.nan
    known = []
    if chains > 1:
        known.append(array.mean(axis=1).std(ddof=1) / math.sqrt(chains))
        if n >= 6:
            known.append(_batch_error(array))
    if n >= 4:
        known.append(array.std(ddof=1) / math.sqrt(_ess(array)))
    return float(max(known)) if known else math.nan


def surely(mean: float, se: float, num_chains: int) -> float:
    """What a mean over chains is at the least, as surely as a normal number is not two of its errors lower: by
    Student's t, for few chains tell their scatter badly (2.4 errors with eight, 3.3 with four).

    Args:
        mean, se: of the chains.
        num_chains: how many; of fewer than two nothing is sure.

    Returns:
        NaN where that is not known.

    Example:
        >>> round(surely(5.0, 1.0, 8), 2), round(surely(5.0, 1.0, 4), 2), surely(5.0, 1.0, 1)
        (2.57, 1.69, nan)
    """
    if num_chains < 2:
        return math.nan
    return mean - float(stats.t.ppf(stats.norm.cdf(2.0), num_chains - 1)) * se


def _batch_error(array: _Array) -> float:
    """The third estimate of :func:`standard_error`, of two chains or more and six draws or more of each."""
    chains, n = array.shape
    batches = min(max(2, math.ceil(LEAST_BATCHES / chains)), n // 3)
    variance = 2 * _batch_variance(array, batches) - _batch_variance(array, 3 * batches)
    student = stats.t.ppf(0.975, chains * batches - 1) / stats.norm.ppf(0.975)
    return math.sqrt(max(variance, 0.0)) * float(student)


def _batch_variance(array: _Array, batches: int) -> float:
    """Variance of the overall mean, were the means of so many batches of each chain independent."""
    means = array[:, array.shape[1] % batches :].reshape(len(array) * batches, -1).mean(axis=1)
    return float(means.var(ddof=1)) / means.size
