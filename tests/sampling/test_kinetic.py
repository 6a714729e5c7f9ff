"""Kinetic chains: their step is what minibatches allow, and half of it again and again where chains leave."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.kinetic import (
    COLD_BURNIN,
    MAX_SHORTENINGS,
    MORE_BURNIN,
    STEP,
    Beginning,
    KineticRun,
    KineticSampling,
    MakeSampler,
    run_kinetic,
)
from lightning_slt.sampling.metric import Curvature
from lightning_slt.sampling.segment import Segment
from lightning_slt.sampling.step_size import NOISE_HEAT

POSTERIOR = LocalPosterior(1.0, 1.0)
SAMPLING = KineticSampling.of(POSTERIOR, Curvature(torch.tensor([3.0]), torch.eye(1), 3.0))


class Tries:
    """Chains that leave the region for a number of tries, or are on their way for so many, and what they were run
    with."""

    def __init__(self, leaving: int, slope: float = 0.0, on_their_way: int = 0) -> None:
        self.leaving, self.slope, self.on_their_way = leaving, slope, on_their_way
        self.steps: list[float] = []
        self.cold: list[bool] = []
        self.more: list[int] = []
        self.said: list[tuple[int, float, bool]] = []
        self.forgotten = self.proposed = self.looked = 0

    def propose(self, chains: Any, batches: list[int], stream: torch.Generator) -> KineticSampling:
        assert batches == [0, 1]
        self.proposed += 1
        return SAMPLING

    def gradients(self, weights: Tensor, batches: Any) -> Tensor:
        self.looked += 1
        return 3 * weights + self.slope * batches[0]

    def run(self, make_sampler: MakeSampler, beginning: Beginning) -> tuple[Any, Any]:
        chains: Any = SimpleNamespace(gradients=self.gradients, posterior=POSTERIOR)
        posterior, sampler = make_sampler(chains)
        assert posterior is POSTERIOR and sampler.lr is not None
        level = 1e6 if len(self.steps) < self.leaving else 0.0
        self.steps.append(math.sqrt(sampler.lr))
        self.cold.append(beginning.cold)
        self.more.append(beginning.more)
        zeros = torch.zeros(3, 8, dtype=torch.float64)
        difference = zeros + torch.tensor([[level], [level], [0.0]])
        scatter = torch.randn(8, 20, 4, generator=torch.Generator().manual_seed(0))
        way = 9 * torch.exp(-torch.arange(20.0) / 3)[:, None]
        read = scatter + way if len(self.steps) - self.leaving <= self.on_their_way else scatter
        return Drawn(Segment([0, 1, 2], difference, zeros, zeros, zeros, {}, read=read), sampler.lr, 0, 1), chains

    def left(self, count: int, share: float, again: bool) -> None:
        self.said.append((count, share, again))

    def forget(self) -> None:
        self.forgotten += 1

    def outcome(self, **changes: Any) -> KineticRun:
        objective: Any = SimpleNamespace(anchor=torch.zeros(1), device=torch.device("cpu"))
        window = SimpleNamespace(anchor_loss={0: 0.0, 1: 0.0})
        source: Any = SimpleNamespace(window=lambda number: window, forget=self.forget)
        return run_kinetic(objective, source, 0, self.propose, self.run, self.left, **changes)


def test_chains_that_stay_are_run_once_with_the_longest_step() -> None:
    tries = Tries(leaving=0)
    found = tries.outcome()
    assert tries.steps == [pytest.approx(STEP)] and tries.cold == [False]
    assert not tries.said and tries.forgotten == 0 and tries.proposed == 1
    assert bool(found.good.all()) and found.sampling.sampler.lr == pytest.approx(STEP**2) and not found.cooled.shortened


def test_chains_that_leave_start_again_at_the_weights_with_half_the_step() -> None:
    tries = Tries(leaving=2)
    found = tries.outcome()
    assert tries.steps == pytest.approx([STEP, STEP / 2, STEP / 4]) and tries.cold == [False, True, True]
    assert tries.said == [(2, 1.0, True), (2, 0.5, True)] and tries.forgotten == 2 and tries.proposed == 3
    assert bool(found.good.all()) and found.sampling.sampler.lr == pytest.approx((STEP / 4) ** 2)


@pytest.mark.parametrize("most", [MAX_SHORTENINGS, 1, 0])
def test_what_the_last_try_shows_is_given_with_the_chains_that_stayed(most: int) -> None:
    tries = Tries(leaving=100)
    found = tries.outcome(max_shortenings=most)
    assert len(tries.steps) == most + 1 and tries.said[-1] == (2, 0.5**most, False) and tries.forgotten == most
    assert found.good.tolist() == [False, False, True]


def test_what_minibatches_allow_is_measured_once_and_shortened_further_where_chains_leave() -> None:
    tries = Tries(leaving=1, slope=4.0)
    found = tries.outcome()
    assert found.cooled.shortened and found.cooled.heat == pytest.approx(NOISE_HEAT, rel=0.01)
    assert tries.steps[0] < STEP and tries.steps[1] == pytest.approx(tries.steps[0] / 2)
    assert tries.looked == 2  # once by each of the two minibatches


@pytest.mark.parametrize(("ways", "tries"), [(0, 1), (1, 2), (2, 3), (9, 3)])
def test_chains_that_are_on_their_way_burn_in_for_longer_and_are_not_valid_where_that_does_not_end(
    ways: int, tries: int
) -> None:
    run = Tries(leaving=0, on_their_way=ways)
    found = run.outcome()
    assert run.more == [0, *MORE_BURNIN][:tries] and run.cold == [False] * tries and run.forgotten == tries - 1
    assert run.steps == pytest.approx([STEP] * tries) and not run.said
    assert (found.course > 0.5) == (ways > 2)
    assert any("more num_burnin_steps" in reason for reason in found.reasons()) == (ways > 2)


def test_chains_that_have_left_and_are_on_their_way_then_start_at_the_weights_for_longer() -> None:
    run = Tries(leaving=1, on_their_way=1)
    found = run.outcome()
    assert run.cold == [False, True, True] and run.more == [0, 0, MORE_BURNIN[0]] and not found.reasons()
    assert Beginning(True, 24).burnin(6) == COLD_BURNIN + 24 and Beginning(False, 24).burnin(6) == 30
