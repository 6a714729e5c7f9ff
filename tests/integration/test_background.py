"""Firings beside training: the same numbers as inside, a queue that keeps its word, and workers that may die."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.harness import Scenario, SLTMonitor, assert_same, steps_of, tiny_monitor
from tests.integration.models import Net, loaders

pytestmark = pytest.mark.timeout(120)


def beside(**changes: Any) -> SLTMonitor:
    """A tiny monitor in the background that leaves no firing out."""
    return tiny_monitor(execution="background", devices=["cpu"], when_full="wait", max_wait=60.0, **changes)


def assert_same_estimates(ours: SLTMonitor, theirs: SLTMonitor) -> None:
    """The same points, to the last bit."""
    assert steps_of(ours) == steps_of(theirs)
    for a, b in zip(ours.estimates, theirs.estimates, strict=True):
        assert torch.equal(a.trace, b.trace)
        assert (a.mean, a.se, a.x, a.epoch, a.init_loss) == (b.mean, b.se, b.x, b.epoch, b.init_loss)


def test_results_are_those_of_firings_inside_training(tmp_path: Path) -> None:
    scenario = Scenario(Net, loaders)
    inline, background = tiny_monitor(), beside()
    without = scenario.run(tmp_path / "inline", inline)
    assert_same(without, scenario.run(tmp_path / "background", background))
    assert steps_of(inline) == [4, 8, 12]
    assert_same_estimates(background, inline)
