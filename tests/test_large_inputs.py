"""A feature that is many times as large as the others: what is said, and that it helps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_slt import Estimate, RMSpropSGLD, estimate_llc, verdict
from lightning_slt.publish.diagnoses import diagnostics, invalid_sentence, reason_words
from lightning_slt.reasons import LARGE_INPUTS, LOSS_TOO_LARGE, NOT_ARRIVED
from tests.sampling.helpers import gen, mean_squared

N, FEATURES = 500, 4


def measured(scale: float, constant: float = 0.0, **settings: Any) -> Estimate:
    """Half a squared error of unit noise at the minimum, of eight weights: LLC 4, with a weak pull."""
    x = torch.randn(N, FEATURES, generator=gen(1))
    y = x @ torch.randn(FEATURES, 2, generator=gen(2)) + torch.randn(N, 2, generator=gen(3))
    x[:, 0] *= scale
    module = nn.Sequential()
    module.add_module("head", nn.Linear(FEATURES, 2, bias=False))
    with torch.no_grad():
        module.head.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    given = {"localization": 0.1, "num_draws": 50, "num_chains": 4, "batch_size": 64, **settings}
    return estimate_llc(module, TensorDataset(x, y), lambda m, batch: mean_squared(m, batch) + constant, **given)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_layer_and_the_size_of_its_inputs_are_named(seed: int) -> None:
    est = measured(scale=100.0, seed=seed)
    assert not est.valid and est.virial < 0.7
    said = est.reasons[est.kinds.index("NOT_ARRIVED")]
    assert said.startswith(f"{LARGE_INPUTS} (root mean square up to ") and f" in 'head'), {NOT_ARRIVED} in " in said
    size = float(said.split("up to ")[1].split(" in ")[0])
    assert 80 <= size <= 120  # of 64 normal numbers times 100: 100 ± 9
    assert said.endswith(
        ": standardised inputs help, in another training; for these weights sampler=RMSpropSGLD() comes closer"
    )
    assert "more draws" not in said


def test_the_report_and_the_log_say_it_too() -> None:
    said = measured(scale=100.0)
    words = reason_words(said.reasons[said.kinds.index("NOT_ARRIVED")])
    assert words.startswith("the inputs of a layer were large, and chains had not spread to their full width (root ")
    unmixed = "chains have not mixed: R-hat 1.38 > 1.1, error 5.9"
    both = said.replace(kinds=("NOT_MIXED", "NOT_ARRIVED"), reasons=(unmixed, said.reasons[-1]))
    told = " ".join(remark.text for remark in diagnostics([both]))
    assert "Standardised inputs help" in told and "num_draws" not in told
    assert "num_draws" not in invalid_sentence(both, both.reasons)


def test_standardised_inputs_are_not_named_and_reach_the_width() -> None:
    est = measured(scale=1.0)
    assert est.valid and abs(est.mean - 4.0) <= max(0.2, 2 * est.se)


def test_they_are_not_named_where_they_are_not_large() -> None:
    est = measured(scale=1.0, nbeta=400.0, batch_size=2, localization=1e-5, num_draws=20, num_burnin_steps=20)
    assert not est.valid and not any(reason.startswith(LARGE_INPUTS) for reason in est.reasons)


def test_the_sampler_that_is_named_comes_closer() -> None:
    """The virial ratio is 0.3 by SGLD and 0.5 or more so (three seeds), and it is not named to who has it."""
    there, here = measured(scale=100.0), measured(scale=100.0, sampler=RMSpropSGLD())
    assert here.virial > 1.5 * there.virial and here.step_size != there.step_size
    said = next(reason for reason in here.reasons if reason.startswith(LARGE_INPUTS))
    assert said.endswith(": standardised inputs help, in another training")


@pytest.mark.parametrize(("constant", "start"), [(0.0, LARGE_INPUTS), (50.0, LOSS_TOO_LARGE)])
def test_a_loss_that_seems_to_be_large_is_named_first_where_it_is(
    constant: float, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise of the minibatches, by which its scale is told, is large where inputs are."""
    heat = verdict.without_heat

    def noisy(*given: Any) -> Any:
        return dataclasses.replace(heat(*given), noisy=True, scale=10.0)

    monkeypatch.setattr(verdict, "without_heat", noisy)
    est = measured(scale=100.0, constant=constant)
    assert est.reasons[est.kinds.index("NOT_ARRIVED")].startswith(start)
