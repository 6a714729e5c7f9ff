"""What was found, as the settings of a monitor: what is in them, and that a monitor is built from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_slt import SLTMonitor
from lightning_slt.calibrate import Calibration, monitor_settings, settings_text
from lightning_slt.config import MonitorConfig, SamplerConfig, SamplerName, load
from lightning_slt.sweep import SweepConfig
from tests.publish.helpers import make_estimate


def made(valid: bool = True, **changes: Any) -> Calibration:
    estimate = make_estimate(step=40).replace(
        step_size=3e-5, nbeta=144.5, localization=2.5, batch_size=50, method="batched", num_burnin_steps=70, valid=valid
    )
    config = load({"module": "m:M", "data": "m:d", **changes}, schema=SweepConfig)
    return Calibration("step=40.ckpt (step 40)", config, estimate, estimate, True, 2.0, 1.0, 0.01, 50, 4, 3e-4)


def read(found: Calibration, pin: bool, folder: Path) -> MonitorConfig:
    path = folder / "settings.yaml"
    path.write_text(settings_text(found, pin), encoding="utf-8")
    return load(path)


GIVEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a sampler": {"sampler": {"name": "RMSpropSGLD", "kappa": 0.3}},
    "a step": {"sampler": {"name": "SGNHT", "lr": 1e-3, "diffusion_factor": 0.02}},
    "all": {
        "num_chains": 6,
        "num_draws": 30,
        "num_burnin_steps": 10,
        "num_steps_bw_draws": 2,
        "batch_size": 20,
        "nbeta": 12.0,
        "restrict": ["net.*"],
        "seed": 3,
        "num_samples": 99,
        "method": "sequential",
        "probe": 10,
        "query_data": "m:q",
        "query": 4,
    },
}


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_what_is_written_loads_and_builds(given: dict[str, Any], pin: bool, tmp_path: Path) -> None:
    found = made(**given)
    settings = read(found, pin, tmp_path)
    assert settings == monitor_settings(found, pin)
    assert isinstance(settings.build(), SLTMonitor)


def test_by_default_only_the_question_its_size_and_the_cadence_are_fixed() -> None:
    found = made()
    assert yaml.safe_load(settings_text(found)) == {
        "every_n_train_steps": 1900,
        "num_chains": 4,
        "num_draws": 100,
        "localization": 2.5,
    }
    assert monitor_settings(found) == MonitorConfig(every_n_train_steps=1900, localization=2.5)


def test_pinned_are_the_step_and_what_decides_the_digits_and_never_the_burn_in() -> None:
    settings = monitor_settings(made(), pin=True)
    assert settings == MonitorConfig(
        every_n_train_steps=1900,
        localization=2.5,
        nbeta=144.5,
        batch_size=50,
        method="batched",
        sampler=SamplerConfig(lr=3e-5),
    )
    assert settings.num_burnin_steps is None and settings.num_steps_bw_draws is None
    sampler = monitor_settings(made(**GIVEN["a sampler"]), pin=True).sampler
    assert sampler == SamplerConfig(SamplerName.RMSpropSGLD, lr=3e-5, kappa=0.3)


@pytest.mark.parametrize("pin", [False, True])
def test_what_was_given_is_kept(pin: bool) -> None:
    settings = monitor_settings(made(**GIVEN["all"]), pin)
    given = {name: value for name, value in GIVEN["all"].items() if name != "query_data"}
    if pin:  # what was measured with it; here of an estimate that is made up
        given |= {"batch_size": 50, "nbeta": 144.5, "method": "batched"}
    assert {name: getattr(settings, name) for name in given} == given


def test_queries_of_data_of_their_own_are_those_of_validation() -> None:
    assert monitor_settings(made(probe=10)).query is None
    assert monitor_settings(made(probe=10, query=5)).query is None
    assert monitor_settings(made(probe=10, query_data="m:q")).query is True


def test_what_is_to_be_known_stands_above() -> None:
    text = settings_text(made(valid=False, loss_fn="m:loss"), pin=True)
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# lightning-slt calibrate: step=40.ckpt (step 40)\n")
    for said in ("pinned", "not valid", "SLTMonitor(loss_fn=m:loss)"):
        assert any(said in line for line in head), said
    assert len(settings_text(made()).splitlines()) == 6


def test_a_checkpoint_whose_name_breaks_a_line_stays_a_comment() -> None:
    found = dataclasses.replace(made(), of="a\nnbeta: 3")
    assert "nbeta" not in yaml.safe_load(settings_text(found))
