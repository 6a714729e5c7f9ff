"""The problems are what they claim to be, and the sampler is exact where a closed form or a quadrature says so."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from tests.cases.make_references import RUNS, load_references
from tests.cases.problems import CASES, Case, deep_linear, digits_mlp, normal_crossing, regular
from tests.cases.reference import effective_sample_size, hmc_reference, kinetic_reference, split_rhat


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _hessian_eigenvalues(case: Case) -> torch.Tensor:
    weights = {name: p.detach().double() for name, p in case.module.named_parameters()}
    (name, weight), *_ = weights.items()
    data = [t.double() for t in case.data]

    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = case.module

        def forward(self) -> torch.Tensor:
            return case.loss_fn(self.module, data)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        return functional_call(Objective(), {f"module.{name}": flat.view_as(weight)}, ())

    return torch.linalg.eigvalsh(torch.func.hessian(loss)(weight.flatten()))


@pytest.mark.parametrize("name", ["regular-10", "regular-10-noisy", "regular-50", "regular-50-noisy"])
def test_regular_cases_have_the_stated_hessian_and_sit_at_the_minimum(name: str) -> None:
    case = CASES[name]()
    assert case.hessian is not None
    np.testing.assert_allclose(_hessian_eigenvalues(case).numpy(), sorted(case.hessian), rtol=1e-4)
    loss = case.loss_fn(case.module, case.data)
    (gradient,) = torch.autograd.grad(loss, list(case.module.parameters()))
    assert gradient.abs().max() < 1e-6
    assert float(loss.detach()) == pytest.approx(0.5 if "noisy" in name else 0.0, abs=0.05)


REALISABLE = [name for name in CASES if name.startswith(("crossing", "rrr", "linear"))] + ["regular-10", "regular-50"]


@pytest.mark.parametrize("name", REALISABLE)
def test_realisable_cases_have_zero_loss_and_exact_sufficient_statistics(name: str) -> None:
    case = CASES[name]()
    assert case.loss_at_anchor() < 1e-12
    generator = torch.Generator().manual_seed(1)
    module = case.module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
        full = case.loss_fn(module, [t.double() for t in case.data])
        assert case.sufficient is not None
        assert float(case.loss_fn(module, case.sufficient)) == pytest.approx(float(full), rel=1e-5)


def test_deep_linear_anchor_has_the_rank_of_the_truth_in_every_layer() -> None:
    case = deep_linear((6, 5, 7, 4), 2, n=200, singular_value=2.0)
    for parameter in case.module.parameters():
        values = torch.linalg.svdvals(parameter.detach())
        np.testing.assert_allclose(values[:2], 2.0 ** (1 / 3), rtol=1e-5)
        assert values[2:].max() < 1e-5


def test_digits_mlp_is_a_trained_network_of_26122_weights() -> None:
    case = digits_mlp()
    assert case.num_weights == 26_122 and case.n == 1797
    assert case.nbeta == pytest.approx(239.8, abs=0.1)
    assert case.loss_at_anchor() == pytest.approx(0.01264, abs=2e-4)


def test_hmc_matches_the_closed_form_of_a_regular_model() -> None:
    case = regular(10)
    assert case.truth == pytest.approx(4.4976, abs=1e-3)
    result = hmc_reference(case, num_chains=128, num_draws=60, num_warmup=40)
    assert result.mean == pytest.approx(4.4976, abs=4 * result.se)
    assert result.se < 0.06
    assert result.rhat < 1.05
    assert 0.6 < result.acceptance < 0.99


def test_hmc_matches_the_closed_form_under_strong_localisation_and_with_noise() -> None:
    case = regular(eigenvalues=[3.0, 1.0, 0.3, 0.1], noise=1.0, n=400, nbeta=50.0, gamma=20.0)
    assert case.truth == pytest.approx(1.1126, abs=1e-3)
    result = hmc_reference(case, num_chains=128, num_draws=60, num_warmup=40)
    assert result.mean == pytest.approx(1.1126, abs=4 * result.se)
    assert result.se < 0.03


@pytest.mark.parametrize(("powers", "exact"), [pytest.param((1, 1), 0.3473, marks=pytest.mark.slow), ((1, 2), 0.2021)])
def test_hmc_matches_quadrature_on_a_normal_crossing(powers: tuple[int, ...], exact: float) -> None:
    case = normal_crossing(powers)
    assert case.truth == pytest.approx(exact, abs=1e-4)
    result = hmc_reference(case, num_chains=256, num_draws=150, num_warmup=50, step_factors=(1.0, 0.5, 0.25, 0.125))
    assert result.mean == pytest.approx(exact, abs=4 * result.se)
    assert result.se < 0.04 * exact
    assert result.mean < 0.9 * case.asymptotic[0]  # the asymptotic value is not the finite-n one


@pytest.mark.parametrize("loop", [False, True], ids=["batched", "looped"])
def test_whitened_coordinates_give_the_closed_form_of_a_steep_regular_model_in_few_steps(loop: bool) -> None:
    case = regular(eigenvalues=[1000.0, 30.0, 1.0, 0.1], noise=1.0, n=400, nbeta=50.0, gamma=20.0)
    chains = 16 if loop else 128
    result = hmc_reference(case, num_chains=chains, num_draws=60, num_warmup=30, whiten=True, loop=loop)
    assert case.truth == pytest.approx(1.4504, abs=1e-3)
    assert result.mean == pytest.approx(case.truth, abs=4 * result.se)
    assert result.se < 0.03 * case.truth * math.sqrt(128 / chains)
    assert result.mean_leapfrog < 8  # the potential is round there: the steepest weight would ask for dozens


@pytest.mark.slow
def test_whitened_coordinates_leave_a_singular_target_as_it_is() -> None:
    case, stored = CASES["rrr-5-3-5-r1"](), load_references()["rrr-5-3-5-r1"]
    result = hmc_reference(case, num_chains=64, num_draws=80, num_warmup=60, whiten=True)
    assert result.mean == pytest.approx(stored["mean"], abs=3 * math.hypot(result.se, stored["se"]))
    assert result.se < 0.03 * stored["mean"]


def test_float32_gradients_agree_with_float64() -> None:
    case = regular(10)
    result = hmc_reference(case, num_chains=64, num_draws=30, num_warmup=30, dtype=torch.float32)
    assert result.mean == pytest.approx(4.4976, abs=4 * result.se)


def test_hmc_repeats_with_its_seed() -> None:
    case = normal_crossing((1, 1))
    runs = [hmc_reference(case, num_chains=4, num_draws=10, num_warmup=10, seed=seed).trace for seed in (0, 0, 1)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_kinetic_chains_agree_with_the_closed_form_at_two_steps() -> None:
    """Their error is of second order in the step, and there is none on a quadratic."""
    case = regular(10)
    for step in (0.02, 0.05):  # the steepest precision is 580: stable below 0.083
        result = kinetic_reference(
            case, step=step, friction=2.0, num_chains=64, num_draws=40, num_warmup=10, steps_a_draw=25
        )
        assert result.mean == pytest.approx(4.4976, abs=4 * result.se)
        assert result.se < 0.03 * 4.4976


@pytest.mark.slow
def test_kinetic_chains_agree_with_hmc_on_a_singular_model() -> None:
    case, stored = CASES["rrr-5-3-5-r1"](), load_references()["rrr-5-3-5-r1"]
    result = kinetic_reference(
        case, step=0.015, friction=2.0, num_chains=32, num_draws=30, num_warmup=10, steps_a_draw=50
    )
    assert result.mean == pytest.approx(stored["mean"], abs=3 * math.hypot(result.se, stored["se"]))
    assert result.se < 0.03 * stored["mean"]


def test_diagnostics_on_a_known_autoregression() -> None:
    """AR(1) with coefficient 0.8: tau = (1 + 0.8) / (1 - 0.8) = 9."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((16, 5000))
    trace = np.empty_like(noise)
    trace[:, 0] = noise[:, 0] / math.sqrt(1 - 0.64)
    for t in range(1, noise.shape[1]):
        trace[:, t] = 0.8 * trace[:, t - 1] + noise[:, t]
    assert trace.size / effective_sample_size(trace) == pytest.approx(9.0, rel=0.1)
    assert effective_sample_size(noise) == pytest.approx(noise.size, rel=0.1)
    assert split_rhat(noise) == pytest.approx(1.0, abs=0.002)
    shifted = noise + np.arange(16)[:, None]
    assert split_rhat(shifted) > 3.0


