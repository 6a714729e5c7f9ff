"""What is said where the losses of samples are computed one by one: the cause, what helps, and that once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils.data import Subset

from lightning_slt import estimate_influence, estimate_susceptibility
from lightning_slt.sampling.anchor import open_window
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.probe import Probe
from lightning_slt.sampling.samples import Samples
from tests.integration.harness import Scenario, steps_of, tiny_monitor
from tests.integration.models import Net, loaders
from tests.sampling.helpers import mlp, regression, seeded

SLOW = (
    "the losses of single samples (influence, susceptibility) are computed one by one, which takes many times as long: "
)
LOSSES = "give loss_fn(module, batch) -> [batch] losses of single samples."
TAKEN = (
    "the step takes a number out of a tensor (.item() or float()). Use .detach() in place of .item(), which keeps it a "
    f"tensor, or {LOSSES}"
)
DECIDED = f"the step decides by the values of a tensor (an if). Use torch.where in its place, or {LOSSES}"


def mean(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(module(batch[0]), batch[1])


def item(module: nn.Module, batch: Any) -> Tensor:
    loss = mean(module, batch)
    loss.item()
    return loss


def as_float(module: nn.Module, batch: Any) -> Tensor:
    loss = mean(module, batch)
    float(loss)
    return loss


def by_hand(module: nn.Module, batch: Any) -> Tensor:
    """No loss function of torch's whose mean could be left out, so that vmap alone is what fails."""
    loss = (module(batch[0]) - batch[1]).square().mean()
    loss.item()
    return loss


def branches(module: nn.Module, batch: Any) -> Tensor:
    loss = mean(module, batch)
    return loss if loss > -1 else 2 * loss


def detached(module: nn.Module, batch: Any) -> Tensor:
    loss = mean(module, batch)
    loss.detach()
    return loss


def apart(module: nn.Module, batch: Any) -> Tensor:
    losses = (module(batch[0]) - batch[1]).square().mean(dim=1)
    losses.mean().item()
    return losses


@pytest.mark.parametrize(
    ("loss", "said"),
    [(item, TAKEN), (as_float, TAKEN), (by_hand, TAKEN), (branches, DECIDED), (detached, ""), (apart, "")],
)
def test_the_cause_is_named_with_what_helps_and_what_helps_does(
    loss: Callable[[nn.Module, Any], Tensor], said: str
) -> None:
    objective, source = Objective(seeded(mlp), loss), DatasetSource(regression(), 4)
    open_window(objective, source)
    with objective.active():
        several, single = (Probe(objective, Samples.of(source, range(count))) for count in (6, 1))
    assert several.slow == (SLOW + said if said else "") and single.slow == ""


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "one by one" in record.getMessage()]


@pytest.mark.slow
def test_a_run_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Takes(Net):
        def loss(self, batch: Any) -> Tensor:
            loss = super().loss(batch)
            loss.item()
            return loss

    monitor = tiny_monitor(probe=7, measures=["influence", "susceptibility"], num_draws=16)
    Scenario(Takes, loaders).run(tmp_path, monitor)
    assert steps_of(monitor) == [4, 8, 12] and len(monitor.influences) == len(monitor.susceptibilities) == 3
    assert told(caplog) == [f"SLTMonitor: {SLOW}{TAKEN}"]
    assert [record.levelno for record in caplog.records if "one by one" in record.getMessage()] == [logging.WARNING]


def test_an_estimate_is_told_once_of_all_its_chains(caplog: pytest.LogCaptureFixture) -> None:
    data, few = regression(), Subset(regression(), range(3))
    settings: dict[str, Any] = {"num_chains": 2, "num_draws": 10}
    estimate_influence(seeded(mlp), few, few, item, **settings)
    assert told(caplog) == [SLOW + TAKEN]
    caplog.clear()
    components = {"weights": ["*.weight"], "biases": ["*.bias"]}
    estimate_susceptibility(seeded(mlp), data, few, item, components=components, **settings)
    assert told(caplog) == [SLOW + TAKEN]
