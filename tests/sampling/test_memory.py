"""Warm chains: what the kept displacements save, and that they leave no bias on repeated noise."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_slt.estimate import ChainSettings, measure_llc
from lightning_slt.influence import measure_both, probe_set
from lightning_slt.record import Estimate
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.collective import Collective
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.objective import Objective
from tests.cases.problems import Case, regular
from tests.sampling.helpers import make_chains, mean_squared, mlp, on_ranks, regression

# one path: the two round in another order, and which is faster is timed
SETTINGS = ChainSettings(
    num_chains=4, num_draws=100, tolerance=0.05, max_steps_bw_draws=4, localization=5.0, method="sequential"
)


def case() -> Case:
    return regular(n=400, eigenvalues=[4.0, 4.0, 3.0, 2.0, 2.0, 1.5, 1.0, 1.0, 0.5, 0.5], gamma=5.0)


def fire(problem: Case, memory: ChainMemory, seed: int = 0, collective: Collective | None = None) -> Estimate:
    settings = ChainSettings(**{**SETTINGS.__dict__, "seed": seed})
    source = DatasetSource(problem.dataset, 64, seed=seed)
    return measure_llc(Objective(problem.module, problem.loss_fn), source, settings, collective, None, memory)


def steps_of(estimate: Estimate) -> int:
    return estimate.num_burnin_steps + estimate.num_draws * estimate.num_steps_bw_draws


def test_the_second_firing_is_shorter_and_the_same_answer() -> None:
    problem, memory = case(), ChainMemory()
    cold = fire(problem, memory)
    kept = memory.displacements
    assert kept is not None and kept.shape == (4, 10) and memory.generation == 1
    warm = fire(problem, memory)
    assert problem.truth is not None
    for estimate in (cold, warm):
        assert abs(estimate.mean - problem.truth) < max(0.05 * problem.truth, 3 * estimate.se)
    assert warm.step_size == cold.step_size
    assert steps_of(warm) < steps_of(cold)


def test_firings_that_fit_share_their_start_and_their_noise() -> None:
    """Nothing has moved, so the kept displacements fit: the third firing is the second to the last bit."""
    problem, memory = case(), ChainMemory()
    fire(problem, memory)
    while True:  # a round that is not flat renews them
        generation, warm = memory.generation, fire(problem, memory)
        if memory.generation == generation:
            break
        assert memory.generation < 6
    again = fire(problem, memory)
    assert torch.equal(again.trace, warm.trace) and memory.generation == generation


def linear_chain(keep_starts: bool, same_noise: bool, memory: float, seeds: int = 4000, firings: int = 30) -> Tensor:
    """Mean square over a firing of ``u -> m u + sqrt(1 - m²) xi``, stationary variance 1, after many firings.

    Args:
        keep_starts: every firing starts from the displacements that the first one left.
        same_noise: every firing but the first has the same noise.
        memory: correlation over the whole of a firing of 20 steps.
    """
    m, g = memory ** (1 / 20), torch.Generator().manual_seed(0)
    first = torch.randn(seeds, generator=g, dtype=torch.float64)
    noise = torch.randn(20, seeds, generator=g, dtype=torch.float64)
    u = first
    for _ in range(firings):
        if keep_starts:
            u = first
        if not same_noise:
            noise = torch.randn(20, seeds, generator=g, dtype=torch.float64)
        seen = []
        for xi in noise:
            u = m * u + math.sqrt(1 - m * m) * xi
            seen.append(u.square().mean())
    return torch.stack(seen).mean()


@pytest.mark.parametrize("memory", [0.3, 0.8])
def test_going_on_from_the_last_firing_on_repeated_noise_is_biased_and_kept_starts_are_not(memory: float) -> None:
    """``(1 + a) / (1 - a)``: the closed form of the module's text. 4000 chains: an error of 2.2 % of a variance."""
    assert float(linear_chain(True, True, memory)) == pytest.approx(1.0, abs=0.07)
    assert float(linear_chain(False, False, memory)) == pytest.approx(1.0, abs=0.07)
    assert float(linear_chain(False, True, memory)) == pytest.approx((1 + memory) / (1 - memory), rel=0.1)