# ---------------------------------------------------------------------------------------------------- stored references

STORED = load_references()


def test_every_required_reference_is_stored() -> None:
    assert set(STORED) <= set(RUNS)
    assert set(RUNS) - set(STORED) <= {"digits-mlp-gamma10"}  # a quarter of an hour: made on demand


@pytest.mark.parametrize("name", list(STORED))
def test_stored_references_are_converged_and_belong_to_the_case(name: str) -> None:
    entry, case = STORED[name], CASES[name]()
    assert entry["n"] == case.n
    # the default localisation is a sum over the trained weights, whose last bits are the machine's
    assert (entry["gamma"], entry["nbeta"]) == pytest.approx((case.gamma, case.nbeta), rel=1e-6)
    assert entry["loss_at_anchor"] == pytest.approx(case.loss_at_anchor(), rel=1e-3, abs=1e-10)
    assert entry["se"] < (0.02 if name.startswith("crossing") else 0.015) * entry["mean"]
    assert entry["rhat"] < 1.03
    # without a Metropolis test nothing is rejected
    assert entry["acceptance"] == 1.0 if RUNS[name].get("kinetic") else 0.6 < entry["acceptance"] < 0.97
    if entry["exact"] is not None:
        assert case.truth == pytest.approx(entry["exact"], rel=1e-6)
        assert abs(entry["mean"] - entry["exact"]) < 3 * entry["se"]
    if entry["asymptotic"] is not None:
        assert (entry["asymptotic"], entry["multiplicity"]) == case.asymptotic


@pytest.mark.parametrize(
    ("name", "recorded", "error"),
    [("rrr-8-4-8-r2", 18.99, 0.09), ("rrr-5-3-5-r1", 7.67, None), ("linear-6-6-6-6-r2", 14.28, 0.17)],
)
def test_stored_references_agree_with_the_recorded_exact_sampling(
    name: str, recorded: float, error: float | None
) -> None:
    """Earlier measurements by an independent MALA at nbeta = 145, gamma = 1 (5-3-5 without an error: 2 %)."""
    bound = 0.02 * recorded if error is None else 3 * math.hypot(STORED[name]["se"], error)
    assert abs(STORED[name]["mean"] - recorded) < bound


@pytest.mark.parametrize("family", ["rrr-8-4-8-r2", "linear-6-6-6-6-r2"])
def test_the_gap_to_the_asymptotic_value_shrinks_with_n(family: str) -> None:
    entries = [STORED[name] for name in (f"{family}-n300", family, f"{family}-n10000")]
    gaps = [1 - entry["mean"] / entry["asymptotic"] for entry in entries]
    assert gaps[0] > gaps[1] > gaps[2] > -0.01
    assert gaps[1] < 0.10
