"""The local learning coefficient as a formula: loss differences in, a number with its error and its validity out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slt.functional.convergence import effective_sample_size, rhat, standard_error
from lightning_slt.reasons import DRIFTING, NEGATIVE, NONE_STAYED, NOT_MIXED, Kind, Reason, sentences

MAX_RHAT = 1.1
"""R-hat above which chains are said not to have mixed, where the disagreement also matters for the number."""
MAX_RELATIVE_ERROR = 0.1
"""Chains that disagree (R-hat) or drift by less than this share of the estimate, or an LLC of 0.1, do no harm."""
MIN_CHAIN_SHARE = 0.75
"""More than this share of the chains must be good: one bad chain of eight is left out and counted."""


def learning_coefficient(loss: Tensor, init_loss: Tensor, nbeta: float) -> Tensor:
    """The integrand of the LLC, ``nbeta * (L_B(w) - L_B(w*))``, both losses on the same minibatch.

    Its mean over draws is the estimate ``nbeta (E_w[L_n(w)] - L_n(w*))`` of Lau et al. 2023 (arXiv 2308.12108). Taking
    the difference on the same minibatch removes the minibatch's own scatter, the largest error there is.

    Args:
        loss: losses along the chains, any shape, usually ``[num_chains, num_draws]``.
        init_loss: loss of the same minibatches at ``w*``, the same shape.
        nbeta: inverse temperature times n.

    Returns:
        float64 tensor of the same shape.

    Raises:
        ValueError: where the shapes differ.

    Example:
        >>> learning_coefficient(torch.tensor([[0.25, 0.5]]), torch.tensor([[0.0, 0.25]]), nbeta=10.0)
        tensor([[2.5000, 2.5000]], dtype=torch.float64)
    """
    if loss.shape != init_loss.shape:
        raise ValueError(f"init_loss: shape {tuple(init_loss.shape)} is not that of loss, {tuple(loss.shape)}.")
    return nbeta * (loss.double() - init_loss.double())


@dataclass(frozen=True, eq=False)
class Summary:
    """What a trace says; its fields and ``reasons`` are those of :class:`lightning_slt.record.Estimate`.

    Attributes:
        good: ``[num_chains]`` bool, those that are not left out.
        verdict: why it is not valid; empty where it is.
    """

    mean: float
    se: float
    per_chain: Tensor
    rhat: float
    ess: float
    good: Tensor
    verdict: tuple[Reason, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences of ``verdict``."""
        return sentences(self.verdict)

    @property
    def valid(self) -> bool:
        return not self.verdict


def summarise(trace: Tensor, diverged: Tensor | None = None) -> Summary:
    """Mean, error and verdict of a trace of the LLC integrand.

    Args:
        trace: ``[num_chains, num_draws]``.
        diverged: ``[num_chains]`` bool: chains known to have left the posterior; non-finite ones are found here.

    Returns:
        A :class:`Summary`. Bad chains are left out of every figure, never averaged in; ``reasons`` is empty where the
        number may be read as a learning coefficient.
    """
    trace = trace.detach().cpu().double()
    finite = torch.isfinite(trace).all(dim=1)
    good = finite.clone()
    if diverged is not None:
        good &= ~diverged.cpu()
    per_chain = torch.where(good, trace.mean(dim=1), torch.nan)
    kept = trace[good]
    if kept.numel() == 0:
        nothing = (Reason(Kind.NO_CHAIN, _none_left(finite)),)
        return Summary(math.nan, math.nan, per_chain, math.nan, math.nan, good, nothing)
    mean, se = float(kept.mean()), standard_error(kept)
    r, ess = rhat(kept), effective_sample_size(kept)

    verdict: list[Reason] = []
    bad = (~good).nonzero().flatten().tolist()
    if len(bad) >= (1 - MIN_CHAIN_SHARE) * len(good):
        said = f"{len(bad)} of {len(good)} chains diverged or became non-finite (chains {bad}): left out"
        verdict.append(Reason(Kind.DIVERGED, said))
    if math.isnan(se):
        said = f"its error is not known: one chain of {kept.shape[1]} draws (4 at the least)"
        verdict.append(Reason(Kind.TOO_FEW_DRAWS, said))
    elif math.isnan(r):
        few = "1 draw of a chain does" if kept.shape[1] == 1 else f"{kept.shape[1]} draws of a chain do"
        said = f"{few} not show whether the chains have mixed (4 at the least)"
        verdict.append(Reason(Kind.TOO_FEW_DRAWS, said))
    tolerance = max(MAX_RELATIVE_ERROR * abs(mean), MAX_RELATIVE_ERROR)
    if r > MAX_RHAT and se > tolerance / 2:
        verdict.append(Reason(Kind.NOT_MIXED, f"{NOT_MIXED}: R-hat {_above(r, MAX_RHAT)} > {MAX_RHAT}, error {se:.2g}"))
    drift, between = half_change(kept)
    drift_se = max(between, _error_of_halves(kept))
    if abs(drift) > 3 * drift_se and abs(drift) > tolerance:
        said = f"{DRIFTING}: second half minus first half is {drift:+.2g} ± {drift_se:.1g}"
        verdict.append(Reason(Kind.DRIFTING, said))
    if mean + 2 * se < 0:
        said = f"{NEGATIVE}: the weights are not at a minimum (chains run downhill)"
        verdict.append(Reason(Kind.NEGATIVE, said))
    return Summary(mean, se, per_chain, r, ess, good, tuple(verdict))


def _above(value: float, limit: float) -> str:
    """A number with as many digits as show it above ``limit``, two behind the point at the least.

    Example:
        >>> _above(1.38, 1.1), _above(1.1004, 1.1)
        ('1.38', '1.1004')
    """
    written = (f"{value:.{digits}f}" for digits in range(2, 17))
    return next((text for text in written if float(text) > limit), repr(value))


def _none_left(finite: Tensor) -> str:
    """That no chain is left, and whether that is for want of finite numbers."""
    if not bool(finite.any()):
        return "no chain stayed finite"
    which = "all" if bool(finite.all()) else f"{int(finite.sum())} of {len(finite)}"
    return f"{NONE_STAYED}: {which} are finite, at losses above those of the posterior"


def changes_of(table: Tensor) -> Tensor:
    """``[num_chains]``, the mean of the second half less that of the first; one in the middle is in neither.

    Args:
        table: ``[num_chains, n]``, two or more of each chain.
    """
    half = table.shape[1] // 2
    return table[:, -half:].mean(dim=1) - table[:, :half].mean(dim=1)


def half_change(trace: Tensor) -> tuple[float, float]:
    """Second half minus first half, and its standard error between chains (within, for a single chain).

    Args:
        trace: ``[num_chains, num_draws]``, finite.
    """
    half = trace.shape[1] // 2
    if half < 2:
        return 0.0, math.inf
    change = changes_of(trace)
    if len(change) > 1:
        return float(change.mean()), float(change.std() / math.sqrt(len(change)))
    return float(change.mean()), _error_of_halves(trace)


def _error_of_halves(trace: Tensor) -> float:
    """The error of the change from the errors of both halves, which few chains do not make a matter of chance."""
    half = trace.shape[1] // 2
    if half < 2:
        return math.inf
    return math.hypot(standard_error(trace[:, :half]), standard_error(trace[:, -half:]))
