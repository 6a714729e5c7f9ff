"""How many steps a firing makes: when chains have arrived, what is cut off, and how long the draws are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_slt.functional import LocalPosterior
from lightning_slt.sampling.budget import FIRST_ROUNDS, MAX_STEPS_BW_DRAWS, METRIC_ROUNDS, Budget
from lightning_slt.sampling.calibration import draw
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.readings import transient
from lightning_slt.sampling.rounds import Start, _Rounds, has_arrived, is_downhill, is_flat
from lightning_slt.sampling.samplers.base import Heating
from lightning_slt.sampling.segment import STATS_EVERY, Segment
from tests.sampling.helpers import make_chains, mean_squared, mlp, opened, regression
from tests.sampling.segments import segment


def test_arrival_is_asked_for_as_far_as_the_tolerance_goes() -> None:
    """A virial ratio of 0.96: good enough for 5 % and for one unit of an LLC of 20, not for 3 %; never below 0.93."""
    posterior, d = LocalPosterior(20.0, 0.0), 10

    def arrived(ratio: float, budget: Budget) -> bool:
        s = segment(1e-9, ratio * d / 20.0, 1.0, difference=1.0)
        return has_arrived(s, Heating(0.0, noise_alone=True), posterior, d, budget)

    assert arrived(0.96, Budget(100, tolerance=0.05)) and not arrived(0.96, Budget(100, tolerance=0.03))
    assert arrived(0.96, Budget(100, tolerance_llc=1.0)) and not arrived(0.96, Budget(100, tolerance_llc=0.5))
    assert not arrived(0.92, Budget(100, tolerance=0.5)) and arrived(0.94, Budget(100, tolerance=0.5))


def test_draws_are_whole_multiples_and_leave_the_search_out() -> None:
    for seed in range(3):
        chains = make_chains(mlp(), regression(), mean_squared, seed=seed)
        drawn = draw(chains, seed, Budget(num_draws=10))
        assert drawn.segment.steps == 10 * drawn.num_steps_bw_draws
        assert drawn.num_burnin_steps >= sum(FIRST_ROUNDS[:-1])
        assert drawn.num_steps_bw_draws <= 2 * MAX_STEPS_BW_DRAWS


@pytest.mark.parametrize(
    ("num_draws", "apart"),
    [
        (10, 2),
        pytest.param(25, 4, marks=pytest.mark.slow),
        pytest.param(30, 2, marks=pytest.mark.slow),
        pytest.param(40, 1, marks=pytest.mark.slow),
    ],
)
def test_draws_have_the_steps_that_their_readings_speak_of(num_draws: int, apart: int) -> None:
    """Else neither the lean of the step nor how the loss moves with its slope could be told from them."""
    budget = Budget(num_draws=num_draws)
    assert budget.unit == apart * num_draws
    drawn = draw(make_chains(mlp(), regression(), mean_squared, seed=0), 0, budget)
    assert drawn.num_steps_bw_draws % apart == 0
    assert drawn.segment.steps == STATS_EVERY * drawn.segment.grad_square.shape[1]


@pytest.mark.parametrize(("num_draws", "most"), [(25, 4), (99, 4), (50, 2), (25, 3), (30, 3)])
def test_steps_for_the_sake_of_readings_do_not_go_beyond_the_budget(num_draws: int, most: int) -> None:
    """Nor are draws further apart where that gives them no such number of steps."""
    budget = Budget(num_draws=num_draws, max_steps_bw_draws=most, tolerance=1e-3)
    assert budget.unit // num_draws in (1, 2, 4)
    done: list[int] = []
    chains = make_chains(mlp(), regression(), mean_squared, seed=0)
    chains.progress = done.append
    drawn = draw(chains, 0, budget)
    assert sum(done) <= chains.num_chains * budget.most_steps
    assert drawn.segment.steps % budget.unit == 0
    assert drawn.segment.steps == num_draws * drawn.num_steps_bw_draws


@pytest.mark.parametrize(("rise", "least", "most"), [(0.0, 0, 60), (20.0, 10, 80), (150.0, 100, 200)])
def test_transient_is_cut_off(rise: float, least: int, most: int) -> None:
    """An exponential rise of time constant ``rise / 3`` under noise a tenth of it: cut, but never more than half.

    Over 200 seeds the cuts were within these bounds in every one.
    """
    t = torch.arange(400, dtype=torch.float64)
    curve = 1.0 - torch.exp(-3 * t / rise) if rise else torch.ones_like(t)
    for seed in range(5):
        trace = 10 * curve + torch.randn(8, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert least <= transient(trace) <= most
    assert transient(trace[:0]) == 0


def test_every_stretch_has_noise_of_its_own_part_and_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search its rounds', the first steps of warm chains 500, and the draws 1000 and on; 10,000 a generation."""
    parts: list[int] = []
    reseed = Chains.reseed
    monkeypatch.setattr(Chains, "reseed", lambda chains, part: parts.append(part) or reseed(chains, part))
    memory, budget = ChainMemory(), Budget(num_draws=100, max_steps_bw_draws=4, tolerance=1e-3)
    chains = [opened() for _ in range(4)]
    parts.clear()
    draw(chains[0], 0, budget, memory)
    search = list(range(len(FIRST_ROUNDS)))
    later = parts[len(search) :]
    assert parts == search + [1000 + k for k in range(len(later))] and len(later) > 1
    assert memory.generation == 1
    parts.clear()
    draw(chains[1], 0, budget, memory)
    assert parts == [10_500] + [11_000 + k for k in range(len(parts) - 1)] and len(parts) > 2
    for generation, fresh in ((0, chains[2]), (3, chains[3])):
        parts.clear()
        draw(fresh, 0, Budget(num_draws=8, num_burnin_steps=4, lr=1e-4), ChainMemory(generation=generation))
        assert parts == [1000 + 10_000 * generation]


