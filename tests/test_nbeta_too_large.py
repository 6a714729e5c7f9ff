"""An nbeta that minibatches are too noisy for: what is said of it, and that what is said helps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_slt import Estimate, estimate_llc
from lightning_slt.publish.diagnoses import diagnostics
from lightning_slt.reasons import NBETA_TOO_LARGE, NOT_ARRIVED, NOT_MIXED
from tests.sampling.helpers import gen, mean_squared

N = 1000


def measured(nbeta: float, batch_size: int) -> Estimate:
    """Least squares with residuals of one, at the minimum: 12 / 2 weights, whatever nbeta is."""
    x = torch.randn(N, 6, generator=gen(1))
    y = x @ torch.randn(6, 2, generator=gen(2)) + torch.randn(N, 2, generator=gen(3))
    module = nn.Linear(6, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    settings = {"localization": 1.0, "num_draws": 50, "num_chains": 4}
    return estimate_llc(module, TensorDataset(x, y), mean_squared, nbeta=nbeta, batch_size=batch_size, **settings)


def test_a_smaller_nbeta_or_a_larger_batch_are_named_and_not_more_draws() -> None:
    """Nor a stronger localization, which would have to be as strong as the loss."""
    est = measured(nbeta=1e4, batch_size=32)
    assert not est.valid and est.kinds == ("NOT_ARRIVED",) and est.virial < 0.7
    assert est.reasons[0].startswith(f"{NBETA_TOO_LARGE} (1e+04; n / log n is 145), {NOT_ARRIVED} in ")
    assert est.reasons[0].endswith("a smaller nbeta, or a larger batch_size")


def test_beside_it_no_other_advice_is_given() -> None:
    """Chains that have not mixed are told to take more draws where that is all there is."""
    est = measured(nbeta=1e4, batch_size=8)
    unmixed = f"{NOT_MIXED}: R-hat 1.11 > 1.1, error 0.88"
    [alone] = diagnostics([est.replace(kinds=("NOT_MIXED",), reasons=(unmixed,))])
    assert "more draws" in alone.text.lower()
    est = est.replace(kinds=("NOT_MIXED", "NOT_ARRIVED"), reasons=(unmixed, est.reasons[-1]))
    told = " ".join(remark.text for remark in diagnostics([est]))
    assert told.endswith("A smaller nbeta helps, or a larger batch_size; left None it is n / log n.")
    assert "more draws" not in told.lower()


@pytest.mark.parametrize(("nbeta", "batch_size"), [(145.0, 32), (1e4, N)])
def test_either_helps(nbeta: float, batch_size: int) -> None:
    est = measured(nbeta, batch_size)
    assert est.valid and abs(est.mean - 6.0) <= max(0.3, 2 * est.se)


def test_an_nbeta_below_n_is_not_blamed() -> None:
    est = measured(nbeta=900.0, batch_size=2)
    assert not est.valid and est.reasons[-1].startswith(NOT_ARRIVED) and "more draws" in est.reasons[-1]
