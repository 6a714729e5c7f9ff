"""What the firings of a run hand on from one to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt.estimate import ChainSettings
from lightning_slt.firing import Course
from lightning_slt.record import Estimate
from lightning_slt.sampling.given_data import source_of
from lightning_slt.sampling.objective import Objective


def noisy_square(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """It draws random numbers, so that chains go one after another."""
    return (module(batch[0]) - batch[1] + 0.01 * torch.randn(len(batch[1]), 1)).square().mean()


def fire(course: Course) -> Estimate:
    torch.manual_seed(0)
    x, y = torch.randn(60, 3), torch.randn(60, 1)
    objective = Objective(nn.Linear(3, 1), noisy_square)
    source = source_of(TensorDataset(x, y), 20, objective.device, 0)
    return course.measure(objective, source, ChainSettings(num_chains=2, num_draws=4))[0]


def test_why_chains_go_one_after_another_is_said_of_later_firings_too() -> None:
    """The path stays for the run, and is not taken for one that was asked for, after a resume either."""
    course = Course()
    first, second = fire(course), fire(course)
    resumed = Course()
    resumed.load_state_dict(course.state_dict())
    for estimate in (first, second, fire(resumed)):
        assert estimate.method == "sequential" and "draws random numbers" in estimate.method_reason
    assert fire(Course(method="sequential")).method_reason == "asked for"
    older = {key: value for key, value in course.state_dict().items() if key != "method_reason"}
    resumed.load_state_dict(older)
    assert fire(resumed).method_reason == "asked for"
