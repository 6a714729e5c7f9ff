"""Gradients of large weights stay where autograd makes them, and chains go where they would with one memory for all."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_slt.functional import LocalPosterior
from lightning_slt.sampling import gradients
from lightning_slt.sampling.anchor import open_window
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.engines import BatchedEngine, BorrowedEngine, SequentialEngine
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.samplers import SGLD, KineticLangevin, LeimkuhlerMatthews, RMSpropSGLD
from lightning_slt.sampling.segment import NOISE_EVERY, NOISE_LAG, Segment
from lightning_slt.sampling.step_size import first_step, largest_step_of_chains
from tests.sampling import helpers
from tests.sampling.helpers import cross_entropy, make_chains, mean_squared, mlp, next_token, regression, tokens


class Loose(nn.Module):
    """Weights that no loss reaches, and one without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(3, 7))
        self.net = helpers.Scaled()
        self.last = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Sparse(helpers.Tied):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, sparse=True)


class Checkpointed(helpers.Tied):
    """Its tied weight gets a gradient from a backward pass within the backward pass, and another from without."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.embedding(x)).tanh()
        return checkpoint(self.head, h, use_reentrant=True)  # type: ignore[no-any-return]


class Shared(nn.Module):
    """Of a sum of two weights in other shapes autograd gives both the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(5, 3) / 3), nn.Parameter(torch.ones(15) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.a.view(-1) + self.b).view(5, 3)


class Transposed(nn.Module):
    """A gradient that does not lie as its weight does."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,oi->no", x, self.w)


class _Lent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (w * x.flatten()).sum()

    @staticmethod
    def backward(ctx: Any, *outside: Tensor) -> Any:
        return ctx.saved_tensors[0].view(-1), None


class Lent(nn.Module):
    """The gradient of its weight is the minibatch, in the minibatch's own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(16 * 5))

    def forward(self, x: Tensor) -> Tensor:
        return _Lent.apply(self.w, x)  # type: ignore[no-any-return, no-untyped-call]


def in_double(data: TensorDataset) -> TensorDataset:
    return TensorDataset(*(t.double() for t in data.tensors))


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], TensorDataset], Any]] = {
    "mlp": (mlp, regression, mean_squared),
    "conv": (
        lambda: helpers.Conv(lambda: nn.BatchNorm2d(4)), lambda: helpers.classification((1, 8, 8)), cross_entropy,
    ),
    "lstm": (helpers.Recurrent, lambda: helpers.classification((5, 4)), cross_entropy),
    "attention": (helpers.Attention, tokens, next_token),
    "tied": (helpers.Tied, tokens, next_token),
    "sparse": (Sparse, tokens, next_token),
    "checkpointed": (Checkpointed, tokens, next_token),
    "unreached": (Loose, regression, mean_squared),
    "shared": (Shared, regression, mean_squared),
    "lent": (Lent, regression, lambda module, batch: module(batch[0])),
    "transposed": (Transposed, regression, mean_squared),
    "double": (lambda: mlp().double(), lambda: in_double(regression()), mean_squared),
}  # fmt: skip