def test_repeated_warm_firings_have_no_bias() -> None:
    """The mean over 6 seeds of the fourth firing, on a model whose value is known; 4 % and three errors."""
    problem = case()
    last = []
    for seed in range(6):
        memory = ChainMemory()
        for _ in range(4):
            estimate = fire(problem, memory, seed)
        last.append(estimate.mean)
    means = torch.tensor(last, dtype=torch.float64)
    assert problem.truth is not None
    assert abs(float(means.mean()) - problem.truth) < max(0.04 * problem.truth, 3 * float(means.std()) / math.sqrt(6))


def test_displacements_follow_the_weights() -> None:
    """The chains of the next firing start at w*_new + (w_chain - w*_old)."""
    chains = make_chains(mlp(), regression(), mean_squared)
    chains.advance(12, 1e-3)
    memory = ChainMemory()
    memory.keep(chains)
    moved = mlp()
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.25)
    after = make_chains(moved, regression(), mean_squared)
    start = memory.start_of(after)
    assert start is not None
    after.place(start)
    torch.testing.assert_close(after.weights, chains.weights + 0.25)


@pytest.mark.parametrize("with_influence", [False, True])
def test_warm_chains_that_have_not_mixed_do_not_come_back(with_influence: bool) -> None:
    """By chance, on weights that stay: their trace was flat, so that the next firing had the same start and the same
    noise, and was as little valid, for ever."""
    problem = regular(n=400, eigenvalues=[4.0 * 10 ** (-2 * k / 9) for k in range(10)], gamma=1.0, noise=1.0)
    settings = replace(SETTINGS, seed=28, localization=1.0, method="batched")
    memory, found = ChainMemory(), list[Estimate]()
    for _ in range(3):
        source = DatasetSource(problem.dataset, 64, seed=28)
        objective = Objective(problem.module, problem.loss_fn)
        if with_influence:
            probes = probe_set(source, None, 50, None, 0)
            found.append(measure_both(objective, source, settings, probes, memory=memory)[0])
        else:
            found.append(measure_llc(objective, source, settings, memory=memory))
    assert [estimate.kinds for estimate in found] == [(), ("NOT_MIXED",), ()]
    assert memory.generation == 2  # that of the first firing, and where the second ended
    assert problem.truth is not None and abs(found[-1].mean - problem.truth) < 3 * found[-1].se


@pytest.mark.parametrize("seed", [31, 51])
def test_a_step_that_has_become_too_large_is_made_smaller_though_the_trace_drifts(seed: int) -> None:
    """Ten times as steep as at the firing before: chains are too hot, at a level that a drift within the tolerance is
    left in. That had been taken for a rise on which the step is to stay, and its end for good draws, at every firing to
    come: 3.8 times the truth, not valid."""
    steep = [4.0, 4.0, 3.0, 2.0, 2.0, 1.5, 1.0, 1.0, 0.5, 0.5]
    settings = replace(SETTINGS, seed=seed, localization=1.0, method="batched")
    memory = ChainMemory()
    for factor in (1.0, 10.0):
        problem = regular(n=400, eigenvalues=[factor * h for h in steep], gamma=1.0, noise=1.0)
        source = DatasetSource(problem.dataset, 64, seed=seed)
        estimate = measure_llc(Objective(problem.module, problem.loss_fn), source, settings, memory=memory)
        assert problem.truth is not None
        assert estimate.valid and abs(estimate.mean - problem.truth) < 3 * estimate.se


