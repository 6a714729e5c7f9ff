"""What was found, as it is told in a terminal."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import pytest
from rich.console import Console

from lightning_slt.calibrate import Calibration
from lightning_slt.calibrate.terminal import told
from lightning_slt.config import load
from lightning_slt.sweep import SweepConfig
from tests.publish.helpers import make_estimate


def made(estimate: dict[str, Any] | None = None, **changes: Any) -> Calibration:
    fields: dict[str, Any] = {
        "step": 40,
        "mean": 9.0,
        "se": 0.5,
        "step_bias": 1.0,
        "step_size": 3e-5,
        "num_burnin_steps": 70,
        "num_steps_bw_draws": 2,
        "batch_size": 50,
        "method_reason": "batched would be 1.07 times as fast, which is no gain",
        "owed": 0.3,
        "unsure_heat": 0.1,
        "slope": 0.42,
        "slope_se": 0.05,
    }
    found = make_estimate(**{**fields, **(estimate or {})})
    given = {"module": "m:M", "data": "m:d"}
    config = load({**given, **changes.pop("config", {})}, schema=SweepConfig)
    later = found.replace(num_burnin_steps=25, num_steps_bw_draws=1, mean=9.4)
    whole = Calibration("a.ckpt (step 40)", config, found, later, True, 2.0, 1.0, 0.01, 50, 1, 3e-4)
    return dataclasses.replace(whole, **changes)


def lines(found: Calibration) -> dict[str, str]:
    """The lines by what they begin with."""
    file = io.StringIO()
    Console(file=file, width=200, highlight=False).print(told(found))
    rows = [line.strip().split("  ", 1) for line in file.getvalue().splitlines() if line.strip()]
    return {row[0]: row[1].strip() if len(row) > 1 else "" for row in rows}


def test_every_number_is_told() -> None:
    said = lines(made())
    assert said["LLC 9.0 ± 0.5"] == "valid  of a.ckpt (step 40), loss 0.250"
    assert said["path"] == ("one after another (sequential): batched would be 1.07 times as fast, which is no gain")
    assert said["step size"] == "3.00e-05, found, 10% of the largest stable one"
    assert (said["burn-in"], said["draws"]) == ("70 steps", "4 chains of 100 draws, each of 2 steps")
    assert said["batch size"] == "50 samples"
    assert said["localization"] == "10.0, from the size of these weights"
    assert said["nbeta"] == "100, n / log n of 1,000 samples"
    assert said["R-hat"].startswith("1.01") and said["ESS"].startswith("250") and said["virial ratio"][:5] == "0.969"
    assert said["heat of the step"] == "10.0% of the estimate, taken off"
    assert said["owed"] == "0.300 for directions that the chains have not reached, 36% of the squared error"
    assert said["lean"] == "nothing"
    whole = "0.100 for how much of the minibatches' heat reaches the loss, 4% of the squared error"
    assert said["unsure heat"] == whole
    assert said["slope"] == "0.42 ± 0.05 more at the minimum beside these weights; 0 at one"
    assert said["first firing"] == "2 s, 4 chains of 270 steps"
    assert said["second firing"] == "1 s, 4 chains of 125 steps, from the chains of the first: LLC 9.4 ± 0.5"
    assert said["training step"] == "0.01 s, forward and backward of 50 samples"
    assert said["cadence"].startswith("every_n_train_steps=1900 keeps firings like the second at or below 5%")
    assert "the first one takes as long as 200 training steps" in said


def test_a_slope_that_may_be_chance_is_not_told_as_one() -> None:
    noise = lines(made({"slope": -0.1, "slope_se": 0.2}))
    assert noise["slope"] == "−0.1 ± 0.2: none for sure; 0 at a minimum"
    alone = lines(made({"slope": 0.42, "slope_se": float("nan")}))
    assert alone["slope"] == "0.420, of one chain, which does not tell how sure that is; 0 at a minimum"
    assert lines(made({"slope": float("nan"), "slope_se": float("nan")}))["slope"] == "not measured"


def test_what_was_given_is_said_to_be() -> None:
    said = lines(made(config={"sampler": {"lr": 1e-4}, "localization": 10.0, "nbeta": 100.0, "probe": 7}))
    assert said["step size"] == "3.00e-05, given, 10% of the largest stable one"
    assert (said["localization"], said["nbeta"]) == ("10.0, given", "100, given")
    assert said["influence"] == "of 7 samples at the most, in both firings"


@pytest.mark.parametrize("limit", [None, 0.0])
def test_what_is_not_known_is_left_out(limit: float | None) -> None:
    said = lines(made(unstable_step=limit, estimate={"mean": -3.0, "step_bias": 0.0}))
    assert said["step size"] == "3.00e-05, found"
    assert said["heat of the step"] == "not known: the estimate is not above zero"
    assert "GPU memory" not in said and "influence" not in said


def test_chains_at_a_time_and_memory() -> None:
    said = lines(made({"method": "batched", "method_reason": "asked for"}, chunk=2, peak_bytes=3 * 2**20))
    assert said["path"] == "2 of 4 at a time (batched): asked for"
    assert said["GPU memory"] == "3 MiB at the most, beside the model"


def test_why_it_is_not_valid_and_what_helps() -> None:
    said = lines(made({"reasons": ("chains drift: second half minus first half is -9 ± 2",)}, warm=False))
    assert said["LLC 9.0 ± 0.5"].startswith("NOT VALID")
    assert "• Chains were still moving at their end (step 40). More draws (num_draws) give them time." in said
    assert "from the weights again, the first chains do not serve: LLC 9.4 ± 0.5, not valid" in said["second firing"]


def test_no_chain_that_stayed_is_no_number() -> None:
    said = lines(made({"mean": math.nan, "se": math.nan, "bad_chains": 4}))
    assert said["LLC n/a"].startswith("NOT VALID")
    assert said["left out"] == "4 of 4 chains"


def test_a_name_is_neither_markup_nor_control_characters() -> None:
    file = io.StringIO()
    Console(file=file, width=200).print(told(made(of="[red]\x1b[2Jgone")))
    assert "[red]" in file.getvalue() and "\x1b[2J" not in file.getvalue()
