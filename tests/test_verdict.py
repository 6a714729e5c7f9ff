"""The verdict on chains: reasons are data, of a kind to select by, and plain sentences in records."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import LeimkuhlerMatthews, estimate_llc
from lightning_slt import verdict as verdict_module
from lightning_slt.estimate import ChainSettings, run_chains
from lightning_slt.functional import summarise
from lightning_slt.reasons import Kind, Reason
from lightning_slt.sampling.batches import source_of
from lightning_slt.sampling.calibration import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.samplers import SGLD, KineticLangevin, Sampler
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
    assert (estimate.num_chains, estimate.num_draws, estimate.num_steps_bw_draws, estimate.seed) == (4, 40, 2, 7)


def test_a_summary_has_kinds_and_their_sentences() -> None:
    found = summarise(torch.full((2, 8), torch.nan))
    assert found.verdict == (Reason(Kind.NO_CHAIN, "no chain stayed finite"),)
    assert found.reasons == ("no chain stayed finite",) and not found.valid
    kinds = [reason.kind for reason in summarise(-torch.arange(100.0).expand(4, 100)).verdict]
    assert Kind.NEGATIVE in kinds and Kind.DRIFTING in kinds


def test_width_is_not_held_against_chains_that_run_downhill() -> None:
    net, data = problem()
    downhill = estimate_llc(
        net,
        data,
        lambda module, batch: -half_square(module, batch),
        localization=1000.0,
        num_chains=4,
        num_draws=40,
        batch_size=16,
        method="sequential",
    )
    assert [reason.split(":")[0] for reason in downhill.reasons] == ["negative beyond its error"]
