"""The verdict on chains: reasons are data, of a kind to select by, and plain sentences in records."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import MALA, LeimkuhlerMatthews, estimate_llc
from lightning_slt import verdict as verdict_module
from lightning_slt.estimate import ChainSettings, run_chains
from lightning_slt.functional import LocalPosterior, standard_error, summarise
from lightning_slt.functional.owed import gain_of, owed_by
from lightning_slt.publish.diagnoses import diagnostics, invalid_sentence, verdict_sentence
from lightning_slt.reasons import Kind, Reason
from lightning_slt.record import Estimate
from lightning_slt.sampling import cooling
from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.collective import Alone
from lightning_slt.sampling.given_data import source_of
from lightning_slt.sampling.lean import lean_of
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.readings import heat_of, steepness_of, virial_readings
from lightning_slt.sampling.rounding import weight_rounding
from lightning_slt.sampling.samplers import SGLD, KineticLangevin, RMSpropSGLD, Sampler
from lightning_slt.sampling.segment import Segment
from lightning_slt.verdict import BAD_FOR_COVARIANCES, fit_for_covariances, read_llc


def half_square(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean() / 2


def problem() -> tuple[nn.Module, TensorDataset]:
    g = torch.Generator().manual_seed(0)
    x, net = torch.randn(96, 4, generator=g), nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.randn(1, 4, generator=g))
    return net, TensorDataset(x, net(x).detach() + 0.3 * torch.randn(96, 1, generator=g))


def drawn_by(sampler: Sampler) -> tuple[Drawn, Chains]:
    net, data = problem()
    objective = Objective(net, half_square)
    source = source_of(data, 16, objective.device, 0)
    settings = ChainSettings(sampler, 4, 40, 10, 2, seed=7, method="sequential")
    return run_chains(objective, source, settings)


CASES = {
    "cold": (SGLD(lr=1e-6), Kind.NOT_ARRIVED, "the chains have not reached their width in 90 steps"),
    "hot": (SGLD(lr=0.05), Kind.HEAT_OF_STEP, "of the estimate is heat of the step"),
    "shared noise": (LeimkuhlerMatthews(lr=0.05), Kind.STEP_TOO_LARGE, "step size 0.05 is too large: SGLD would have "),
    "momenta": (KineticLangevin(lr=0.02), Kind.HEAT_OF_MINIBATCHES, "of the estimate is heat of the minibatches"),
}


@pytest.mark.parametrize("sampler", [pytest.param(SGLD(lr=1e-6), marks=pytest.mark.slow), LeimkuhlerMatthews(lr=1e-6)])
def test_a_step_that_was_given_too_small_is_what_is_to_be_changed(sampler: Sampler) -> None:
    """It had been the minibatches' noise that was said to keep it small, and a larger batch to help."""
    found = read_llc(*drawn_by(sampler))
    [reason] = [reason for reason in found.reasons if "have not reached their width" in reason]
    assert reason.endswith(": a larger lr, or none given, to have it found") and "batch" not in reason
    net, data = problem()
    assert estimate_llc(net, data, half_square, batch_size=16, num_chains=4, method="sequential").valid


