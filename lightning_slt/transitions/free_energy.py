"""Which of two phases does the posterior prefer at n samples, and at which n does that flip?

The free energy of a phase (Watanabe 2009; Lau et al. 2023, arXiv 2308.12108), at inverse temperature beta:

    F(n) = n beta L + lambda log(n beta) - (m - 1) log log(n beta) + O(1)

L is its loss, lambda its learning coefficient, m its multiplicity. The odds of U against V are exp(F_V - F_U). A
simpler phase U with the higher loss is preferred until the critical n* at which both are equal. With m = 1 and
``r = (L_U - L_V) / (lambda_V - lambda_U)``, n* solves ``r N = log N``, ``N = n beta``; of the two roots the larger one
is the loss of the simpler phase catching up:

    n* = -W_{-1}(-r) / (beta r),    0 < r < 1/e

with W_{-1} the lower branch of Lambert's function.

The O(1) term depends on the shape of the two valleys and is not measured. It is carried as a standard deviation of
``constant_se`` in the difference of the two, 1 by default: where the logarithm is a few units that moves n* by a factor
of two or so. A critical n is an order of magnitude.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, special

from lightning_slt.kinds import check_number

_DRAWS = 4000
_LEVEL = 0.95


@dataclass(frozen=True)
class Phase:
    """One side of a transition.

    Attributes:
        loss: mean loss per sample, in nats.
        loss_se: its standard error.
        llc: learning coefficient.
        llc_se: its standard error.
        multiplicity: the order m of the pole; 1 where it is not known.

    Raises:
        ValueError: a value is not finite, an error is negative, or the multiplicity is below 1.
        TypeError: a value is no number.
    """

    loss: float
    loss_se: float
    llc: float
    llc_se: float
    multiplicity: float = 1.0

    def __post_init__(self) -> None:
        for name in ("loss", "loss_se", "llc", "llc_se", "multiplicity"):
            check_number(name, getattr(self, name), optional=False)
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)!r}; drop bad points.")
        for name in ("loss_se", "llc_se"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected an error of at least 0, got {getattr(self, name)!r}.")
        if self.multiplicity < 1:
            raise ValueError(f"multiplicity: expected at least 1, got {self.multiplicity!r}.")


@dataclass(frozen=True)
class Preference:
    """What the posterior prefers at one n.

    Attributes:
        phase: "first" or "second", the one of the lower free energy; "undecided" within two standard errors.
        log_odds: log of the odds of the first phase against the second, F_second - F_first.
        log_odds_se: its standard error, from the errors of both losses and coefficients and the O(1) term.
    """

    phase: Literal["first", "second", "undecided"]
    log_odds: float
    log_odds_se: float


@dataclass(frozen=True)
class PhaseComparison:
    """Two phases side by side; see :func:`compare_phases`.

    Attributes:
        first: the one phase.
        second: the other.
        beta: inverse temperature.
        constant: the known O(1) term, F_second - F_first at the same leading terms.
        constant_se: standard deviation of what is not known of it.
        critical_n: n at which both are equal and beyond which the phase of the lower loss is preferred, or None.
        critical_n_interval: 95 % interval of it, or None; the upper end is infinite where the losses may be equal.
    """

    first: Phase
    second: Phase
    beta: float
    constant: float
    constant_se: float
    critical_n: float | None
    critical_n_interval: tuple[float, float] | None

    def preferred(self, n: float) -> Preference:
        """The phase that the posterior prefers at ``n`` samples.

        n counts independent samples: training steps are not n, and neighbouring tokens are not independent.

        Raises:
            ValueError: ``n * beta`` is not above e, where ``log log (n beta)`` of the free energy has no meaning.
            TypeError: n is no number.
        """
        check_number("n", n, optional=False)
        if not (math.isfinite(n) and n * self.beta > math.e):
            raise ValueError(f"n: expected n * beta above e, got n = {n!r} at beta = {self.beta}.")
        a, b, size = self.first, self.second, n * self.beta
        log = math.log(size)
        odds = size * (b.loss - a.loss) + (b.llc - a.llc) * log + self.constant
        odds -= (b.multiplicity - a.multiplicity) * math.log(log)
        error = math.hypot(size * a.loss_se, size * b.loss_se, log * a.llc_se, log * b.llc_se, self.constant_se)
        phase: Literal["first", "second", "undecided"] = "first" if odds > 0 else "second"
        return Preference("undecided" if abs(odds) <= 2 * error else phase, odds, error)


def _without_multiplicity(loss: float, llc: float, constant: float) -> float | None:
    """The larger N at which ``N loss = llc log N + constant``, or None."""
    # with w = N loss / llc it is w - log w = y; beyond y = 1 the larger w is -W_{-1}(-exp(-y))
    rate = loss / llc
    y = constant / llc - math.log(rate) if rate > 0 else math.inf
    if y <= 1.0:
        return None
    if y < 700.0:
        size = float(-special.lambertw(-math.exp(-y), -1).real) / rate
    else:  # exp(-y) is no number any more, and log w is small beside w: twice is enough
        size = (y + math.log(y + math.log(y))) / rate if math.isfinite(y) else math.inf
    return size if size > math.e else None


def _critical_size(loss: float, llc: float, multiplicity: float, constant: float) -> float | None:
    """The larger N = n beta at which ``N loss = llc log N - multiplicity log log N + constant``, or None.

    ``loss`` is what the simpler phase loses more, ``llc`` and ``multiplicity`` what the other has more of.
    """
    if llc <= 0 or loss <= 0:
        return None
    if multiplicity == 0:
        return _without_multiplicity(loss, llc, constant)
    # log log N is between 0 and log N: beyond this the richer phase is preferred in any case
    size = _without_multiplicity(loss, llc + max(-multiplicity, 0.0), constant)
    if size is None or not math.isfinite(size):
        return size

    def gap(log_size: float) -> float:
        return math.exp(log_size) * loss - llc * log_size + multiplicity * math.log(log_size) - constant

    # from there downwards for the last change of sign
    grid = np.linspace(math.log(size) + 1e-6, 1.0 + 1e-6, 400)
    values = np.exp(grid) * loss - llc * grid + multiplicity * np.log(grid) - constant
    below = np.flatnonzero(values < 0)
    if below.size == 0 or below[0] == 0:
        return None
    return math.exp(optimize.brentq(gap, float(grid[below[0]]), float(grid[below[0] - 1])))


def compare_phases(
    first: Phase, second: Phase, beta: float = 1.0, *, constant: float = 0.0, constant_se: float = 1.0
) -> PhaseComparison:
    """Compares two phases by their free energies; see the module's text for the equations.

    Args:
        first: one side of a transition.
        second: the other side.
        beta: inverse temperature; the critical n scales with 1 / beta. 1: the posterior; 1 / log n: the tempered one
            that the LLC was measured at.
        constant: F_second - F_first of the O(1) terms, where they are known.
        constant_se: standard deviation of what is not known of them.

    Returns:
        The comparison. ``critical_n`` is None where no flip is to be had: a negative coefficient (no minimum: it
        measures no complexity), a phase both simpler and of lower loss, or a loss difference too large for the
        simpler phase ever to be preferred. Its interval comes from 4,000 joint draws of both losses, both
        coefficients and the O(1) term with a fixed seed; draws that lack a flip count as one at n = 1 / beta (the
        better loss wins from the start) or at infinity (the better loss never wins).

    Raises:
        ValueError: beta or ``constant_se`` out of range.
        TypeError: a phase or a number of another kind.

    Example:
        >>> simple, complex_ = Phase(0.12, 0.0, 2.0, 0.0), Phase(0.10, 0.0, 4.0, 0.0)
        >>> compared = compare_phases(simple, complex_)
        >>> round(compared.critical_n)
        647
        >>> compared.preferred(100).phase, compared.preferred(5000).phase
        ('first', 'second')
        >>> low, high = compared.critical_n_interval
        >>> low < 647 < high
        True
    """
    for name, phase in (("first", first), ("second", second)):
        if not isinstance(phase, Phase):
            raise TypeError(
                f"{name}={phase!r}: expected a Phase, got {type(phase).__name__}. Give Phase(loss, loss_se, llc, "
                "llc_se)."
            )
    for name, value in (("beta", beta), ("constant", constant), ("constant_se", constant_se)):
        check_number(name, value, optional=False)
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta: expected an inverse temperature above 0, got {beta!r}; 1 is the posterior itself.")
    if not (math.isfinite(constant) and math.isfinite(constant_se) and constant_se >= 0):
        raise ValueError(
            f"constant={constant!r}, constant_se={constant_se!r}: expected a finite number and an error of at least 0."
        )
    simple, rich, sign = (first, second, 1.0) if first.llc <= second.llc else (second, first, -1.0)

    def critical(loss: float, llc: float, extra: float) -> float | None:
        return _critical_size(loss, llc, rich.multiplicity - simple.multiplicity, sign * constant + extra)

    size = None
    if simple.llc >= 0:
        size = critical(simple.loss - rich.loss, rich.llc - simple.llc, 0.0)
    if size is None or not math.isfinite(size):
        return PhaseComparison(first, second, beta, constant, constant_se, None, None)
    rng = np.random.default_rng(0)
    loss_error = math.hypot(simple.loss_se, rich.loss_se)
    llc_error = math.hypot(simple.llc_se, rich.llc_se)
    draws = rng.standard_normal((_DRAWS, 3)) * (loss_error, llc_error, constant_se)
    draws += (simple.loss - rich.loss, rich.llc - simple.llc, 0.0)
    sizes = []
    for loss, llc, extra in draws.tolist():
        drawn = critical(loss, llc, extra)
        if drawn is None:
            drawn = math.inf if loss <= 0 else 1.0
        sizes.append(drawn)
    ends = np.quantile(np.array(sizes), ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2), method="nearest")
    return PhaseComparison(
        first, second, beta, constant, constant_se, size / beta, (float(ends[0]) / beta, float(ends[1]) / beta)
    )
