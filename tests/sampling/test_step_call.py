"""How a step is called: with which batch, in which precision, with which gradients, at what it had before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_slt.sampling.step_call import LOOKS, StepCall
from lightning_slt.sampling.step_tensors import TensorLook


class Counting(nn.Module):
    """``w x``, times how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * self.w * x


def mean(module: nn.Module, batch: Tensor) -> Tensor:
    return module(batch).mean()


def doubling(module: nn.Module, batch: Tensor) -> Tensor:
    return batch.mul_(2).mean()


@pytest.mark.parametrize(("mutates", "left"), [(True, 1.0), (False, 2.0)])
def test_a_step_that_changes_its_batch_is_handed_a_copy(mutates: bool, left: float) -> None:
    batch = torch.ones(3)
    assert float(StepCall(doubling, mutates=mutates).loss(nn.Identity(), batch)) == 2.0
    assert batch.tolist() == 3 * [left]


def test_losses_of_samples_are_given_as_they_are_and_their_mean_on_demand() -> None:
    call = StepCall(lambda module, batch: batch)
    assert call.losses(nn.Identity(), torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert float(call.loss(nn.Identity(), torch.tensor([1.0, 2.0]))) == 1.5


def test_what_is_in_half_precision_in_a_batch_is_handed_over_in_float32() -> None:
    seen: list[list[torch.dtype]] = []

    def loss(module: nn.Module, batch: list[Tensor]) -> Tensor:
        seen.append([x.dtype for x in batch])
        return batch[0].mean()

    batch = [torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.long)]
    StepCall(loss, upcast=True).loss(nn.Identity(), batch)
    assert seen == [[torch.float32, torch.float64, torch.int64]]


def test_what_a_step_writes_to_is_put_back_before_each_call_of_that_module_alone() -> None:
    module = Counting()
    before = TensorLook(module, [module.w])
    mean(module, torch.ones(1))
    written = before.written(lambda name: pytest.fail(f"{name} is no frozen weight"))
    call, twin = StepCall(mean, written=written), copy.deepcopy(module)
    assert written.names == ["calls"]
    assert [call.loss(module, torch.ones(1)).item() for _ in range(3)] == [2.0, 2.0, 2.0]
    assert [call.loss(twin, torch.ones(1)).item() for _ in range(2)] == [4.0, 6.0]


def test_that_a_step_asks_for_derivatives_is_found_once() -> None:
    calls: list[bool] = []

    def penalty(module: nn.Module, batch: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        (slope,) = torch.autograd.grad(module(batch).sum(), module.parameters(), create_graph=True)
        return slope.square()

    call, module = StepCall(penalty), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        losses = [call.loss(module, torch.full((1, 1), 3.0)) for _ in range(2)]
    assert calls == [False, True, True] and call.differentiates
    assert [float(loss) for loss in losses] == [9.0, 9.0] and not any(loss.requires_grad for loss in losses)


def test_that_a_step_calls_backward_under_gradients_of_its_own_is_found_by_what_it_leaves() -> None:
    def step(module: nn.Module, batch: Tensor) -> Tensor:
        with torch.enable_grad():
            module(batch).sum().backward()
        return module(batch).sum()

    call, module = StepCall(step), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        loss = call.loss(module, torch.full((1, 1), 3.0))
    assert call.differentiates and float(loss) == pytest.approx(3.0 * module.weight.item())
    assert module.weight.grad is None
    module.weight.grad = torch.ones(1, 1)
    kept, call = module.weight.grad, StepCall(lambda module, batch: module(batch).sum())
    with torch.no_grad():
        call.loss(module, torch.full((1, 1), 3.0))
    assert not call.differentiates and module.weight.grad is kept


@pytest.mark.parametrize(("call_number", "found"), [(LOOKS, True), (LOOKS + 1, False)])
def test_what_a_step_leaves_is_looked_for_at_the_first_calls(call_number: int, found: bool) -> None:
    """A walk through all parameters at every loss would show in its time."""
    calls: list[None] = []

    def step(module: nn.Module, batch: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == call_number:
            with torch.enable_grad():
                module(batch).sum().backward()
        return module(batch).sum()

    call, module = StepCall(step), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        for _ in range(call_number):
            call.loss(module, torch.ones(1, 1))
    assert call.differentiates is found and (module.weight.grad is None) is found


def test_an_error_of_the_step_is_its_own() -> None:
    def fails(module: nn.Module, batch: Tensor) -> Tensor:
        raise RuntimeError("of the user's")

    call = StepCall(fails)
    with torch.no_grad(), pytest.raises(RuntimeError, match="of the user's"):
        call.loss(nn.Identity(), torch.ones(1))
    assert not call.differentiates


def test_whether_it_is_called_under_autocast_is_known() -> None:
    cpu = torch.device("cpu")
    assert StepCall(mean, lambda: torch.autocast("cpu", dtype=torch.bfloat16)).autocasts(cpu)
    assert not StepCall(mean).autocasts(cpu)
