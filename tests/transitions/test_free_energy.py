"""Free energies of two phases against quadrature on polynomial potentials."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import integrate, optimize

from lightning_slt import Phase, compare_phases


def free_energy(n: float, power: int, loss: float) -> float:
    """-log of the integral of exp(-n (loss + w^power)): learning coefficient 1 / power."""
    value, _ = integrate.quad(lambda w: math.exp(-n * w**power), -1, 1, epsabs=0, epsrel=1e-10, limit=400)
    return n * loss - math.log(value)


@pytest.mark.parametrize(("simple", "rich", "gap"), [(4, 2, 0.01), (6, 2, 0.02), (8, 2, 0.03), (6, 4, 0.002)])
def test_the_critical_n_of_polynomial_potentials_is_that_of_quadrature(simple: int, rich: int, gap: float) -> None:
    exact = optimize.brentq(lambda n: free_energy(n, simple, gap) - free_energy(n, rich, 0.0), 5.0, 1e5)
    first, second = Phase(gap, 0.0, 1 / simple, 0.0), Phase(0.0, 0.0, 1 / rich, 0.0)
    # the integral of exp(-n w^k) is 2 Gamma(1 + 1 / k) n^(-1 / k)
    constant = math.lgamma(1 + 1 / simple) - math.lgamma(1 + 1 / rich)
    known = compare_phases(first, second, constant=constant, constant_se=0.0)
    assert known.critical_n == pytest.approx(exact, rel=0.01)
    unknown = compare_phases(first, second)
    low, high = unknown.critical_n_interval
    assert low <= exact <= high
    assert unknown.preferred(exact).phase == "undecided"


def test_leading_order_constants_and_quadrature_side_by_side() -> None:
    """w^8 at a loss of 0.02 against w^2: within 5 % at leading order, within 1 % with the constants."""
    exact = optimize.brentq(lambda n: free_energy(n, 8, 0.02) - free_energy(n, 2, 0.0), 5.0, 1e4)
    first, second = Phase(0.02, 0.0, 1 / 8, 0.0), Phase(0.0, 0.0, 1 / 2, 0.0)
    constant = math.lgamma(1 + 1 / 8) - math.lgamma(1 + 1 / 2)
    leading = compare_phases(first, second).critical_n
    full = compare_phases(first, second, constant=constant, constant_se=0.0).critical_n
    assert (round(leading, 1), round(full, 1), round(exact, 1)) == (82.8, 86.7, 86.7)


def test_the_order_of_the_phases_does_not_matter() -> None:
    a, b = Phase(0.12, 0.001, 2.0, 0.1), Phase(0.10, 0.001, 4.0, 0.1)
    one, two = compare_phases(a, b, constant=0.3), compare_phases(b, a, constant=-0.3)
    assert one.critical_n == pytest.approx(two.critical_n)
    assert one.critical_n_interval == pytest.approx(two.critical_n_interval)
    assert one.preferred(500).log_odds == pytest.approx(-two.preferred(500).log_odds)


def test_the_odds_are_even_at_the_critical_n_and_turn_there() -> None:
    compared = compare_phases(Phase(0.12, 0.0, 2.0, 0.0), Phase(0.10, 0.0, 4.0, 0.0, 2.0), constant_se=0.0)
    n = compared.critical_n
    assert compared.preferred(n).log_odds == pytest.approx(0.0, abs=1e-6)
    assert (compared.preferred(0.5 * n).phase, compared.preferred(2 * n).phase) == ("first", "second")


@pytest.mark.parametrize("gap", [0.06, 0.08, 0.1])
def test_a_simple_phase_that_only_its_multiplicity_puts_ahead_has_a_critical_n(gap: float) -> None:
    """At multiplicity 1 the loss of the simple phase is too high for it ever to be preferred."""
    simple, rich = Phase(0.1 + gap, 0.0, 0.5, 0.0, 2.0), Phase(0.1, 0.0, 0.6, 0.0)
    assert compare_phases(Phase(0.1 + gap, 0.0, 0.5, 0.0), rich).critical_n is None
    compared = compare_phases(simple, rich, constant_se=0.0)
    exact = optimize.brentq(lambda n: n * gap - 0.1 * math.log(n) - math.log(math.log(n)), 6.0, 1e3)
    assert compared.critical_n == pytest.approx(exact)
    assert compared.critical_n_interval == pytest.approx((exact, exact))
    assert (compared.preferred(0.9 * exact).log_odds > 0, compared.preferred(1.1 * exact).log_odds > 0) == (True, False)


def test_the_critical_n_scales_with_the_temperature() -> None:
    a, b = Phase(0.12, 0.0, 2.0, 0.0), Phase(0.10, 0.0, 4.0, 0.0)
    assert compare_phases(a, b, beta=0.25).critical_n == pytest.approx(4 * compare_phases(a, b).critical_n)


@pytest.mark.parametrize("gap", [1e-6, 1e-3, 1.0])
def test_what_the_constant_does_to_a_critical_n_of_phases_of_nearly_the_same_llc(gap: float) -> None:
    """There it is the constant that the loss catches up with: 0.02 N = 5 at N = 250."""
    first, second = Phase(0.12, 0.0, 2.0, 0.0), Phase(0.10, 0.0, 2.0 + gap, 0.0)
    compared = compare_phases(first, second, constant=5.0)
    exact = optimize.brentq(lambda n: 0.02 * n - gap * math.log(n) - 5.0, 100.0, 1e4)
    assert compared.critical_n == pytest.approx(exact)
    low, high = ((c + gap * math.log(exact)) / 0.02 for c in (5 - 1.96, 5 + 1.96))
    assert compared.critical_n_interval == pytest.approx((low, high), rel=0.02)


def test_an_error_of_any_size_leaves_the_odds_undecided() -> None:
    compared = compare_phases(Phase(0.12, 1e200, 2.0, 1e180), Phase(0.10, 0.0, 4.0, 0.0))
    assert compared.preferred(100).phase == "undecided" and compared.preferred(100).log_odds_se == pytest.approx(1e202)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Phase(0.12, 0.0, -3.0, 0.0), Phase(0.10, 0.0, 4.0, 0.0)),
        (Phase(0.10, 0.0, 2.0, 0.0), Phase(0.12, 0.0, 4.0, 0.0)),
        (Phase(2.0, 0.0, 2.0, 0.0), Phase(0.10, 0.0, 4.0, 0.0)),
        (Phase(0.1, 0.0, 2.0, 0.0), Phase(0.1, 0.0, 2.0, 0.0)),
    ],
    ids=["a saddle", "simpler and better", "never ahead", "equal"],
)
def test_no_critical_n_where_none_is_to_be_had(first: Phase, second: Phase) -> None:
    compared = compare_phases(first, second)
    assert compared.critical_n is None
    assert compared.critical_n_interval is None


def test_errors_of_the_inputs_widen_the_interval_and_the_odds() -> None:
    sharp = compare_phases(Phase(0.12, 0.0, 2.0, 0.0), Phase(0.10, 0.0, 4.0, 0.0), constant_se=0.0)
    blunt = compare_phases(Phase(0.12, 0.004, 2.0, 0.3), Phase(0.10, 0.004, 4.0, 0.3), constant_se=0.0)
    assert np.ptp(sharp.critical_n_interval) == pytest.approx(0.0, abs=1e-6)
    assert blunt.critical_n_interval[1] > 1.5 * blunt.critical_n_interval[0]
    expected = math.sqrt(2 * (100 * 0.004) ** 2 + 2 * (0.3 * math.log(100)) ** 2)
    assert blunt.preferred(100).log_odds_se == pytest.approx(expected)


def test_mistakes_are_named() -> None:
    a = Phase(0.1, 0.0, 2.0, 0.0)
    with pytest.raises(ValueError, match="llc: expected a finite"):
        Phase(0.1, 0.0, math.nan, 0.0)
    with pytest.raises(ValueError, match="beta"):
        compare_phases(a, a, beta=0.0)
    with pytest.raises(ValueError, match="n \\* beta above e"):
        compare_phases(a, a).preferred(2)


def test_what_is_no_number_or_phase_is_named() -> None:
    phase = Phase(0.1, 0.0, 2.0, 0.0)
    for name in ("loss", "loss_se", "llc", "llc_se", "multiplicity"):
        values: dict[str, Any] = {"loss": 0.1, "loss_se": 0.0, "llc": 2.0, "llc_se": 0.0, name: "a"}
        with pytest.raises(TypeError, match=f"{name}='a': expected a number, got str"):
            Phase(**values)
    with pytest.raises(TypeError, match=r"second=3: expected a Phase, got int\. Give Phase\(loss"):
        compare_phases(phase, 3)  # type: ignore[arg-type]
    for name in ("beta", "constant", "constant_se"):
        with pytest.raises(TypeError, match=f"{name}='a': expected a number, got str"):
            compare_phases(phase, phase, **{name: "a"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="n='a': expected a number"):
        compare_phases(phase, phase).preferred("a")  # type: ignore[arg-type]


def test_a_flip_below_e_samples_is_none() -> None:
    """``5 n = log n + 4`` at n = 0.78: the richer phase is preferred wherever the free energy has a meaning."""
    compared = compare_phases(Phase(5.0, 0.0, 1.0, 0.0), Phase(0.0, 0.0, 2.0, 0.0), constant=4.0)
    assert compared.critical_n is None and compared.critical_n_interval is None
    assert compared.preferred(2.8).log_odds == pytest.approx(4.0 + math.log(2.8) - 5.0 * 2.8)


def test_the_interval_has_no_upper_end_where_the_losses_may_be_equal() -> None:
    """A loss that is better by two and a half standard errors has one, by one it has not."""
    rich = Phase(0.10, 0.0, 4.0, 0.0)
    ends = [compare_phases(Phase(0.12, se, 2.0, 0.0), rich).critical_n_interval for se in (0.008, 0.02)]
    assert ends[0] is not None and 1.0 < ends[0][0] < 647 < ends[0][1] < math.inf
    assert ends[1] is not None and 1.0 <= ends[1][0] < 647 and ends[1][1] == math.inf