@pytest.mark.parametrize("case", CASES)
def test_covariances_are_not_valid_for_reasons_of_some_kinds_whatever_the_sentence(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, kind, says = CASES[case]
    drawn, chains = drawn_by(sampler)
    [sentence] = [reason for reason in read_llc(drawn, chains).reasons if says in reason]
    said, _ = fit_for_covariances(drawn, chains)
    whole = f"the learning coefficient of these chains: {sentence}"
    assert (whole in said) is (kind in BAD_FOR_COVARIANCES)
    monkeypatch.setattr(verdict_module, "BAD_FOR_COVARIANCES", frozenset({kind}))
    assert fit_for_covariances(drawn, chains)[0] == (whole,)
    monkeypatch.setattr(verdict_module, "BAD_FOR_COVARIANCES", frozenset(Kind) - {kind})
    assert whole not in fit_for_covariances(drawn, chains)[0]


def test_records_have_plain_sentences() -> None:
    """They are pickled, and loaded with ``weights_only``."""
    drawn, chains = drawn_by(SGLD(lr=0.05))
    estimate = read_llc(drawn, chains)
    assert not estimate.valid and all(type(reason) is str for reason in estimate.reasons)
    assert len(estimate.kinds) == len(estimate.reasons) and set(estimate.kinds) <= set(Kind.__members__)
    assert (estimate.num_chains, estimate.num_draws, estimate.num_steps_bw_draws, estimate.seed) == (4, 40, 2, 7)


def test_a_summary_has_kinds_and_their_sentences() -> None:
    found = summarise(torch.full((2, 8), torch.nan))
    assert found.verdict == (Reason(Kind.NO_CHAIN, "no chain stayed finite"),)
    assert found.reasons == ("no chain stayed finite",) and not found.valid
    up = summarise(torch.full((4, 8), 1e6), torch.ones(4, dtype=torch.bool))
    said = "every chain diverged: all are finite, at losses above those of the posterior"
    assert up.verdict == (Reason(Kind.NO_CHAIN, said),) and math.isnan(up.mean)
    some = summarise(torch.tensor([[1e6] * 8, [math.nan] * 8]), torch.ones(2, dtype=torch.bool))
    assert some.reasons == (said.replace("all", "1 of 2"),)
    kinds = [reason.kind for reason in summarise(-torch.arange(100.0).expand(4, 100)).verdict]
    assert Kind.NEGATIVE in kinds and Kind.DRIFTING in kinds


def test_chains_that_are_finite_and_diverged_are_not_said_to_be_anything_else() -> None:
    """A step five times as large as a stable one multiplies them by about ten."""
    net, data = problem()
    settings: dict[str, Any] = {"num_chains": 4, "num_draws": 8, "num_burnin_steps": 0, "num_steps_bw_draws": 1}
    found = estimate_llc(net, data, half_square, sampler=SGLD(lr=1.0), method="sequential", **settings)
    assert found.finite_share == 1.0 and found.num_bad_chains == 4 and found.kinds == ("NO_CHAIN",)
    assert found.reasons[0].startswith("every chain diverged: all are finite")
    said = f"{invalid_sentence(found, found.reasons)} {verdict_sentence(found)} {diagnostics([found])}"
    assert "A smaller lr, a larger batch_size or a smaller nbeta" in said and "left the finite numbers" not in said


@pytest.mark.parametrize("lr", [pytest.param(0.5, marks=pytest.mark.slow), 50.0])
def test_of_steps_that_are_hardly_ever_accepted_it_is_said_and_that_a_smaller_one_helps(lr: float) -> None:
    net, data = problem()
    found = estimate_llc(net, data, half_square, sampler=MALA(lr=lr), num_chains=4, num_draws=50)
    assert found.acceptance is not None and found.acceptance < 0.01
    assert found.kinds[0] == "NOT_ACCEPTED" and "NOT_ARRIVED" in found.kinds
    share = f"{100 * found.acceptance:.2g}% at a step size of {lr:.2g}"
    assert found.reasons[0] == f"hardly any step was accepted ({share}): a smaller lr"
    said = f"{'; '.join(found.reasons)} {invalid_sentence(found, found.reasons)} {diagnostics([found])}"
    assert "ore draws" not in said and "A smaller lr helps" in said
    assert f"hardly a step of the chains was accepted ({share})" in verdict_sentence(found)


@pytest.mark.slow
def test_few_accepted_steps_are_no_reason_where_the_chains_have_settled() -> None:
    net, data = problem()
    found = estimate_llc(net, data, half_square, sampler=MALA(lr=0.25), num_chains=4, num_draws=400)
    assert found.acceptance is not None and found.acceptance < 0.1 and found.valid, found


def downhill(**settings: Any) -> Estimate:
    """Of chains that start at a maximum of their loss."""
    net, data = problem()
    return estimate_llc(net, data, lambda module, batch: -half_square(module, batch), num_chains=4, **settings)


def test_width_is_not_held_against_chains_that_run_downhill() -> None:
    found = downhill(localization=1000.0, num_draws=40, batch_size=16, method="sequential")
    assert [reason.split(":")[0] for reason in found.reasons] == ["negative beyond its error"]


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 5))])
def test_chains_that_run_downhill_each_as_far_as_it_happens_to_are_said_to_do_so(seed: int) -> None:
    """From a maximum they run away exponentially: the error of their mean is as large as the mean."""
    found = downhill(num_draws=100, tolerance=0.1, seed=seed)
    assert -2 * found.se < found.mean < 0 and found.virial < -1.0
    assert found.kinds.count("NEGATIVE") == 1 and "NOT_ARRIVED" in found.kinds
    assert "the chains find lower losses: the weights are not at a minimum (chains run downhill)" in found.reasons
    said = f"{'; '.join(found.reasons)} {invalid_sentence(found, found.reasons)} {diagnostics([found])}"
    assert "ore draws" not in said
    assert "Usual early in training, at a saddle, while the learning rate is large, and under strong" in said
    assert found.comparable, "a state of the weights, as where it is below zero by more than its error"