@pytest.mark.parametrize("seed", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)])
def test_a_step_that_has_become_far_too_small_is_found_by_the_next_firing(seed: int) -> None:
    """A tenth as steep as at the firing before: chains are as narrow as they were, at which nobody asks for a larger
    step, and get wide too slowly to be called unfit. The same firing came back for ever, with three times the error
    and not valid; chains that ask for a larger step in the end are kept, so that the next ones start as wide."""
    steep = [4.0, 4.0, 3.0, 2.0, 2.0, 1.5, 1.0, 1.0, 0.5, 0.5]
    settings = replace(SETTINGS, seed=seed, localization=1.0, method="batched")
    memory, steps = ChainMemory(), []
    for factor in (10.0, 10.0, 1.0, 1.0):
        problem = regular(n=400, eigenvalues=[factor * h for h in steep], gamma=1.0, noise=1.0)
        source = DatasetSource(problem.dataset, 64, seed=seed)
        estimate = measure_llc(Objective(problem.module, problem.loss_fn), source, settings, memory=memory)
        steps.append(estimate.step_size)
    assert steps[1] == steps[0] and 5.0 < steps[3] / steps[1] < 15.0
    assert problem.truth is not None
    assert estimate.valid and abs(estimate.mean - problem.truth) < 3 * estimate.se


@pytest.mark.parametrize(("burnin", "good"), [(200, 1), (50, 2), (0, 2)])
def test_a_step_that_has_become_too_large_does_not_stay_where_the_burnin_is_given(burnin: int, good: int) -> None:
    """Ten times as steep from the second firing on. A burn-in that is long enough is where the step is made smaller;
    of a shorter one the next firing has it. It had stayed for ever, at 2.7 times the truth, not valid; and warm
    chains without any burn-in ended with an IndexError."""
    steep, memory = [4.0, 4.0, 3.0, 2.0, 2.0, 1.5, 1.0, 1.0, 0.5, 0.5], ChainMemory()
    settings = replace(
        SETTINGS, localization=1.0, method="batched", num_draws=200, num_burnin_steps=burnin, num_steps_bw_draws=1
    )
    found = []
    for factor in (1.0, 10.0, 10.0):
        problem = regular(n=400, eigenvalues=[factor * h for h in steep], gamma=1.0, noise=1.0)
        source = DatasetSource(problem.dataset, 64, seed=0)
        found.append(measure_llc(Objective(problem.module, problem.loss_fn), source, settings, memory=memory))
        assert problem.truth is not None
        fits = abs(found[-1].mean - problem.truth) < 2.5 * found[-1].se
        assert (found[-1].valid and fits) is (len(found) != 2 or good == 1)
    assert found[-1].step_size < 0.4 * found[0].step_size
    assert [e.num_burnin_steps for e in found[1:]] == [burnin, burnin]


@pytest.mark.parametrize("factor", [30.0, math.nan])
def test_displacements_that_do_not_fit_are_renewed(factor: float) -> None:
    problem, memory = case(), ChainMemory()
    fire(problem, memory)
    assert memory.displacements is not None
    memory.displacements *= factor
    generation, estimate = memory.generation, fire(problem, memory)
    assert memory.generation > generation and memory.displacements is not None
    assert bool(torch.isfinite(memory.displacements).all())
    assert problem.truth is not None
    assert abs(estimate.mean - problem.truth) < max(0.1 * problem.truth, 3 * estimate.se)


def test_other_weights_or_other_chains_start_cold() -> None:
    memory = ChainMemory()
    chains = make_chains(mlp(), regression(), mean_squared, num_chains=2)
    memory.keep(chains)
    assert memory.start_of(chains) is not None
    assert memory.start_of(make_chains(mlp(), regression(), mean_squared, num_chains=3)) is None
    assert memory.start_of(make_chains(mlp(), regression(), mean_squared, num_chains=2, restrict="0.*")) is None


def test_the_ranks_do_not_matter_and_a_checkpoint_brings_it_back() -> None:
    problem, alone = case(), ChainMemory()
    fire(problem, alone)
    expected = fire(problem, alone)

    def rank(collective: Collective) -> tuple[Estimate, dict[str, Any]]:
        memory = ChainMemory()
        fire(case(), memory, collective=collective)
        stored = memory.state_dict()
        return fire(case(), memory, collective=collective), stored

    for estimate, stored in on_ranks(2, rank):
        torch.testing.assert_close(estimate.per_chain, expected.per_chain, rtol=1e-4, atol=1e-5)
        resumed = ChainMemory()
        resumed.load_state_dict(stored)
        assert resumed.numbers != () and resumed.generation == 1
        again = fire(problem, resumed)
        torch.testing.assert_close(again.per_chain, expected.per_chain, rtol=1e-4, atol=1e-5)