def chains_of(name: str, in_parts: bool, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Chains:
    """Chains of a small model, as if it were large (with blocks of 7 weights, which no parameter has) or as it is."""
    make, data, loss_fn = PROBLEMS[name]
    monkeypatch.setattr(gradients, "IN_PARTS", 0 if in_parts else math.inf)
    monkeypatch.setitem(gradients.BLOCK, "cpu", 7)
    torch.manual_seed(0)
    chains = make_chains(make(), data(), loss_fn, **{"num_chains": 3, **settings})
    assert chains._gradients.in_parts is in_parts
    return chains


def both(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Chains, Chains]:
    return chains_of(name, True, monkeypatch, **settings), chains_of(name, False, monkeypatch, **settings)


def assert_same_way(parts: Segment, whole: Segment) -> None:
    """The same numbers; but a dot product rounds otherwise where what it is of begins at another place in memory."""
    assert torch.equal(parts.difference, whole.difference) and torch.equal(parts.square, whole.square)
    for name in ("grad_square", "grad_dot"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=2e-6, atol=1e-6), name


@pytest.mark.parametrize(
    "sampler", [pytest.param(SGLD(), marks=pytest.mark.slow), LeimkuhlerMatthews()], ids=["SGLD", "LeimkuhlerMatthews"]
)
@pytest.mark.parametrize("name", PROBLEMS)
def test_chains_go_where_they_would_with_one_memory_for_all_gradients(
    name: str, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, whole = both(name, monkeypatch, sampler=sampler)
    told = [chains.advance(NOISE_EVERY + NOISE_LAG + 4, 1e-3) for chains in (parts, whole)]
    assert_same_way(*told)
    assert torch.equal(parts.weights, whole.weights)
    assert float(parts.displacements().abs().max()) > 0.01
    noise, expected = (segment.noise_square for segment in told)
    assert noise is not None and expected is not None and noise.shape == (3, 2) and float(expected[:, 0].min()) > 0
    # the first minibatch's gradient has been held in 8 bits, and is so much off; the second may be that minibatch again
    assert torch.allclose(noise, expected, rtol=5e-3, atol=2.0**-18 * float(told[1].grad_square.max()))


def test_none_of_the_gradients_is_held_beside_those_of_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the step begins its loss, those of the step before have gone."""
    left: list[int] = []
    chains = chains_of("mlp", True, monkeypatch)
    kept = chains.objective.loss

    def loss(batch: Any) -> Tensor:
        left.append(sum(p.grad is not None for p in chains.objective.parameters()) + len(chains._engine._left))  # type: ignore[attr-defined]
        return kept(batch)

    monkeypatch.setattr(chains.objective, "loss", loss)
    chains.advance(20, 1e-4)
    assert len(left) >= 60 and not any(left)


class Doubling(SGLD):
    """A sampler of a user's that changes the gradient in place, as it may."""

    def update_(self, weights: Tensor, anchor: Tensor, grad: Tensor, *rest: Any, **named: Any) -> None:
        grad.mul_(2.0)
        super().update_(weights, anchor, grad, *rest, **named)


@pytest.mark.parametrize("name", ["shared", "mlp", "unreached", "lent"])
def test_a_sampler_that_changes_a_gradient_changes_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, whole = both(name, monkeypatch, sampler=Doubling())
    assert_same_way(parts.advance(30, 1e-3), whole.advance(30, 1e-3))
    assert torch.equal(parts.weights, whole.weights)


def test_a_chain_that_diverges_ends_as_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, whole = (chains.advance(60, 1e3) for chains in both("mlp", monkeypatch))
    assert torch.equal(parts.finite, whole.finite) and not bool(parts.finite.any())
    for a, b in ((parts.noise_square, whole.noise_square), (parts.difference, whole.difference)):
        assert a is not None and b is not None and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("name", ["mlp", "tied", "checkpointed", "unreached"])
def test_the_slope_along_a_line_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chains in both(name, monkeypatch):
        chains.advance(10, 1e-3)
        with chains.line(0) as look:
            found.append([look(share) for share in (0.0, 0.5, 1.0)])
        with chains.line(2) as look:  # the last one: no other's memory is there
            found[-1].append(look(0.5))
    assert torch.allclose(*(torch.tensor(x, dtype=torch.float64) for x in found), rtol=1e-5, atol=1e-7)
    assert max(abs(slope) for _, slope in found[0]) > 1e-2


@pytest.mark.parametrize("num_chains", [1, 2, 3])
def test_the_search_for_a_step_has_the_same_answer_in_less_memory(
    num_chains: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer than three chains to take memory of, a direction and the gradients that it is replaced by are one."""
    found = []
    for chains in both("mlp", monkeypatch, num_chains=num_chains):
        window = chains.source.window(0)
        arguments = chains.objective, window, chains.posterior, 0, chains.scratch()
        step = first_step(*arguments, sparing=chains.sparing)
        chains.restart()
        chains.advance(10, 1e-3)
        found.append((step, largest_step_of_chains(chains, 0)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][0] > 0


@pytest.mark.parametrize("beyond", [math.nan, None], ids=["no number", "no loss"])
@pytest.mark.parametrize("reach", [0.02, 0.002])
def test_a_direction_that_the_loss_does_not_reach_is_shortened_also_where_the_gradients_took_its_place(
    reach: float, beyond: float | None
) -> None:
    """Beyond so much of w* there is none: the curvature of 9 within is found all the same."""

    class Well(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

    def loss(module: Any, batch: Any) -> Any:
        outside = bool(module.w.detach().norm() > reach)
        if outside and beyond is None:
            return None
        return 4.5 * module.w.square().sum() * (math.nan if outside else 1.0) + 0 * batch[0].mean()

    objective = Objective(Well(), loss)
    source = DatasetSource(TensorDataset(torch.ones(8, 1)), 8, seed=0)
    open_window(objective, source)
    with objective.active():
        steps = [
            first_step(objective, source.window(0), LocalPosterior(10.0, 1.0), seed=0, sparing=sparing)
            for sparing in (False, True)
        ]
    assert steps == pytest.approx([0.3 / 91.0] * 2, rel=1e-3)


def test_what_is_read_with_gradients_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:
        wants_gradients = True

        def __call__(self, weights: Tensor, grad: Tensor | None) -> Tensor:
            assert grad is not None and grad.shape == weights.shape
            return grad[:, :5].clone()

    told = []
    for chains in both("mlp", monkeypatch):
        chains.reader = Reader()
        told.append(chains.advance(8, 1e-3).read)
    assert told[0] is not None and told[1] is not None
    assert torch.equal(*told) and float(told[0].abs().max()) > 0  # type: ignore[arg-type]


def attacked(module: nn.Module, batch: Any, through_weights: bool) -> Tensor:
    """The loss at inputs that have been moved up its own slope, but where only its value is wanted. ``backward()``
    leaves gradients of the weights too."""
    x, y = batch
    if not torch.is_grad_enabled():
        return mean_squared(module, batch)
    z = x.clone().requires_grad_()
    loss = mean_squared(module, (z, y))
    if through_weights:
        loss.backward()
    slope = z.grad if through_weights else torch.autograd.grad(loss, z)[0]
    return mean_squared(module, (x + 0.3 * slope.sign(), y))  # type: ignore[union-attr]


def test_what_a_step_differentiates_by_itself_is_no_part_of_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing of it shows before."""
    monkeypatch.setattr(gradients, "IN_PARTS", 0)
    found = []
    for through_weights in (True, False):
        chains = make_chains(mlp(), regression(), partial(attacked, through_weights=through_weights), num_chains=2)
        assert chains._gradients.in_parts
        segment = chains.advance(NOISE_LAG + 4, 1e-3)
        with chains.line(0) as look:
            found.append((chains.weights, segment.noise_square, torch.tensor(look(0.5))))
    ours, expected = found
    assert torch.equal(ours[0], expected[0])
    assert float(ours[1].min()) > 0.01 and torch.equal(ours[1], expected[1])  # type: ignore[union-attr, arg-type]
    assert torch.equal(ours[2], expected[2])


def penalised(module: nn.Module, batch: Any) -> Tensor:
    loss = mean_squared(module, batch)
    (slope,) = torch.autograd.grad(loss, module[0].weight, create_graph=True)  # type: ignore[index]
    return loss + slope.square().sum()


def test_which_gradients_stay_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), regression()
    monkeypatch.setattr(gradients, "IN_PARTS", 66 * 4)  # of 66 weights

    def left(loss_fn: Any = mean_squared, **settings: Any) -> bool:
        return make_chains(module, data, loss_fn, **settings)._gradients.in_parts

    assert left() and left(sampler=LeimkuhlerMatthews())
    assert not left(sampler=RMSpropSGLD())  # learns its metric from all of them
    assert not left(sampler=KineticLangevin())  # looks at all of them at once
    assert not left(method="batched")
    assert not left(penalised)
    chains = make_chains(module, data, mean_squared)
    assert gradients.in_parts(SequentialEngine(chains.objective), chains.objective, SGLD())
    assert not gradients.in_parts(BorrowedEngine(chains.objective), chains.objective, SGLD())
    assert not gradients.in_parts(BatchedEngine(chains.objective, 2, "backward"), chains.objective, SGLD())
    monkeypatch.setattr(gradients, "IN_PARTS", 66 * 4 + 1)
    assert not left()
    monkeypatch.setattr(gradients, "IN_PARTS", 66 * 8)
    assert make_chains(module.double(), in_double(data), mean_squared)._gradients.in_parts
