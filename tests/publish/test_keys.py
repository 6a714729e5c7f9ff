import math
import re

import pytest

from lightning_slt.publish import metrics_of
from lightning_slt.publish.keys import METRIC_NAMES, x_of
from tests.publish.helpers import make_estimate


def test_a_complete_estimate_gives_every_key_and_no_other():
    metrics = metrics_of(make_estimate(acceptance=0.5))
    assert set(metrics) == {f"slt/{name}" for name in METRIC_NAMES}
    assert len(metrics) == 26
    assert set(metrics) - set(metrics_of(make_estimate())) == {"slt/diag/acceptance"}
    assert all(re.fullmatch(r"[a-z0-9_]+(/[a-z0-9_]+)*", key) for key in metrics)


def test_the_values_are_those_of_the_estimate():
    metrics = metrics_of(
        make_estimate(mean=12.0, se=0.5, bad_chains=1, step=300, x=299, firing_size=0.25), prefix="mine"
    )
    assert metrics["mine/llc/mean"] == 12.0
    assert metrics["mine/llc/se"] == 0.5
    assert metrics["mine/llc/lo"] == pytest.approx(11.02)
    assert metrics["mine/llc/hi"] == pytest.approx(12.98)
    assert metrics["mine/diag/nan_frac"] == 0.25
    assert metrics["mine/diag/n_bad_chains"] == 1.0
    assert metrics["mine/diag/valid"] == 0.0
    assert metrics["mine/cost/overhead_frac"] == 0.0625
    assert metrics["mine/cost/credit_seconds"] == 1.75
    assert metrics["mine/cost/predicted_seconds"] == 1.5
    assert metrics["mine/cost/firing_size"] == 0.25
    assert metrics["mine/cost/skipped"] == 3.0
    assert metrics["mine/loss/chain_mean"] == pytest.approx(0.37)
    assert metrics["mine/step"] == 300.0
    assert all(type(value) is float for value in metrics.values())


def test_no_two_keys_are_of_one_number():
    """Each field has a value of its own."""
    fields = {
        "llc/mean": "mean",
        "llc/se": "se",
        "diag/rhat": "rhat",
        "diag/ess": "ess",
        "diag/step_size": "step_size",
        "diag/step_bias": "step_bias",
        "diag/virial": "virial",
        "diag/owed": "owed",
        "diag/lean": "lean",
        "diag/unsure_heat": "unsure_heat",
        "diag/slope": "slope",
        "diag/acceptance": "acceptance",
        "loss/anchor": "init_loss",
        "loss/chain_mean": "chain_loss",
        "cost/seconds": "seconds",
        "cost/overhead_frac": "overhead",
    }
    values = {field: 1.0 + k / 64 for k, field in enumerate(fields.values())}
    metrics = metrics_of(make_estimate(**values))
    assert {key: metrics[f"slt/{key}"] for key in fields} == {key: values[field] for key, field in fields.items()}


def test_what_is_not_finite_is_left_out_and_validity_stays():
    metrics = metrics_of(make_estimate(mean=math.nan, se=math.inf, rhat=math.nan, ess=math.nan, step=None, valid=False))
    assert metrics["slt/diag/valid"] == 0.0
    for key in ("llc/mean", "llc/se", "llc/lo", "llc/hi", "diag/rhat", "diag/ess", "step", "loss/chain_mean"):
        assert f"slt/{key}" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_what_only_a_budget_knows_is_left_out_without_one():
    without = make_estimate(credit_seconds=math.nan, predicted_seconds=math.nan, firing_size=math.nan, skipped=None)
    costs = {key for key in metrics_of(without) if key.startswith("slt/cost/")}
    assert costs == {"slt/cost/seconds", "slt/cost/overhead_frac"}


def test_x_is_the_loggers_step_where_known():
    assert x_of(make_estimate(step=100, x=0)) == 0
    assert x_of(make_estimate(step=100)) == 100
    assert x_of(make_estimate(step=None)) is None
