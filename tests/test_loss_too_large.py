"""A loss that is many times a negative log-likelihood (targets in thousands): what is said, and that it helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import Estimate, estimate_llc
from lightning_slt.publish.diagnoses import diagnostics, invalid_sentence, reason_words
from lightning_slt.reasons import LOSS_TOO_LARGE, NOT_ARRIVED, NOT_IN_NATS
from tests.sampling.helpers import gen, mean_squared

N, UNIT = 1000, 100.0


def measured(divisor: float, beside: float = 0.0, constant: float = 0.0, **settings: Any) -> Estimate:
    """Half a squared error whose noise has the scale ``UNIT``, at the minimum: 12 / 2 weights, whatever it is divided
    by. It is ``UNIT²`` times a negative log-likelihood.

    Args:
        beside: by how much each weight is off.
        constant: added to the loss.
    """
    x = torch.randn(N, 6, generator=gen(1))
    y = x @ torch.randn(6, 2, generator=gen(2)) + UNIT * torch.randn(N, 2, generator=gen(3))
    module = nn.Linear(6, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.linalg.lstsq(x, y).solution.T + beside)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return mean_squared(module, batch) / divisor + constant

    given = {"localization": 1e-5, "num_draws": 50, "num_chains": 4, "batch_size": 32, **settings}
    return estimate_llc(module, TensorDataset(x, y), loss, **given)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_scale_of_the_loss_is_named_and_what_to_divide_it_by(seed: int) -> None:
    est = measured(divisor=1.0, seed=seed)
    assert not est.valid and "NOT_ARRIVED" in est.kinds and est.virial < 0.7
    said = est.reasons[est.kinds.index("NOT_ARRIVED")]
    assert said.startswith(f"{LOSS_TOO_LARGE}: {NOT_ARRIVED} in ") and said.endswith(
        "). It should be in nats, which a squared error is when divided by 2 sigma² (sigma is the scale of the noise "
        "in the targets); where it is, a larger batch_size or more draws help"
    )
    assert reason_words(said).endswith(f"had not spread to their full width (virial ratio {est.virial:.2f})")
    told = " ".join(remark.text for remark in diagnostics([est]))
    assert "divide it (a squared error by 2 sigma²" in told


def test_a_likelihood_is_not_said_to_be_too_large() -> None:
    """Where chains have not the steps that its noise asks for."""
    est = measured(divisor=UNIT**2, nbeta=900.0, batch_size=2)
    assert est.kinds[-1] == "NOT_ARRIVED" and est.reasons[-1].startswith(NOT_ARRIVED)


@pytest.mark.parametrize(("divisor", "nbeta"), [(UNIT**2, None), (1.0, N / 6.908 / UNIT**2)])
def test_what_is_said_helps(divisor: float, nbeta: float | None) -> None:
    est = measured(divisor, nbeta=nbeta)
    assert est.valid and abs(est.mean - 6.0) <= max(0.3, 2 * est.se)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chains_that_run_downhill_of_it_say_so_too(seed: int) -> None:
    """Targets in hundreds: training ends far from where chains would have it, and each firing was "no minimum"."""
    est = measured(divisor=1.0, beside=30.0, seed=seed)
    assert est.mean + 2 * est.se < 0 and est.kinds[-2:] == ("NEGATIVE", "NOT_IN_NATS")
    assert est.reasons[-1].startswith(f"{NOT_IN_NATS} (it is ") and "twice the variance of the noise" in est.reasons[-1]
    assert reason_words(est.reasons[-1]) == f"the loss may not have been in nats (it is {est.init_loss:,.0f} here)"
    assert est.comparable  # as where chains run downhill of any loss
    told = " ".join(remark.text for remark in diagnostics([est]))
    assert "The loss may not have been in nats" in told and "divided by twice the variance of the noise" in told
    line = invalid_sentence(est, est.reasons)
    assert line.count("twice the variance") == 1 and "Usual early in training" not in line


def test_chains_that_run_downhill_of_a_likelihood_do_not() -> None:
    est = measured(divisor=UNIT**2, beside=30.0)
    assert est.init_loss < 3 and est.mean + 2 * est.se < 0 and est.kinds[-1] == "NEGATIVE"
    assert "Usual early in training" in invalid_sentence(est, est.reasons)


def test_a_large_loss_alone_is_no_reason() -> None:
    """A likelihood of whole pictures is hundreds of nats."""
    est = measured(divisor=UNIT**2, constant=200.0)
    assert est.valid and est.init_loss > 200