class Far(nn.Module):
    """A linear map whose weights are far from zero: ``x @ (w - c)``, exact in float32 at its minimum."""

    def __init__(self, norm: float) -> None:
        super().__init__()
        direction = torch.randn(6, generator=torch.Generator().manual_seed(5))
        self.register_buffer("c", norm * direction / direction.norm())
        self.w = nn.Parameter(self.c.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w - self.c)


def far_data(dtype: torch.dtype = torch.float32, noise: float = 0.3) -> tuple[TensorDataset, float]:
    """Noisy labels whose least-squares solution is zero; with the learning coefficient at gamma = 1."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1000, 6, generator=g).double(), noise * torch.randn(1000, generator=g).double()
    q, _ = torch.linalg.qr(x)
    held = 1000 / math.log(1000) * torch.linalg.eigvalsh(x.T @ x / 1000)
    return TensorDataset(x.to(dtype), (y - q @ (q.T @ y)).to(dtype)), float(0.5 * (held / (held + 1)).sum())


FAR = {"1": (1.0, 0.3), "2e5": (2e5, 0.3), "5e5-noisy": (5e5, 1.0), "1e6": (1e6, 0.3)}


@pytest.mark.parametrize(
    "norm", [pytest.param(norm, marks=pytest.mark.slow if norm == "5e5-noisy" else ()) for norm in FAR]
)
def test_weights_too_large_for_their_type_are_named(norm: str) -> None:
    """At a norm of 1e6, where the share is 0.11, the LLC is 18 % too high, and with labels three times as noisy
    36 % at 5e5; at 2e5 the share is 0.006, and it is less than 1 %."""
    far, noise = FAR[norm]
    data, truth = far_data(noise=noise)
    found = estimate_llc(Far(far), data, half_square, localization=1.0, batch_size=64, method="sequential")
    named = [reason for reason in found.reasons if reason.startswith("the weights are too large for float32")]
    if far > 2e5:
        assert len(named) == 1 and "float64" in named[0] and found.mean > 1.1 * truth
    else:
        assert found.valid and found.mean == pytest.approx(truth, abs=2 * found.se)


def test_in_float64_they_are_not_too_large() -> None:
    data, truth = far_data(torch.float64)
    found = estimate_llc(Far(1e6).double(), data, half_square, localization=1.0, method="sequential")
    assert found.valid and found.mean == pytest.approx(truth, abs=2 * found.se)


@pytest.mark.parametrize(
    ("size", "lr", "share"),
    [
        (2.0**20, 0.1, 3 * 2.0**-6 / 12 / 0.1),
        (2.0**20, 1e-6, 1.0),
        (1.0, 1e-4, 3 * 2.0**-46 / 12 / 1e-4),
        (0.0, 1e-4, 0.0),
    ],
)
def test_the_share_that_rounding_adds(size: float, lr: float, share: float) -> None:
    """Weights of 2^20 are 2^-3 apart in float32, of 1 they are 2^-23."""
    module, (data, _) = Far(1.0), far_data()
    with torch.no_grad():
        module.w.fill_(-size)
    objective = Objective(module, half_square)
    chains = Chains(
        objective, source_of(data, 64, objective.device, 0), LocalPosterior(1.0, 1.0), SGLD(), 2, 0, Alone()
    )
    assert weight_rounding(chains, lr) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_ordinary_size_are_never_too_large(dtype: torch.dtype) -> None:
    """A half-precision module has float32 masters, and it is their spacing that counts."""
    net, data = problem()
    net = net.to(dtype)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return half_square(module, (x.to(next(module.parameters()).dtype), y))

    objective = Objective(net, loss)
    source = source_of(data, 16, objective.device, 0)
    drawn, chains = run_chains(objective, source, ChainSettings(None, 4, 40, 10, 2, seed=7, method="sequential"))
    assert chains.objective.anchor.dtype == torch.float32
    assert weight_rounding(chains, drawn.lr) < 1e-8
    assert not any("too large for" in reason for reason in read_llc(drawn, chains).reasons)


def with_heat(sampler: Sampler, share: float = 0.2) -> tuple[Drawn, Chains]:
    """Chains at an LLC of 2, each a little apart, with a heat of this share of it that slowly goes up and down, three
    tenths of it the minibatches'; of a square, but for that."""
    drawn, chains = drawn_by(sampler)
    nbeta, own = chains.posterior.nbeta, 1.0 + 0.05 * torch.arange(4.0, dtype=torch.float64)[:, None]
    slowly = 1.0 + 0.5 * torch.sin(torch.arange(20.0, dtype=torch.float64) * math.pi / 10)
    force = 2.0 * share * 8 / (sampler.heating(drawn.lr).step * nbeta**2)
    shown = Segment(
        drawn.segment.chains,
        (2.0 / nbeta * own).expand(4, 80),
        force * own.flip(0) * slowly,
        (4.0 / nbeta * own).expand(4, 20),
        torch.full((4, 20), 1e-3, dtype=torch.float64),
        drawn.segment.anchors,
        noise_square=0.3 * force * own,
    )
    return replace(drawn, segment=shown), chains


