"""What is held of the gradients of a minibatch: the noise of two, the slope along a direction, and what has none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_slt.sampling import gradients
from lightning_slt.sampling.engines import SequentialEngine
from lightning_slt.sampling.gradients import GradientsInParts
from lightning_slt.sampling.layout import Layout
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.samplers import SGLD
from lightning_slt.sampling.window import Window
from tests.sampling.helpers import mean_squared, mlp, next_token, regression, tokens


def test_the_noise_of_two_minibatches_is_that_of_all_parameters() -> None:
    """Of which one is reached by the first batch only, one by the second only, and one by neither."""
    sizes = torch.tensor([1.0, 0.0])

    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ways = nn.ParameterList([nn.Parameter(torch.zeros(k + 2)) for k in range(4)])

    def loss(module: Any, batch: Any) -> Tensor:
        a, b, both, _ = module.ways
        first = bool(batch[0] > 0)
        return (3 * a.sum() if first else -5 * b.sum()) + (1.0 if first else 2.0) * both.sum()

    objective = Objective(Ways(), loss)
    engine, window = SequentialEngine(objective), Window([(sizes[0],), (sizes[1],)])
    held = GradientsInParts(engine, objective, [slice(0, 6), slice(6, 14)], SGLD())
    held.bind(objective.anchor[None].clone())
    engine.step(window[0])
    square = held.apart(lambda: engine.step(window[0]), lambda keep: engine.step(window[1], keep), _unasked)
    assert square.tolist() == [2 * 3.0**2 + 3 * 5.0**2 + 4 * 1.0**2]
    held.put_back(lambda: engine.step(window[0]))
    blocks = [held.block(k).flatten().tolist() for k in range(2)]
    assert blocks == [[3.0, 3.0, 0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    loss_seen, slope = held.derivative(torch.arange(14.0), lambda: engine.step(window[1]))
    assert (float(loss_seen), slope) == (0.0, -5 * (2 + 3 + 4) + 2 * (5 + 6 + 7 + 8))
    assert all(g is None for g in engine.gradients())


def _unasked() -> Tensor:
    raise AssertionError("the blocks hold no difference")


class Freezing(nn.Module):
    """Its first weight has a gradient of every batch but those below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))


def test_a_weight_that_the_step_freezes_for_a_batch_has_no_gradient_of_it() -> None:
    def loss(module: Any, batch: Any) -> Tensor:
        module.a.requires_grad_(bool(batch[0] > 0))
        return batch[0] * (2 * module.a.sum() + module.b.sum())  # type: ignore[no-any-return]

    objective = Objective(Freezing(), loss)
    engine, window = SequentialEngine(objective), Window([(torch.tensor(-1.0),), (torch.tensor(1.0),)])
    held = GradientsInParts(engine, objective, [slice(0, 5)], SGLD())
    held.bind(objective.anchor[None].clone())
    for number, expected in ((0, [0.0, 0.0, -1.0, -1.0, -1.0]), (1, [2.0, 2.0, 1.0, 1.0, 1.0])):
        engine.step(window[number])
        assert held.block(0).flatten().tolist() == expected
    for first in (0, 1):
        engine.step(window[first])
        square = held.apart(
            lambda k=first: engine.step(window[k]),  # type: ignore[misc]
            lambda keep, k=1 - first: engine.step(window[k], keep),  # type: ignore[misc]
            _unasked,
        )
        assert square.tolist() == [2 * 2.0**2 + 3 * 2.0**2]
    _, slope = held.derivative(torch.arange(5.0), lambda: engine.step(window[0]))
    assert slope == -(2 + 3 + 4)


def test_a_gradient_that_a_hook_of_the_steps_has_taken_is_none() -> None:
    def loss(module: Any, batch: Any) -> Tensor:
        if not module.a._post_accumulate_grad_hooks:
            module.a.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        return module.a.sum() + batch[0] * module.b.sum()  # type: ignore[no-any-return]

    objective = Objective(Freezing(), loss)
    engine, window = SequentialEngine(objective), Window([(torch.tensor(2.0),)])
    held = GradientsInParts(engine, objective, [slice(0, 5)], SGLD())
    held.bind(objective.anchor[None].clone())
    _, slope = held.derivative(torch.arange(5.0), lambda: engine.step(window[0]))
    assert slope == 2 * (2 + 3 + 4)


