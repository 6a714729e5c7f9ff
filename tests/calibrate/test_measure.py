"""One firing ahead of a run: that of a sweep, on a regression whose answer is known, and what it costs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_slt.calibrate import Calibration, calibrate
from lightning_slt.calibrate.result import cadence
from lightning_slt.config import load
from lightning_slt.sweep import SweepConfig
from lightning_slt.sweep.checkpoint import read_state
from lightning_slt.sweep.point import measure_weights
from tests.calibrate import runs


def config(**changes: Any) -> SweepConfig:
    return load(runs.settings(**changes), schema=SweepConfig)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save(tmp_path_factory.mktemp("minimum"))


@pytest.fixture(scope="module")
def found(checkpoint: Path) -> Calibration:
    return calibrate(config(), checkpoint)


def test_both_firings_find_the_answer_that_is_known(found: Calibration) -> None:
    truth = runs.case().truth
    assert truth is not None
    for estimate in (found.estimate, found.later):
        assert estimate.valid, estimate.reasons
        assert abs(estimate.mean - truth) <= max(0.05 * truth, 2 * estimate.se)
        assert (estimate.step, estimate.num_samples, estimate.localization) == (runs.STEP, 1000, runs.GAMMA)
    assert found.estimate.nbeta == pytest.approx(1000 / math.log(1000))


def test_the_first_firing_is_the_point_of_a_sweep(found: Calibration, checkpoint: Path) -> None:
    state = read_state(checkpoint)
    point, _ = measure_weights(state, config(), runs.GAMMA, torch.device("cpu"), checkpoint, runs.STEP)
    assert torch.equal(found.estimate.trace, point.trace)
    assert (found.estimate.mean, found.estimate.step_size) == (point.mean, point.step_size)


def test_the_second_one_starts_from_its_chains(found: Calibration) -> None:
    assert found.warm
    assert found.later.num_burnin_steps < found.estimate.num_burnin_steps
    assert found.later.step_size == found.estimate.step_size


def test_the_step_is_a_share_of_the_one_at_which_chains_no_longer_hold(found: Calibration) -> None:
    """``4 / (nbeta h + gamma)`` along the steepest direction, of a few minibatches."""
    hessian = runs.case().hessian
    assert hessian is not None and found.unstable_step is not None and found.step_share is not None
    limit = 4.0 / (found.estimate.nbeta * max(hessian) + runs.GAMMA)
    assert found.unstable_step == pytest.approx(limit, rel=0.3)
    assert found.step_share == found.estimate.step_size / found.unstable_step
    assert 0 < found.step_share <= 0.6
    assert 0 < found.heat_share < 0.25


def test_the_cadence_holds_later_firings_to_the_share(found: Calibration) -> None:
    assert 0 < found.training_seconds < found.later_seconds
    training = found.every_n_train_steps * found.training_seconds
    assert found.later_seconds / (found.later_seconds + training) <= 0.05
    assert found.first_in_steps == math.ceil(found.first_seconds / found.training_seconds)


@pytest.mark.parametrize(
    ("firing", "step", "steps"), [(1.0, 0.01, 1900), (1.0, 0.00999, 2000), (0.5, 10.0, 1), (1.0, 19.0 / 42, 42)]
)
def test_a_cadence_has_two_digits_and_is_rounded_up(firing: float, step: float, steps: int) -> None:
    assert cadence(firing, step) == steps
    assert firing / (firing + steps * step) <= 0.05 + 1e-9


def test_a_training_step_is_one_of_the_loader_and_of_all_weights(checkpoint: Path) -> None:
    found = calibrate(config(batch_size=100, num_draws=20), checkpoint)
    assert (found.estimate.batch_size, found.training_batch) == (100, runs.BATCH)
    found = calibrate(config(batch_size=100, num_draws=20, data="tests.calibrate.runs:dataset"), checkpoint)
    assert (found.estimate.batch_size, found.training_batch) == (100, 100)


def test_batched_chains_tell_how_many_there_are_at_a_time(found: Calibration, checkpoint: Path) -> None:
    assert (found.estimate.method, found.chunk) == ("sequential", 1)
    batched = calibrate(config(method="batched", num_draws=20, num_chains=3), checkpoint)
    assert (batched.estimate.method, batched.chunk) == ("batched", 3)


def test_without_a_checkpoint_it_is_the_module_as_it_is_initialised(found: Calibration) -> None:
    initial = calibrate(config())
    assert torch.equal(initial.estimate.trace, found.estimate.trace)
    assert (initial.of, initial.estimate.step) == ("the module as it is initialised", 0)


def test_the_localization_is_that_of_the_weights_where_none_is_given(checkpoint: Path) -> None:
    found = calibrate(config(localization=None, num_draws=20), checkpoint)
    square = float(runs.Regression().net.weight.detach().double().square().sum())
    expected = min(max(4 / square, 1.0), 100.0)
    assert found.estimate.localization == found.later.localization == pytest.approx(expected)


def test_chains_that_run_downhill_are_not_gone_on_from() -> None:
    found = calibrate(config(module_args={"away": 3.0}, num_draws=20))
    assert not found.estimate.valid and found.estimate.mean < 0
    assert not found.warm
    assert math.isnan(found.heat_share)


def test_a_plain_module_with_a_loss_of_ones_own_is_the_same(found: Calibration) -> None:
    plain = calibrate(config(module="tests.calibrate.runs:plain", loss_fn="tests.calibrate.runs:half_square"))
    assert torch.equal(plain.estimate.trace, found.estimate.trace)


def test_nothing_is_left_behind(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    lines: list[str] = []
    calibrate(config(num_draws=20), checkpoint, lines.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []
    assert len(lines) == 3 and str(checkpoint) in lines[0]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weights": "averaged"}, "weights='averaged': the module as it is initialised has no averaged weights"),
    "argument": ({"module_args": {"far": 1}}, "module_args={'far': 1}: do not fit module="),
    "draws": ({"num_draws": 0}, "num_draws=0"),
    "device": ({"devices": ["cuda:99"]}, "cuda:99"),
    "no loss": ({"module": "tests.calibrate.runs:Silent"}, "loss"),
    "length": ({"data": "tests.calibrate.runs:endless"}, "Give num_samples= or nbeta="),
    "not finite": ({"module_args": {"away": math.inf}}, "not finite"),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_measured_is_refused_with_what_is_in_the_way(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        calibrate(config(**changes))


def test_weights_of_another_module_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step=3.ckpt"
    torch.save({"state_dict": {"other.weight": torch.zeros(2, 2)}}, path)
    with pytest.raises(ValueError, match="do not fit module="):
        calibrate(config(), path)