@pytest.mark.parametrize("sampler", [SGLD(lr=1e-3), LeimkuhlerMatthews(lr=1e-3)], ids=["SGLD", "shared noise"])
def test_what_is_taken_off_and_what_the_error_has_of_it(sampler: Sampler) -> None:
    """Of each chain its own heat, and of all the lean; where noise is shared the minibatches' part alone, and the lean
    is an error all the same."""
    drawn, chains = with_heat(sampler)
    segment, posterior = drawn.segment, chains.posterior
    shared = isinstance(sampler, LeimkuhlerMatthews)
    heat = heat_of(segment, drawn.lr, posterior, shared=shared)
    lean = lean_of(segment, drawn.lr, posterior, segment.finite)
    assert lean > 0.004 and 0 < heat.noise < heat.discretisation
    found = read_llc(drawn, chains)
    off = heat.each + (0.0 if shared else lean)
    raw = posterior.nbeta * segment.difference.mean(dim=1)
    torch.testing.assert_close(found.per_chain, raw - off, rtol=1e-9, atol=0)
    assert found.mean == pytest.approx(float((raw - off).mean()), rel=1e-9)
    assert found.step_bias == pytest.approx(float(off.mean()), rel=1e-9)
    assert found.chain_loss == pytest.approx(found.init_loss + found.mean / posterior.nbeta, rel=1e-12)
    assert found.lean == pytest.approx(lean, rel=1e-9)
    unsure = cooling._unsure_share(segment, segment.finite) * heat.noise
    assert found.unsure_heat == pytest.approx(unsure, rel=1e-9)
    parts = (standard_error(found.trace), found.owed, lean, unsure)
    assert found.se == pytest.approx(math.hypot(*parts), rel=1e-4)


