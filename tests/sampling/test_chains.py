"""A chain is determined by the seed and its number: not by its neighbours, the engine, the chunks or the ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_slt.estimate import ChainSettings, measure_llc
from lightning_slt.functional import LocalPosterior
from lightning_slt.sampling import chains as chains_room
from lightning_slt.sampling.batches import DatasetSource, ReplaySource
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.chunk import GradientMoments
from lightning_slt.sampling.collective import Alone, Collective, own_chains
from lightning_slt.sampling.engines import BatchedEngine
from lightning_slt.sampling.noise import TableNormal
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.paths import Choice
from lightning_slt.sampling.readings import heat_of
from lightning_slt.sampling.rng import NOISE
from lightning_slt.sampling.samplers import MALA, SGLD, SGNHT, KineticLangevin, LeimkuhlerMatthews, RMSpropSGLD, Sampler
from lightning_slt.sampling.segment import Segment
from lightning_slt.sampling.steps import NoLossError
from tests.sampling.helpers import gen, make_chains, mean_squared, mlp, on_ranks, regression

LR = 2e-3
SAMPLERS: list[Sampler] = [SGLD(), LeimkuhlerMatthews(), RMSpropSGLD(), SGNHT(), KineticLangevin(), MALA()]


def run(steps: int = 24, **settings: Any) -> tuple[Segment, Tensor]:
    chains = make_chains(mlp(), regression(), mean_squared, **settings)
    segment = chains.advance(steps, LR)
    return segment, chains.weights.clone()


def assert_same_chains(a: Segment, b: Segment, tolerance: float) -> None:
    """Equal to ``tolerance`` of the largest number in sight: float32 sums in another order differ by 1e-7."""
    assert a.chains == b.chains
    for name in ("difference", "grad_square", "grad_dot", "square"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.shape == y.shape and bool(torch.isfinite(x).all())
        assert (x - y).abs().max() <= tolerance * x.abs().max(), name


def test_chains_by_hand() -> None:
    """Five steps of one chain on a full batch against a loop written out here."""
    net, data = mlp(), regression(32)
    chains = make_chains(net, data, mean_squared, batch_size=32, num_chains=1, nbeta=20.0, gamma=3.0)
    segment = chains.advance(5, LR)

    x, y = data.tensors
    start = [p.detach().clone() for p in net.parameters()]
    w = [p.clone().requires_grad_() for p in start]
    noise = TableNormal(0, 0, NOISE)
    anchor_loss = None
    for t in range(5):
        loss = mean_squared(lambda v: (v @ w[0].T + w[1]).tanh() @ w[2].T + w[3], (x, y))  # type: ignore[arg-type]
        anchor_loss = loss.item() if anchor_loss is None else anchor_loss
        assert float(segment.difference[0, t]) == pytest.approx(loss.item() - anchor_loss, abs=2e-6)
        grads = torch.autograd.grad(loss, w)
        if t == 0:
            assert float(segment.grad_square[0, 0]) == pytest.approx(sum(float(g.square().sum()) for g in grads), 1e-4)
        if t == 4:
            u = [a.detach() - b for a, b in zip(w, start, strict=True)]
            assert float(segment.square[0, 1]) == pytest.approx(sum(float(v.square().sum()) for v in u), 1e-4)
            dot = sum(float((g * v).sum()) for g, v in zip(grads, u, strict=True))
            assert float(segment.grad_dot[0, 1]) == pytest.approx(dot, 1e-3)
        z = noise.fill_(torch.empty(sum(p.numel() for p in w))).split([p.numel() for p in w])
        with torch.no_grad():
            for p, g, p0, zi in zip(w, grads, start, z, strict=True):
                p += -LR / 2 * (20.0 * g + 3.0 * (p - p0)) + LR**0.5 * zi.view_as(p)
    expected = torch.cat([p.detach().flatten() for p in w])
    torch.testing.assert_close(chains.weights[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_no_sampler_writes_to_the_sequence(sampler: Sampler) -> None:
    before = TableNormal(0)._sequence.clone()
    net, data = mlp(), regression(32)
    make_chains(net, data, mean_squared, batch_size=32, num_chains=2, sampler=sampler).advance(5, 1e-4)
    assert torch.equal(TableNormal(0)._sequence, before)


def test_a_step_of_ones_own_may_write_to_its_noise_unless_it_says_that_it_does_not() -> None:
    class Halved(SGLD):
        def update_(
            self, weights: Tensor, anchor: Tensor, grad: Tensor, noise: Tensor, *rest: Any, **more: Any
        ) -> None:
            super().update_(weights, anchor, grad, noise.mul_(0.5), *rest, **more)

    class Renamed(SGLD):
        pass

    class Kept(SGLD):
        keeps_noise: ClassVar[bool] = True

        def update_(self, *args: Any) -> None:
            super().update_(*args)

    assert (Halved.keeps_noise, Renamed.keeps_noise, Kept.keeps_noise) == (False, True, True)
    before = TableNormal(0)._sequence.clone()
    net, data = mlp(), regression(32)
    make_chains(net, data, mean_squared, batch_size=32, num_chains=1, sampler=Halved()).advance(5, 1e-4)
    assert torch.equal(TableNormal(0)._sequence, before)


def test_sequential_and_batched_give_the_same_chains() -> None:
    one, weights = run(method="sequential")
    many, others = run(method="batched")
    assert_same_chains(one, many, 1e-4)
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_chains_and_another_seed_others() -> None:
    (a, _), (b, _), (c, _) = run(seed=5), run(seed=5), run(seed=6)
    assert_same_chains(a, b, 0.0)
    assert bool((a.difference != c.difference)[:, 1:].all())  # the first step is at w*: zero whatever the seed
    assert not torch.equal(a.square, c.square)


def test_chains_differ_from_each_other_in_noise_and_minibatches() -> None:
    segment, weights = run(num_chains=8)
    correlation = torch.corrcoef(weights - make_chains(mlp(), regression(), mean_squared).objective.anchor)
    # 66 weights: an error of 0.12 each; beyond 0.6 in 1 of 10^5 runs
    assert (correlation - torch.eye(8)).abs().max() < 0.6
    assert len({tuple(row) for row in segment.difference[:, :1].tolist()}) == 1  # all start at w*, where it is zero
    assert float(segment.difference[:, 0].abs().max()) < 1e-6
    assert segment.difference[:, 1].unique().numel() == 8


@pytest.mark.parametrize("method", ["sequential", "batched"])
def test_a_chain_does_not_know_how_many_others_there_are(method: str) -> None:
    four, _ = run(num_chains=4, method=method)
    eight, _ = run(num_chains=8, method=method)
    first = Segment(
        eight.chains[:4], *(getattr(eight, n)[:4] for n in ("difference", "grad_square", "grad_dot", "square")), {}
    )
    assert_same_chains(first, four, 0.0 if method == "sequential" else 1e-5)


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_the_chunk_width_changes_nothing(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunked(objective: Objective, *_: Any) -> Choice:
        return Choice(BatchedEngine(objective, width, "backward"), "as the test says")

    reference, weights = run(num_chains=8, method="sequential")
    monkeypatch.setattr(chains_room, "choose_engine", chunked)
    segment, others = run(num_chains=8)
    assert_same_chains(reference, segment, 1e-4)
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)


def test_a_run_in_stretches_is_the_run_in_one_when_windows_are_walked_through() -> None:
    """Where the data is not resident, the window that a step reads depends on the number of steps before it only."""

    def make() -> Chains:
        source = DatasetSource(regression(96), 8, max_bytes=4 * 8 * 8 * 4, seed=0)
        assert not source.resident and len(source.window(0)) == 4
        return make_chains(mlp(), regression(), mean_squared, source=source)

    whole = make().advance(24, LR)
    chains = make()
    pieces = [chains.advance(steps, LR) for steps in (4, 8, 12)]
    torch.testing.assert_close(torch.cat([p.difference for p in pieces], dim=1), whole.difference, rtol=0, atol=0)
    assert len({window for _, window, _ in whole.anchors}) == 6


@pytest.mark.parametrize("batches", [2, 3, 5])
def test_readings_go_on_from_window_to_window_as_if_there_were_one(batches: int) -> None:
    """Every four steps, whatever the length of the windows: those at the starts of stretches of four."""

    def make() -> Chains:
        source = DatasetSource(regression(96), 8, max_bytes=batches * 8 * 8 * 4, seed=0)
        assert not source.resident and len(source.window(0)) == batches
        return make_chains(mlp(), regression(), mean_squared, source=source)

    whole = make().advance(24, LR)
    chains = make()
    pieces = [chains.advance(4, LR) for _ in range(6)]
    for name in ("square", "grad_square", "grad_dot"):
        one_each = torch.cat([getattr(piece, name) for piece in pieces], dim=1)
        assert one_each.shape == (chains.num_chains, 6)
        torch.testing.assert_close(getattr(whole, name), one_each, rtol=0, atol=0)


@pytest.mark.parametrize(("batches", "every"), [(2, 4), (3, 4), (5, 3), (5, 12)])
def test_a_reader_is_asked_as_often_whatever_the_length_of_the_windows(batches: int, every: int) -> None:
    """Once in so many steps, and not at the first step of each window as well."""

    def make() -> Chains:
        source = DatasetSource(regression(96), 8, max_bytes=batches * 8 * 8 * 4, seed=0)
        assert not source.resident and len(source.window(0)) == batches
        chains = make_chains(mlp(), regression(), mean_squared, source=source)
        chains.reader, chains.read_every = first_weights, every
        return chains

    def first_weights(weights: Tensor, grad: Tensor | None) -> Tensor:
        asked.append(len(weights))
        return weights[:, :3].clone()

    asked: list[int] = []
    read = make().advance(24, LR).read
    chains = make()
    assert sum(asked) == chains.num_chains * 24 // every
    pieces = [chains.advance(every, LR).read for _ in range(24 // every)]
    assert read is not None and read.shape == (chains.num_chains, 24 // every, 3)
    torch.testing.assert_close(read, torch.cat([piece for piece in pieces if piece is not None], dim=1), rtol=0, atol=0)


def test_ranks_whose_windows_are_of_other_lengths_have_readings_of_the_same_steps() -> None:
    """As where the samples of a batch are of many lengths; also those of the noise, at steps 24 and 72."""

    def rank(collective: Collective) -> Segment:
        batches, data = (30, 40)[collective.rank], regression(960)
        source = DatasetSource(data, 8, max_bytes=batches * 8 * 8 * 4, seed=collective.rank)
        source.shared = False
        return make_chains(mlp(), data, mean_squared, source=source, collective=collective).advance(100, LR)

    for segment in on_ranks(2, rank):
        assert segment.difference.shape == (4, 100) and segment.grad_square.shape == (4, 25)
        assert bool(segment.finite.all()) and segment.noise_square is not None
        assert (~segment.noise_square.isnan()).sum(dim=1).tolist() == [2, 2, 2, 2]
        heat = heat_of(segment, LR, LocalPosterior(20.0, 1.0))
        assert bool(torch.isfinite(heat.each).all())


@pytest.mark.parametrize("world_size", [2, 3])
def test_chains_do_not_depend_on_the_ranks_that_run_them(world_size: int) -> None:
    alone, weights = run(num_chains=8)

    def rank(collective: Collective) -> tuple[Segment, Tensor]:
        return run(num_chains=8, collective=collective)

    for number, (segment, own) in enumerate(on_ranks(world_size, rank)):
        assert_same_chains(alone, segment, 0.0)
        torch.testing.assert_close(own, weights[number::world_size], rtol=0, atol=0)


def test_more_ranks_than_chains() -> None:
    alone, _ = run(num_chains=2)
    for segment, _ in on_ranks(3, lambda c: run(num_chains=2, collective=c)):
        assert_same_chains(alone, segment, 0.0)


@pytest.mark.parametrize(("chains", "world"), [(8, 1), (8, 3), (2, 5), (7, 7)])
def test_every_chain_has_one_owner(chains: int, world: int) -> None:
    def rank(number: int) -> Collective:
        collective = Alone()
        collective.rank, collective.world_size = number, world
        return collective

    owned = [own_chains(chains, rank(r)) for r in range(world)]
    assert sorted(k for part in owned for k in part) == list(range(chains))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_an_estimate_does_not_depend_on_the_ranks() -> None:
    """Calibration, burn-in and verdict included: every rank comes to the same decisions."""
    settings = ChainSettings(num_chains=5, num_draws=20, max_steps_bw_draws=2, localization=1.0, method="sequential")

    def measure(collective: Collective | None = None) -> dict[str, Any]:
        objective = Objective(mlp(), mean_squared)
        state = measure_llc(objective, DatasetSource(regression(), 16), settings, collective).state_dict()
        return {k: v for k, v in state.items() if k not in ("seconds", "trace", "method_reason")} | {
            "trace": state["trace"].tolist()
        }

    alone = measure()
    for other in on_ranks(2, measure):
        assert repr(other) == repr(alone)  # to the last bit; NaN is spelt alike


def test_an_error_in_the_step_reaches_the_caller_and_the_module_keeps_its_weights() -> None:
    def fails_later(module: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 30:
            raise ZeroDivisionError("user code")
        return mean_squared(module, batch)

    calls: list[int] = []
    chains = make_chains(mlp(), regression(), fails_later)
    with pytest.raises(ZeroDivisionError, match="user code"):
        chains.advance(100, LR)
    current = torch.cat([p.detach().flatten() for p in chains.objective.parameters()])
    torch.testing.assert_close(current, chains.objective.anchor, rtol=0, atol=0)


def test_a_batch_without_a_loss_is_replaced_by_one_that_has_one() -> None:
    def some(module: nn.Module, batch: Any) -> Any:
        return None if float(batch[0][0, 0]) > 0 else mean_squared(module, batch)

    data = regression()
    batches = [tuple(t[i : i + 8] for t in data.tensors) for i in range(0, 96, 8)]
    without = {i for i, (x, _) in enumerate(batches) if float(x[0, 0]) > 0}
    assert 0 < len(without) < 12
    chains = make_chains(mlp(), data, some, source=ReplaySource(batches, 96, 8))
    segment = chains.advance(200, LR)
    assert bool(segment.finite.all())
    assert {i for _, _, i in segment.anchors} == set(range(12)) - without


def test_no_batch_with_a_loss() -> None:
    with pytest.raises(NoLossError, match="None for every minibatch"):
        make_chains(mlp(), regression(), lambda module, batch: None)


def test_a_chain_that_leaves_the_finite_does_not_touch_the_others() -> None:
    """A loss that raises on non-finite input ends that chain as NaN; chains that stay finite go on as before."""

    def picky(module: nn.Module, batch: Any) -> Tensor:
        if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
            raise ValueError("input contains NaN")
        return mean_squared(module, batch)

    chains = make_chains(mlp(), regression(), picky)
    good = make_chains(mlp(), regression(), mean_squared)
    chains.advance(3, LR)
    good.advance(3, LR)
    chains.weights[2] = torch.nan
    segment, reference = chains.advance(9, LR), good.advance(9, LR)
    assert segment.finite.tolist() == [True, True, False, True]
    keep = [0, 1, 3]
    torch.testing.assert_close(segment.difference[keep], reference.difference[keep], rtol=0, atol=0)


def test_merge_puts_chains_in_order() -> None:
    def part(numbers: list[int]) -> Segment:
        rows = torch.tensor(numbers, dtype=torch.float64).unsqueeze(1).repeat(1, 4)
        return Segment(numbers, rows, rows[:, :1], rows[:, :1], rows[:, :1], {(0, n): float(n) for n in numbers})

    merged = Segment.merge([part([0, 2, 4]), part([1, 3])])
    assert merged.chains == [0, 1, 2, 3, 4]
    assert merged.difference[:, 0].tolist() == merged.square[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert merged.anchors == {(0, n): float(n) for n in range(5)}


def test_progress_counts_every_chain_step() -> None:
    told: list[int] = []
    chains = make_chains(mlp(), regression(), mean_squared, num_chains=3)
    chains.progress = told.append
    chains.advance(10, LR)
    assert sum(told) == 30


def test_restart_goes_back_to_the_anchor_and_on_with_the_noise() -> None:
    chains = make_chains(mlp(), regression(), mean_squared)
    first = chains.advance(5, LR)
    chains.restart()
    torch.testing.assert_close(chains.weights, chains.objective.anchor.repeat(4, 1), rtol=0, atol=0)
    assert not torch.equal(chains.advance(5, LR).square, first.square)


def test_a_sampler_of_the_users_own_moves_the_chains() -> None:
    class Drifting(SGLD):
        def update_(self, weights: Tensor, *_: Any, **__: Any) -> None:
            weights.add_(1.0)

    chains = make_chains(mlp(), regression(), mean_squared)
    chains.sampler = Drifting()
    chains.advance(3, LR)
    torch.testing.assert_close(chains.weights, chains.objective.anchor + 3.0 * torch.ones(4, 1))


@pytest.mark.parametrize("method", ["sequential", "batched"])
def test_gradients_at_any_weights_are_the_mean_over_the_minibatches(method: str) -> None:
    chains = make_chains(mlp(), regression(), mean_squared, num_chains=2, method=method)
    anchor, window = chains.objective.anchor, chains.source.window(0)
    weights = anchor + 0.1 * torch.randn(3, len(anchor), generator=gen(5))
    found = chains.gradients(weights, [0, 2, 3])
    for row, got in zip(weights, found, strict=True):
        net = mlp()
        torch.nn.utils.vector_to_parameters(row, net.parameters())
        loss = sum(mean_squared(net, window[i]) for i in (0, 2, 3)) / 3
        grads = torch.autograd.grad(loss, list(net.parameters()))
        torch.testing.assert_close(got, torch.cat([g.flatten() for g in grads]), rtol=1e-4, atol=1e-6)


def test_moments_of_gradients_are_their_mean_squares_over_chains() -> None:
    moments, grad = GradientMoments(torch.zeros(3)), torch.randn(5, 3, generator=gen(0))
    for rows in grad.split([2, 3]):
        moments.add(rows)
    torch.testing.assert_close(moments.total / moments.count, grad.square().mean(dim=0))


@pytest.mark.parametrize(("lr", "share"), [(1e-9, 1.0), (10.0, 0.0)])
def test_acceptance_is_of_the_proposals_of_a_stretch(lr: float, share: float) -> None:
    """The first weights of a chain are no proposal."""
    chains = make_chains(mlp(), regression(32), mean_squared, batch_size=32, num_chains=2, sampler=MALA())
    for steps in (5, 3):
        acceptance = chains.advance(steps, lr).acceptance
        assert acceptance is not None and acceptance.tolist() == [share, share]


@pytest.mark.parametrize("sampler", [KineticLangevin(), MALA(), SGNHT()], ids=lambda sampler: type(sampler).__name__)
def test_chains_that_are_put_anywhere_have_no_past(sampler: Sampler) -> None:
    chains = make_chains(mlp(), regression(32), mean_squared, batch_size=32, num_chains=2, sampler=sampler)
    for put in (chains.restart, lambda: chains.place(torch.ones_like(chains.weights))):
        chains.advance(3, 1e-4)
        assert all(bool(x.any()) for name, x in chains._state.tensors.items() if name in ("started", "momentum"))
        put()
        assert not any(bool(x.any()) for x in chains._state.tensors.values())