def test_large_displacements_stay_out_of_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_slt.sampling.memory.MAX_CHECKPOINT_BYTES", 10)
    memory = ChainMemory()
    memory.keep(make_chains(mlp(), regression(), mean_squared))
    assert memory.displacements is not None
    state = memory.state_dict()
    assert state["displacements"] is None and state["numbers"] == [] and state["generation"] == 1


@pytest.mark.parametrize(("most", "rows"), [(4 * 66 * 4, 4), (4 * 66 * 4 - 1, 2)])
def test_ranks_keep_the_chains_of_all_where_these_are_few_bytes(
    monkeypatch: pytest.MonkeyPatch, most: int, rows: int
) -> None:
    """Four chains of 66 weights, four bytes each, on two ranks."""
    monkeypatch.setattr("lightning_slt.sampling.memory.MAX_CHECKPOINT_BYTES", most)

    def rank(collective: Collective) -> tuple[tuple[int, ...], Tensor, Tensor]:
        chains = make_chains(mlp(), regression(), mean_squared, collective=collective)
        chains.advance(4, 1e-3)
        memory = ChainMemory()
        memory.keep(chains)
        start = memory.start_of(chains)
        assert memory.displacements is not None and start is not None
        assert memory.displacements.shape == (rows, 66) and len(memory.numbers) == rows
        torch.testing.assert_close(start, chains.displacements().cpu())
        return memory.numbers, memory.displacements, start

    (first, kept, one), (second, also, other) = on_ranks(2, rank)
    assert sorted({*first, *second}) == [0, 1, 2, 3]
    assert not torch.equal(one, other)
    if rows == 4:
        assert first == second and torch.equal(kept, also)


def test_what_is_forgotten_is_all_but_the_step_and_its_noise_does_not_come_back() -> None:
    memory = ChainMemory(lr=0.1, ceiling=0.5)
    memory.keep(make_chains(mlp(), regression(), mean_squared))
    memory.preconditioner = torch.ones(66)
    memory.forget()
    assert (memory.numbers, memory.displacements, memory.preconditioner) == ((), None, None)
    assert (memory.lr, memory.ceiling, memory.generation) == (0.1, 0.5, 2)
    memory.forget()
    assert memory.generation == 2


def test_what_shards_leave_stays_on_its_rank_and_out_of_checkpoints() -> None:
    """However little it is; and the old displacements do not stand beside the new ones."""
    memory, beside = ChainMemory(displacements=torch.ones(2, 3), numbers=(0, 1)), list[Tensor | None]()

    def displacements() -> Tensor:
        beside.append(memory.displacements)
        return torch.zeros(2, 3)

    chains: Any = SimpleNamespace(
        displacements=displacements, preconditioner=torch.full((3,), 2.0), layout=SimpleNamespace(sharded=True),
        num_chains=2, numbers=[0, 1], collective=None,
    )  # fmt: skip
    memory.keep(chains)
    assert beside == [None] and memory.sharded and memory.numbers == (0, 1)
    assert memory.preconditioner is not None and memory.preconditioner.tolist() == [2.0] * 3
    state = memory.state_dict()
    assert (state["displacements"], state["numbers"], state["preconditioner"]) == (None, [], None)


def test_a_checkpoint_has_the_metric_with_the_displacements() -> None:
    memory, resumed = ChainMemory(), ChainMemory()
    memory.keep(make_chains(mlp(), regression(), mean_squared))
    memory.preconditioner = torch.arange(66.0)
    resumed.load_state_dict(memory.state_dict())
    assert resumed.preconditioner is not None and resumed.displacements is not None
    assert resumed.preconditioner.tolist() == list(range(66)) and resumed.numbers == memory.numbers
