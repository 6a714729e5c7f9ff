"""Architectures with nothing said about the sampler, against long exact sampling of the same local posterior.

Two standard errors, the estimate's and the reference's together, and no share of the value beside them: a right
estimate with an honest error falls outside for about 1 seed in 20. The seed here is fixed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_slt import SGLD, estimate_llc
from tests.cases.make_references import load_references
from tests.cases.problems import CASES

REFERENCES = load_references()

ARCHITECTURES = [
    "digits-mlp-default",
    "transformer-default",
    pytest.param("lstm", marks=pytest.mark.slow),
    # a small problem, n = 300: momenta on all the data
    pytest.param("convnet-default", marks=pytest.mark.slow),
    "linear-6-6-6-6-r2-default",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_valid_estimate_within_two_standard_errors_of_the_reference(name: str) -> None:
    _agrees(name)


def test_minibatches_on_small_data_where_they_are_asked_for() -> None:
    """At gamma = 100; at its default one, 15.3, SGLD is not right for the convnet of 300 samples: docs/choosing.md."""
    _agrees("convnet-gamma100", sampler=SGLD(), localization=100.0)


def _agrees(name: str, **settings: Any) -> None:
    case, reference = CASES[name](), REFERENCES[name]
    e = estimate_llc(case.module, case.dataset, case.loss_fn, **settings)
    assert e.nbeta == pytest.approx(reference["nbeta"])
    assert e.localization == pytest.approx(reference["gamma"], rel=1e-3)
    error = math.hypot(e.se, reference["se"])
    z = (e.mean - reference["mean"]) / error
    what = (
        f"{e.mean:.4g} +- {e.se:.2g} for {reference['mean']:.4g} +- {reference['se']:.2g}: {z:+.1f} standard errors; "
        f"step {e.step_size:.2g}, burn-in {e.num_burnin_steps}, {e.num_steps_bw_draws} steps a draw, {e.reasons}"
    )
    assert abs(z) <= 2, what
    assert e.valid, what
    # two standard errors are no excuse for an error bar without end
    assert e.se < 0.1 * reference["mean"], what