def halves(level: float, drift: float, error: float) -> Segment:
    """Two chains of eight draws at this level, the second half of each so much above the first, more or less."""
    change = torch.tensor([drift - error, drift + error], dtype=torch.float64)[:, None]
    return replace(
        segment(1.0, 1.0, 1.0), difference=level + change * torch.tensor([-0.5] * 4 + [0.5] * 4, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("level", "drift", "error", "flat"),
    [
        (1.0, 0.049, 0.0, True),
        (1.0, 0.051, 0.0, False),
        (1.0, 0.1, 0.06, True),
        (1.0, 0.1, 0.045, False),
        (1.0, -0.19, 0.2, True),
        (1.0, -0.21, 0.2, False),
        (0.1, 0.019, 0.0, True),
        (0.1, 0.021, 0.0, False),
        (-2.0, 0.09, 0.0, True),
    ],
)
def test_a_trace_is_flat_within_a_twentieth_or_two_errors_and_never_beyond_a_fifth(
    level: float, drift: float, error: float, flat: bool
) -> None:
    assert is_flat(halves(level, drift, error), Budget(num_draws=8), 1.0) is flat
    assert is_flat(halves(level / 50.0, drift / 50.0, error / 50.0), Budget(num_draws=4), 50.0) is flat


@pytest.mark.parametrize(
    ("level", "apart", "downhill"), [(-0.39, 0.0, False), (-0.41, 0.0, True), (-1.4, 0.19, True), (-1.4, 0.21, False)]
)
def test_chains_are_downhill_where_they_are_below_zero_by_far_more_than_their_error(
    level: float, apart: float, downhill: bool
) -> None:
    rows = level + apart * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert is_downhill(replace(segment(1.0, 1.0, 1.0), difference=rows.expand(2, 5) / 3.0), 3.0) is downhill


def test_what_a_budget_allows() -> None:
    assert [Budget(10).allowed_error(llc) for llc in (0.1, -2.0)] == pytest.approx([0.03 * 0.4, 0.03 * 2.0])
    assert Budget(10, tolerance_llc=0.7).allowed_error(50.0) == 0.7
    assert Budget(10).most_steps == 2 * 10 * MAX_STEPS_BW_DRAWS
    assert Budget(10, num_burnin_steps=7).most_steps == sum(METRIC_ROUNDS) + 7 + 10
    assert Budget(10, num_burnin_steps=7, lr=0.1, num_steps_bw_draws=3).most_steps == 7 + 30


@pytest.mark.parametrize(("rise", "fits"), [(0, True), (40, True), (80, False)])
def test_displacements_fit_where_no_more_than_a_quarter_of_the_trace_is_cut_off(rise: int, fits: bool) -> None:
    """200 steps with their width, of which so many first ones were made on the way up."""
    chains = make_chains(mlp(), regression(), mean_squared, num_chains=2, nbeta=20.0)
    rounds = _Rounds(chains, Start(1e-6, math.inf, 0, []), Budget(num_draws=10), 0)
    level = torch.full((2, 200), 1.0, dtype=torch.float64)
    level += 0.01 * torch.randn(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level[:, :rise] -= 0.9
    d = len(chains.objective.anchor)
    wide = torch.full((2, 50), float(d) / 20.0, dtype=torch.float64)
    rounds._joined = Segment([0, 1], level, wide, wide, 0 * wide, {(0, 0, 0): 0.0})
    look = rounds.look()
    assert 200 - look.kept.steps in range(rise, rise + 21) and look.fits is fits
    # a step that is much too small is looked for at the start of a firing, and not by keeping what there is
    for asked, bears, warm in ((2.4, math.inf, True), (2.6, math.inf, True), (2.6, 2.0, True), (2.6, math.inf, False)):
        own = _Rounds(chains, Start(1.0, math.inf, 0, [], warm, bears), Budget(num_draws=10), 0)
        own._joined, own._asked_for = rounds._joined, asked
        assert own.drawn(look)[1] is (fits and not (asked == 2.6 and bears > 2.5 and warm))