@pytest.mark.parametrize(
    ("level", "scatter", "share"),
    [
        (1.0, 0.0, 0.0),
        (1.05, 0.0, 0.2),
        (0.95, 0.0, 0.2),
        (1.05, 0.03, 0.2 - 4 * 0.03 / math.sqrt(3)),
        (1.05, 0.1, 0.0),
        (0.5, 0.0, 1 / 3),
    ],
)
def test_minibatches_heat_is_the_less_sure_the_further_the_loss_is_from_a_square(
    level: float, scatter: float, share: float
) -> None:
    """The LLC beside half the work of the gradient, in units of that; chains scatter around it to and fro."""
    drawn, _ = with_heat(SGLD(lr=1e-3))
    own = level + scatter * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    shown = replace(
        drawn.segment,
        difference=own.expand(4, drawn.segment.steps),
        grad_dot=torch.full_like(drawn.segment.grad_dot, 2.0),
    )
    assert cooling._unsure_share(shown, shown.finite) == pytest.approx(share, abs=1e-12)
    assert cooling._unsure_share(shown, torch.tensor([True, False, False, False])) == 1 / 3


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [(SGLD(lr=1e-3), "HEAT_OF_STEP"), (LeimkuhlerMatthews(lr=1e-3), "STEP_TOO_LARGE")],
    ids=["SGLD", "shared noise"],
)
def test_a_step_is_judged_by_its_heat_and_its_lean_together(sampler: Sampler, kind: str) -> None:
    """Neither is a quarter of the estimate by itself; beyond half of it nothing is taken off by SGLD."""
    for share, found in ((0.22, False), (0.247, True), (0.6, True)):
        drawn, chains = with_heat(sampler, share)
        heat = heat_of(drawn.segment, drawn.lr, chains.posterior)
        lean = lean_of(drawn.segment, drawn.lr, chains.posterior, drawn.segment.finite)
        level = chains.posterior.nbeta * float(drawn.segment.difference.mean())
        assert share > 0.5 or heat.of_sgld < 0.25 * level
        assert (heat.of_sgld + lean >= 0.25 * level) is found
        estimate = read_llc(drawn, chains)
        assert (kind in estimate.kinds) is found
        if share > 0.5 and kind == "HEAT_OF_STEP":
            assert estimate.step_bias == 0.0 and estimate.mean == pytest.approx(level, rel=1e-6)


def test_chains_with_momenta_have_no_lean() -> None:
    drawn, chains = with_heat(KineticLangevin(lr=1e-3), 0.1)
    assert lean_of(drawn.segment, drawn.lr, chains.posterior, drawn.segment.finite) > 0.0
    assert read_llc(drawn, chains).lean == 0.0


def test_what_is_noted_of_covariances_is_the_heat_without_the_lean() -> None:
    """Of a level of 10 before anything is taken off: a fifth of it is heat, and a tenth the lean, or nothing."""
    estimate = read_llc(*drawn_by(SGLD(lr=1e-3)))
    for lean in (0.0, 1.0):
        [noted] = verdict_module._heat_noted(estimate.replace(mean=8.0 - lean, step_bias=2.0 + lean, lean=lean))
        assert "adds 20% to the LLC (taken off), and about 40% to covariances" in noted
    for heat, count in ((0.39, 0), (0.41, 1)):
        found = estimate.replace(mean=9.0 - heat, step_bias=1.0 + heat, lean=1.0)
        assert len(verdict_module._heat_noted(found)) == count


@pytest.mark.parametrize(
    ("ratios", "wide"),
    [((1.5, 1.5, 1.5, 1.6), True), ((1.3, 1.3, 1.3, 1.4), False), ((0.4, 0.4, 0.4, 5.0), False)],
)
def test_chains_are_too_wide_beyond_their_error_only(ratios: tuple[float, ...], wide: bool) -> None:
    """Of one chain far out of four the mean is 1.55, and its error 1.15."""
    drawn, chains = with_heat(SGLD(lr=1e-3), 0.01)
    rows = torch.tensor(ratios, dtype=torch.float64)[:, None] * 4.0 / chains.posterior.nbeta
    found = read_llc(replace(drawn, segment=replace(drawn.segment, grad_dot=rows.expand(4, 20))), chains)
    assert found.virial == pytest.approx(sum(ratios) / 4, abs=0.02)
    assert ("TOO_WIDE" in found.kinds) is wide