def test_nothing_is_asked_of_the_weights_after_a_step_that_failed() -> None:
    def loss(module: Any, batch: Any) -> Tensor:
        total = module.a.sum() + module.b.square().sum()
        if batch[0] < 0:
            module.b.register_hook(_fail)
        return total  # type: ignore[no-any-return]

    objective = Objective(Freezing(), loss)
    engine, window = SequentialEngine(objective), Window([(torch.tensor(-1.0),), (torch.tensor(1.0),)])
    held = GradientsInParts(engine, objective, [slice(0, 5)], SGLD())
    held.bind(objective.anchor[None].clone())
    with pytest.raises(RuntimeError, match="of the user's"):
        held.derivative(torch.ones(5), lambda: engine.step(window[0]))
    assert not any(p._post_accumulate_grad_hooks for p in objective.parameters())  # type: ignore[attr-defined]
    objective.module.b._backward_hooks.clear()  # type: ignore[union-attr, operator]
    engine.step(window[1])
    assert held.block(0).flatten().tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]


def _fail(grad: Tensor) -> Tensor:
    raise RuntimeError("of the user's")


def test_a_gradient_in_a_sparse_and_a_dense_portion_is_their_sum() -> None:
    """The sparse one first, of an embedding within a checkpointed block; its weight is used outside as well."""

    class Portions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8, sparse=True)
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 11)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(nn.functional.one_hot(x, 11).float() @ self.embedding.weight)
            return self.head(checkpoint(lambda h: self.embedding(x) * h, h, use_reentrant=True))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    objective = Objective(Portions(), next_token)
    x, y = tokens().tensors
    window, d = Window([(x[:16], y[:16]), (x[16:32], y[16:32])]), len(objective.anchor)
    engine, weights, whole = SequentialEngine(objective), objective.anchor[None].clone(), torch.zeros(2, d)
    for row, batch in zip(whole, window.batches, strict=True):
        engine.bind(weights, row[None])
        engine.step(batch)
    held = GradientsInParts(engine, objective, [slice(0, d)], SGLD())
    held.bind(weights)
    square = held.apart(lambda: engine.step(window[0]), lambda keep: engine.step(window[1], keep), _unasked)
    assert float(square) == pytest.approx(float((whole[0] - whole[1]).square().sum()), rel=2e-3)
    held.put_back(lambda: engine.step(window[0]))
    assert torch.allclose(held.block(0)[0], whole[0], atol=1e-7)


def test_a_model_in_half_precision_keeps_its_gradients_in_it() -> None:
    """Chains have float32 weights; what the module computes in bfloat16 is widened block by block."""
    objective = Objective(mlp().bfloat16(), lambda m, b: mean_squared(m, tuple(t.bfloat16() for t in b)))
    assert objective.rounds
    x, y = regression().tensors
    window, weights = Window([(x[:16], y[:16]), (x[16:32], y[16:32])]), objective.anchor[None] + 0.05
    engine, whole = SequentialEngine(objective), torch.zeros(2, 66)
    for row, batch in zip(whole, window.batches, strict=True):
        engine.bind(weights, row[None])
        engine.step(batch)
    held = GradientsInParts(engine, objective, [slice(0, 30), slice(30, 66)], SGLD())
    held.bind(weights)
    engine.step(window[0])
    assert {g.dtype for g in engine.gradients() if g is not None} == {torch.bfloat16}
    blocks = [held.block(k).clone() for k in range(2)]  # one of a single weight, one of several
    assert {b.dtype for b in blocks} == {torch.float32} and torch.equal(torch.cat(blocks, dim=1)[0], whole[0])
    square = held.apart(lambda: engine.step(window[0]), lambda keep: engine.step(window[1], keep), _unasked)
    assert float(square) == pytest.approx(float((whole[0] - whole[1]).square().sum()), rel=1e-5)
    direction = torch.arange(66.0)
    _, slope = held.derivative(direction, lambda: engine.step(window[1]))
    assert slope == pytest.approx(float(torch.dot(whole[1], direction)), rel=1e-5)


@pytest.mark.parametrize("kept", [True, False])
def test_gradients_are_kept_beside_those_of_another_minibatch_where_they_are_few_bytes(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all the chains that move together; larger ones are computed once more."""
    monkeypatch.setattr(gradients, "KEPT_GRADIENT", 2 * 3 * 4 - (not kept))
    memory = torch.arange(6.0).reshape(2, 3)
    engine: Any = None
    held, asked = gradients.WholeGradients(engine, memory, [], Layout(3)), list[str]()
    held.apart(_unasked, lambda keep: memory.add_(10.0 if keep else math.nan), lambda: memory.square().sum(dim=1))
    assert memory.flatten().tolist() == [10.0, 9.0, 8.0, 7.0, 6.0, 5.0]
    held.put_back(lambda: asked.append("again"))
    assert asked == ([] if kept else ["again"]) and held._kept is None
    assert (memory.flatten().tolist() == list(range(6))) is kept
