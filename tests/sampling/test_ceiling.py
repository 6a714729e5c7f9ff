"""Steps beyond what is stable at ``w*``: taken where chains hold at them, left and remembered where they do not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt.estimate import ChainSettings, measure_llc
from lightning_slt.record import Estimate
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.calibration import AWAY, RELAX
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rounds import BACK_OFF, Start
from lightning_slt.sampling.step_size import CEILING, SAFE, UNSTABLE
from tests.cases.make_references import load_references
from tests.cases.problems import CASES, Case, default_nbeta

SETTINGS = ChainSettings(num_chains=4, num_draws=100, localization=1.0, method="sequential")


def least_squares(seed: int, n: int = 3000, d: int = 300, steep: float = 20.0) -> tuple[Case, float, float]:
    """Linear regression without noise: one direction is ``steep²`` times as steep as the 299 others, which let the
    heat ask for a step that it does not bear. With the truth, and the largest posterior precision."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    x[:, 0] *= steep
    y = x @ torch.randn(d, 1, generator=generator)
    module = nn.Linear(d, 1, bias=False)
    module.load_state_dict({"weight": torch.linalg.lstsq(x, y).solution.T})
    nbeta = default_nbeta(n)
    precision = nbeta * torch.linalg.eigvalsh((x.T @ x / n).double())
    truth = float((precision / (precision + 1.0)).sum()) / 2

    def loss_fn(module: nn.Module, batch: list[Tensor]) -> Tensor:
        return 0.5 * (module(batch[0]) - batch[1]).square().mean()

    case = Case(
        "steep", module, TensorDataset(x, y), loss_fn, n, truth, "exact", nbeta, 1.0, tolerance="4 standard errors"
    )
    return case, truth, float(precision[-1]) + 1.0


def fire(case: Case, memory: ChainMemory, seed: int, settings: ChainSettings = SETTINGS) -> Estimate:
    settings = ChainSettings(**{**settings.__dict__, "seed": seed})
    source = DatasetSource(case.dataset, 64, seed=seed)
    return measure_llc(Objective(case.module, case.loss_fn), source, settings, None, None, memory)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_step_that_one_steep_direction_does_not_bear_is_left_and_not_tried_again(seed: int) -> None:
    case, truth, steepest = least_squares(seed)
    memory = ChainMemory()
    cold = fire(case, memory, seed)
    limit = memory.ceiling
    tried = BACK_OFF * limit
    assert (
        UNSTABLE / steepest < tried < 1.05 * AWAY * CEILING * SAFE / steepest
    )  # the largest precision is found to 5 %
    assert cold.step_size == pytest.approx(limit, rel=1e-6)
    warm = fire(case, memory, seed)
    assert memory.ceiling == pytest.approx(RELAX * limit)
    assert warm.step_size == cold.step_size and warm.num_burnin_steps == 25
    for estimate in (cold, warm):
        assert estimate.valid and abs(estimate.mean - truth) < 4 * estimate.se


def test_chains_take_larger_steps_than_what_is_stable_where_they_started() -> None:
    """A transformer is less steep where its posterior is than at ``w*``: the first firing finds the second one's step,
    and is within two errors of long exact chains."""
    case, reference = CASES["transformer-default"](), load_references()["transformer-default"]
    settings = ChainSettings(num_chains=4, num_draws=100, method="sequential")
    memory = ChainMemory()
    cold = fire(case, memory, 1, settings)
    assert cold.step_size > 2 * _largest_at_anchor(case)
    warm = fire(case, memory, 1, settings)
    assert warm.step_size == cold.step_size and math.isinf(memory.ceiling)
    for estimate in (cold, warm):
        error = math.hypot(estimate.se, reference["se"])
        assert estimate.valid and abs(estimate.mean - reference["mean"]) <= 2 * error


def _largest_at_anchor(case: Case) -> float:
    """0.6 of what is stable along the steepest direction at ``w*``, where the search ends before a given burn-in."""
    settings = ChainSettings(num_chains=4, num_draws=100, num_burnin_steps=0, method="sequential")
    return float(fire(case, ChainMemory(), 1, settings).step_size)


@pytest.mark.parametrize(
    ("held", "ceiling", "step", "goes_to"),
    [
        (0.5, 3.0, 1.0, 0.4),  # back to what held, and not nearer than BACK_OFF
        (0.2, 3.0, 1.0, 0.2),
        (None, 3.0, 1.0, 0.125),
        (1.0, 3.0, 1.0, 0.125),  # what held does not any more
    ],
)
def test_where_chains_go_that_did_not_hold(held: float | None, ceiling: float, step: float, goes_to: float) -> None:
    start = Start(step, ceiling, 0, [], held=held)
    assert start.burst_at(step) == pytest.approx(goes_to)
    assert start.ceiling == start.limit == pytest.approx(step / BACK_OFF)
    assert start.burst_at(goes_to) == pytest.approx(goes_to / 8)  # what held once is tried once


def test_a_checkpoint_keeps_what_chains_did_not_bear() -> None:
    memory, other = ChainMemory(ceiling=0.25), ChainMemory()
    other.load_state_dict(memory.state_dict())
    assert other.ceiling == 0.25
    old = {key: value for key, value in memory.state_dict().items() if key != "ceiling"}
    other.load_state_dict(old)
    assert math.isinf(other.ceiling)
