"""Numbers of a calibration that are made of others, and which steps of training are timed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_slt.calibrate import training_step
from lightning_slt.calibrate.result import Calibration
from lightning_slt.calibrate.training_step import training_step_seconds
from lightning_slt.config import load
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.objective import Objective
from lightning_slt.sweep import SweepConfig
from tests.publish.helpers import make_estimate
from tests.sampling.helpers import mean_squared, regression


def made(unstable: float | None = 3e-4, first: float = 2.0, training: float = 0.03, **changes: Any) -> Calibration:
    estimate = make_estimate(step=40).replace(**{"step_size": 3e-5, **changes})
    config = load({"module": "m:M", "data": "m:d"}, schema=SweepConfig)
    return Calibration("x", config, estimate, estimate, True, first, 1.0, training, 50, 4, unstable)


def test_the_step_as_a_share_of_the_unstable_one() -> None:
    assert made().step_share == pytest.approx(0.1)
    assert made(unstable=None).step_share is None


@pytest.mark.parametrize(
    ("mean", "bias", "lean", "share"),
    [
        (2.0, 0.5, 0.1, 0.4 / 2.5),
        (2.0, 0.1, 0.3, 0.0),
        (2.0, 0.5, -0.3, 0.2),
        (-2.0, 0.5, 0.0, math.nan),
        (-0.5, 0.5, 0.0, math.nan),
    ],
)
def test_the_heat_is_a_share_of_the_estimate_before_it_was_taken_off(
    mean: float, bias: float, lean: float, share: float
) -> None:
    """Without what chains that keep away from steep weights lack, which is told by itself."""
    assert made(mean=mean, step_bias=bias, lean=lean).heat_share == pytest.approx(share, nan_ok=True)


def test_a_firing_that_is_begun_in_a_step_of_training_takes_all_of_it() -> None:
    assert [made(first=seconds).first_in_steps for seconds in (0.01, 0.03, 0.031, 2.0)] == [1, 1, 2, 67]


@pytest.mark.parametrize(
    ("later", "steps", "found"),
    [(2.0, 3 + 5, 2.0), (0.25, 3 + 5, 0.25), (0.11, 3 + 10, 0.11), (1e-4, 3 + 100, 1e-4)],
    ids=["long steps", "some of them", "of a second in all", "short steps"],
)
def test_training_is_timed_for_about_a_second_and_not_while_kernels_are_loaded(
    later: float, steps: int, found: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, however long, are not counted; five at the least are, and a hundred at the most; of all minibatches
    in turn."""
    for early in (9.0, 0.0):
        reads: list[float] = []

        def clock(device: torch.device, reads: list[float] = reads, early: float = early) -> float:
            step, end = divmod(len(reads), 2)
            reads.append(
                (reads[-1] if reads else 0.0) + (end and (early if step < 3 else later * (0.98 + step % 5 / 100)))
            )
            return reads[-1]

        monkeypatch.setattr(training_step, "seconds_on", clock)
        seen: list[float] = []

        def loss(module: nn.Module, batch: Any, seen: list[float] = seen) -> torch.Tensor:
            seen.append(float(batch[0][0, 0]))
            return mean_squared(module, batch)

        source = DatasetSource(regression(), 16)
        assert training_step_seconds(Objective(nn.Linear(5, 3), loss), source) == pytest.approx(found)
        assert len(set(seen[-6:])) == 6 == len(source.window(0))
        if early == 0.0:
            assert len(reads) == 2 * steps
