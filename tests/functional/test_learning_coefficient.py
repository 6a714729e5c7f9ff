"""From loss differences to a number with a verdict."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_slt.functional import learning_coefficient, standard_error, summarise
from lightning_slt.functional.learning_coefficient import half_change
from lightning_slt.reasons import NEGATIVE, Kind


def trace_of(level: float = 10.0, spread: float = 1.0, chains: int = 8, draws: int = 200, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return level + spread * torch.randn(chains, draws, generator=gen, dtype=torch.float64)


def test_integrand_is_nbeta_times_the_difference_in_float64() -> None:
    loss, init = torch.tensor([[1.5, 2.0], [0.0, -1.0]]), torch.tensor([[1.0, 1.0], [0.5, 1.0]])
    out = learning_coefficient(loss, init, nbeta=100.0)
    assert out.dtype == torch.float64
    assert out.tolist() == [[50.0, 100.0], [-50.0, -200.0]]


def test_small_differences_of_large_float32_losses_are_taken_in_float64() -> None:
    loss = torch.tensor([[1000.0625]])
    assert learning_coefficient(loss, torch.tensor([[1000.0]]), nbeta=1e6).item() == 62500.0


def test_losses_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"init_loss: shape \(4,\) is not that of loss, \(2, 4\)"):
        learning_coefficient(torch.zeros(2, 4), torch.zeros(4), nbeta=1.0)


def test_settled_chains_are_valid() -> None:
    trace = trace_of()
    s = summarise(trace)
    assert s.valid and s.reasons == () and bool(s.good.all())
    assert s.mean == pytest.approx(float(trace.mean()), abs=1e-12)
    assert s.se == standard_error(trace)
    torch.testing.assert_close(s.per_chain, trace.mean(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_chain_is_left_out_and_never_averaged(bad: float) -> None:
    trace = trace_of()
    trace[3, 117] = bad
    s = summarise(trace)
    rest = torch.cat([trace[:3], trace[4:]])
    assert s.mean == pytest.approx(float(rest.mean()), abs=1e-12)
    assert s.se == standard_error(rest)
    assert s.good.tolist() == [True] * 3 + [False] + [True] * 4
    assert math.isnan(float(s.per_chain[3])) and bool(torch.isfinite(s.per_chain[s.good]).all())
    assert s.valid  # one of eight may fall out


def test_too_many_bad_chains_are_a_reason_that_numbers_them() -> None:
    trace = trace_of()
    trace[[1, 4, 6], 0] = math.nan
    s = summarise(trace)
    assert not s.valid
    assert any("3 of 8" in reason and "[1, 4, 6]" in reason for reason in s.reasons)
    assert math.isfinite(s.mean)


def test_chains_known_to_have_diverged_are_left_out() -> None:
    trace = trace_of()
    trace[0] += 1e6
    diverged = torch.zeros(8, dtype=torch.bool)
    diverged[0] = True
    s = summarise(trace, diverged)
    assert s.mean == pytest.approx(float(trace[1:].mean()), abs=1e-12)


def test_no_good_chain_gives_nan_and_says_so() -> None:
    s = summarise(torch.full((4, 50), math.nan))
    assert not s.valid and s.reasons
    assert all(math.isnan(v) for v in (s.mean, s.se, s.rhat, s.ess))
    assert bool(torch.isnan(s.per_chain).all()) and not bool(s.good.any())


def test_negative_beyond_its_error_is_a_reason() -> None:
    s = summarise(trace_of(level=-5.0))
    assert not s.valid and any("negative" in reason for reason in s.reasons)


def test_negative_within_its_error_is_none() -> None:
    trace = trace_of(level=0.0, spread=1.0)
    s = summarise(trace - trace.mean() - 0.5 * standard_error(trace))
    assert s.mean < 0 and s.valid


@pytest.mark.parametrize("chains", [2, 3, 4, 8])
def test_few_chains_drift_no_more_often_by_chance(chains: int) -> None:
    """Of white noise 19, 9, 6 and 2 % drifted by three standard errors between so few chains; 0.5 % do at the most, and
    6 of 200 traces would once in 1,700 runs. Of changes of eight standard errors 85 % and more are found: 150 of 200
    are four standard deviations fewer."""
    change = 8 * 2 * 10 / math.sqrt(chains * 100)

    def drifting(rise: float) -> int:
        traces = [trace_of(level=5.0, spread=10.0, chains=chains, draws=100, seed=seed) for seed in range(200)]
        verdicts = [summarise(trace + torch.linspace(-rise, rise, 100)).verdict for trace in traces]
        return sum(any(reason.kind is Kind.DRIFTING for reason in verdict) for verdict in verdicts)

    assert drifting(0.0) <= 5
    assert drifting(change) >= 150


@pytest.mark.parametrize("slope", [4.0, -4.0])
def test_drift_is_a_reason(slope: float) -> None:
    s = summarise(trace_of() + torch.linspace(0, slope, 200))
    assert not s.valid
    # second half minus first half is half the rise
    assert any("drift" in reason and f"{slope / 2:+.1f}"[:2] in reason for reason in s.reasons)


def test_chains_at_different_levels_have_not_mixed() -> None:
    trace = trace_of() + 4.0 * torch.arange(8.0).unsqueeze(1)
    s = summarise(trace)
    assert s.rhat > 1.1 and any("not mixed" in reason for reason in s.reasons)


def test_an_r_hat_that_is_hardly_above_its_limit_has_the_digits_that_say_so() -> None:
    trace = trace_of(level=1.0)
    trace[:4] += 0.965
    s = summarise(trace)
    assert 1.1 < s.rhat < 1.101
    assert [reason.split(",")[0] for reason in s.reasons] == ["chains have not mixed: R-hat 1.1005 > 1.1"]


def test_disagreement_that_cannot_matter_for_the_number_is_no_reason() -> None:
    trace = trace_of(level=100.0, spread=0.01)
    trace[0] += 0.05
    s = summarise(trace)
    assert s.rhat > 1.1 and s.valid


def test_half_change_by_hand() -> None:
    trace = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 3.0, 3.0]], dtype=torch.float64)
    change, error = half_change(trace)
    assert change == pytest.approx(2.0)
    assert error == pytest.approx(math.sqrt(2) / math.sqrt(2))  # sd of (1, 3) over sqrt 2
    assert half_change(trace[:, :3]) == (0.0, math.inf)


def test_a_short_trace_has_a_mean_and_does_not_raise() -> None:
    s = summarise(torch.tensor([[1.0], [3.0]]))
    assert s.mean == 2.0 and s.se == pytest.approx(1.0)
    one = summarise(torch.tensor([[1.0]]))
    assert one.mean == 1.0 and math.isnan(one.se)


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_draws_too_few_to_show_mixing_are_not_valid(draws: int) -> None:
    s = summarise(trace_of()[:, :draws])
    assert math.isfinite(s.se) and not s.valid
    few = "1 draw of a chain does" if draws == 1 else f"{draws} draws of a chain do"
    assert f"{few} not show whether the chains have mixed" in "; ".join(s.reasons)
    assert "not show" not in "; ".join(summarise(trace_of()[:, :4]).reasons)


def test_without_an_error_nothing_is_beyond_it() -> None:
    assert not any(NEGATIVE in reason for reason in summarise(torch.tensor([[-1.0]])).reasons)


def test_a_quarter_of_the_chains_is_too_many_to_be_left_out() -> None:
    trace = trace_of()
    trace[[2, 5], 0] = math.nan
    assert [reason.kind for reason in summarise(trace).verdict] == [Kind.DIVERGED]
    assert [reason.kind for reason in summarise(trace[:7]).verdict] == [Kind.DIVERGED]
    assert summarise(trace[3:]).valid


def test_a_chain_that_has_left_has_no_number_of_its_own() -> None:
    s = summarise(trace_of(), torch.arange(8) == 3)
    assert s.per_chain.isnan().tolist() == [k == 3 for k in range(8)]


def apart(level: float, by: float) -> Tensor:
    """Eight chains of little scatter, so far from each other."""
    return trace_of(level=level, spread=0.01 * by) + by * (torch.arange(8.0).unsqueeze(1) - 3.5)


@pytest.mark.parametrize(("level", "half"), [(10.0, 0.5), (0.05, 0.05), (-0.5, 0.05), (-20.0, 1.0)])
def test_chains_apart_by_so_much_that_the_error_is_half_a_tenth_of_the_number_have_not_mixed(
    level: float, half: float
) -> None:
    """Of the number, or of 1 where it is smaller."""
    error = standard_error(apart(level, 1.0))
    for share, mixed in ((0.9, True), (1.2, False), (1.9, False)):
        s = summarise(apart(level, share * half / error))
        assert s.rhat > 1.1 and s.se == pytest.approx(share * half, rel=1e-2)
        assert (Kind.NOT_MIXED in {reason.kind for reason in s.verdict}) is not mixed


@pytest.mark.parametrize(("level", "tolerance"), [(10.0, 1.0), (0.2, 0.1)])
def test_a_drift_counts_from_a_tenth_of_the_number_on(level: float, tolerance: float) -> None:
    """However surely it is seen; of a number below 1, from 0.1 on."""
    for share, drifting in ((0.9, False), (1.1, True)):
        rise = torch.linspace(-1, 1, 200) * share * tolerance
        s = summarise(trace_of(level=level, spread=1e-4 * level) + rise)
        assert (Kind.DRIFTING in {reason.kind for reason in s.verdict}) is drifting


@pytest.mark.parametrize(("errors", "negative"), [(1.0, False), (1.9, False), (2.1, True)])
def test_below_zero_by_two_errors_is_negative(errors: float, negative: bool) -> None:
    trace = trace_of(level=0.0, spread=1.0)
    s = summarise(trace - trace.mean() - errors * standard_error(trace))
    assert s.mean == pytest.approx(-errors * s.se)
    assert (Kind.NEGATIVE in {reason.kind for reason in s.verdict}) is negative


@pytest.mark.parametrize("wide", [slice(None, 50), slice(50, None)], ids=["first", "second"])
def test_the_error_of_the_change_of_one_chain_has_that_of_either_half(wide: slice) -> None:
    trace = trace_of(level=0.0, chains=1, draws=100)
    trace[:, wide] *= 5.0
    first, second = (standard_error(part) for part in trace.split(50, dim=1))
    assert half_change(trace)[1] == pytest.approx(math.hypot(first, second), rel=1e-9)