@pytest.mark.parametrize("but", ["all", "one rises", "one is above", "one is held"])
def test_chains_are_said_to_run_downhill_where_every_one_of_them_does(but: str) -> None:
    drawn, chains = drawn_by(SGLD(lr=1e-3))
    nbeta = chains.posterior.nbeta
    way = torch.tensor([[0.1], [0.5], [2.0], [30.0]], dtype=torch.float64) * (-1.0 - torch.arange(80.0) / 20)
    dots = torch.full((4, 20), -8.0 / nbeta, dtype=torch.float64)
    if but == "one rises":
        way[0] = way[0].flip(0)
    elif but == "one is above":
        way[0] += 0.5
    elif but == "one is held":
        dots[0] = -2.0 / nbeta
    little = torch.full((4, 20), 1e-9, dtype=torch.float64)
    shown = Segment([0, 1, 2, 3], way / nbeta, little, dots, little, drawn.segment.anchors)
    found = read_llc(replace(drawn, segment=shown), chains)
    assert -2 * found.se < found.mean < 0
    assert ("NEGATIVE" in found.kinds) is (but == "all")


@pytest.mark.parametrize("grows", [True, False])
def test_arrival_is_that_of_the_second_half_and_what_is_owed_that_of_all_draws(grows: bool) -> None:
    """Whose ratio doubles: while the loss does as well, and while it stays, where nothing more is to come."""
    drawn, chains = with_heat(SGLD(lr=1e-3), 0.05)
    reached = torch.tensor([0.4] * 10 + [0.8] * 10, dtype=torch.float64) * 4.0 / chains.posterior.nbeta
    own = 1.0 + 0.02 * torch.arange(4.0, dtype=torch.float64)[:, None]
    rise = torch.ones(drawn.segment.steps, dtype=torch.float64)
    rise[: len(rise) // 2] = 0.5 if grows else 1.0
    segment = replace(drawn.segment, grad_dot=reached * own, difference=drawn.segment.difference * own * rise)
    ratios = virial_readings(segment, drawn.lr, chains.posterior, 4)
    found = read_llc(replace(drawn, segment=segment), chains)
    assert found.virial == pytest.approx(float(ratios[:, 10:].mean()), rel=1e-9) and 0.75 < found.virial < 0.85
    steepness = steepness_of(segment, chains.posterior, segment.finite)
    ratio = (found.mean, float(ratios.mean()), standard_error(ratios), 4, steepness)
    before = found.trace * (found.mean + found.step_bias) / found.mean  # as gained, before the heat came off
    owed = owed_by(*ratio, gain_of(before, ratios))
    assert found.owed == pytest.approx(owed, rel=1e-6, abs=1e-9)
    assert owed == owed_by(*ratio) > 0.1 if grows else owed < 1e-6 < owed_by(*ratio)
    warm = read_llc(replace(drawn, segment=segment, warm=True), chains)
    assert warm.owed == pytest.approx(owed_by(*ratio), rel=1e-6)


@pytest.mark.parametrize("sampler", [RMSpropSGLD(lr=1e-3), KineticLangevin(lr=1e-3)], ids=["metric", "momenta"])
def test_what_was_gained_of_late_bounds_nothing_where_flat_directions_need_not_come_last(sampler: Sampler) -> None:
    drawn, chains = drawn_by(sampler)
    assert not verdict_module._slowest_last(drawn, chains)
    assert verdict_module._slowest_last(*drawn_by(SGLD(lr=1e-3)))


def test_a_ratio_that_rounds_to_zero_has_no_sign() -> None:
    drawn, chains = with_heat(SGLD(lr=1e-3), 0.05)
    segment = replace(drawn.segment, grad_dot=torch.full_like(drawn.segment.grad_dot, -0.001 / chains.posterior.nbeta))
    still = replace(segment, square=torch.zeros_like(segment.square), grad_square=torch.zeros_like(segment.grad_square))
    found = read_llc(replace(drawn, segment=still), chains)
    assert -0.005 < found.virial < 0
    assert [reason for reason in found.reasons if "(virial ratio 0.00)" in reason]


def test_heat_beside_a_coefficient_of_nearly_nothing_is_held_against_a_constant() -> None:
    """More than a quarter of an LLC of 0.1, which is a seventh of 0.2."""
    drawn, chains = with_heat(SGLD(lr=1e-3), 0.017)
    difference = drawn.segment.difference - drawn.segment.difference.mean() + 0.1 / chains.posterior.nbeta
    found = read_llc(replace(drawn, segment=replace(drawn.segment, difference=difference)), chains)
    assert found.mean + found.step_bias == pytest.approx(0.1) and found.step_bias > 0.026
    assert "HEAT_OF_STEP" not in found.kinds
