"""What trying a step shows: it is returned, and what was given is as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.shadow import shadow_copy
from lightning_slt.sampling.step_call import StepCall
from lightning_slt.sampling.steps import LossFn, NoLossError
from lightning_slt.sampling.structures import num_bytes
from lightning_slt.sampling.trials import Trials, ask_in_training, moved

BATCH = torch.ones(4, 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.spare = nn.Linear(2, 1, bias=False)
        self.average = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square()


def mean(module: nn.Module, batch: Tensor) -> Tensor:
    return module(batch).mean()


def trials_of(live: nn.Module, module: nn.Module | None = None, batch: Any = BATCH) -> Trials:
    module = shadow_copy(live) if module is None else module
    return Trials(module, {n: p for n, p in module.named_parameters() if p.requires_grad}, batch, live)


def test_buffers_and_frozen_weights_that_a_step_writes_to_are_found() -> None:
    def loss(module: Any, batch: Tensor) -> Tensor:
        module.calls += 1
        module.average.data.mul_(1.5)
        return mean(module, batch) * module.calls * module.average

    live = Net()
    module, call = shadow_copy(live), StepCall(loss)
    found = trials_of(live, module).find_written(call)
    assert found.written.names == ["average", "calls"] and not call.written
    assert float(module.calls) == 0.0 and float(module.average) == 1.0  # type: ignore[arg-type]
    assert len({float(found.loss(module, BATCH)) for _ in range(3)}) == 1


def test_a_batch_without_loss_is_told_and_another_error_left_to_the_next_call() -> None:
    def skips(module: nn.Module, batch: Tensor) -> Tensor:
        raise NoLossError("none")

    def fails(module: nn.Module, batch: Tensor) -> Tensor:
        raise ValueError("of the user's")

    with pytest.raises(NoLossError):
        trials_of(Net()).find_written(StepCall(skips))
    assert not trials_of(Net()).find_written(StepCall(fails)).written


@pytest.mark.parametrize(("reduce", "summed"), [(torch.sum, True), (torch.mean, False)])
def test_weights_that_the_loss_does_not_depend_on_and_a_sum_are_seen(
    reduce: Callable[..., Tensor], summed: bool
) -> None:
    watched = trials_of(Net()).watch(StepCall(lambda module, batch: reduce(module(batch))))
    assert watched.unreached == ("spare.weight",) and not watched.reads_live
    assert watched.ends_in_sum is summed


def test_a_loss_without_gradient_depends_on_none() -> None:
    watched = trials_of(Net()).watch(StepCall(lambda module, batch: module(batch).detach().mean()))
    assert watched.unreached == ("layer.weight", "layer.bias", "spare.weight")


def test_a_copy_that_reads_the_live_weights_is_seen() -> None:
    live = Net()
    assert trials_of(live).watch(StepCall(lambda module, batch: live(batch).mean())).reads_live


def test_attributes_that_a_step_changes_are_put_back_from_there_on() -> None:
    def loss(module: Any, batch: Tensor) -> Tensor:
        module.seen += 1
        return mean(module, batch) * module.seen

    live = Net()
    module, call = shadow_copy(live), StepCall(loss)
    found = trials_of(live, module).watch(call).call
    assert call.state is None and found.state is not None and found.state.names == ["seen"]
    assert len({float(found.loss(module, BATCH)) for _ in range(3)}) == 1


class Memory:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@pytest.mark.parametrize("keep", [lambda h: h, lambda h: (h, [2 * h]), Memory], ids=["tensor", "tuple", "object"])
def test_a_hidden_state_that_has_a_graph_is_put_back(keep: Callable[[Tensor], Any]) -> None:
    def loss(module: Any, batch: Tensor) -> Tensor:
        kept = module.seen
        before = kept.hidden if isinstance(kept, Memory) else kept[0] if isinstance(kept, tuple) else kept
        hidden = module(batch) + 0.5 * before.detach()
        module.seen = keep(hidden)
        return hidden.mean()

    live = Net()
    live.seen = keep(live(BATCH))
    module, call = shadow_copy(live), StepCall(loss)
    found = trials_of(live, module).watch(call).call
    assert found.state is not None and found.state.names == ["seen"]
    expected = 1.5 * float(mean(live, BATCH))
    assert [float(found.loss(module, BATCH)) for _ in range(3)] == pytest.approx([expected] * 3)


def counting(module: Any, batch: Tensor) -> Tensor:
    module.calls += 1
    return mean(module, batch) * module.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_counts_starts_where_the_module_came_with_it_however_often_it_is_tried(dtype: torch.dtype) -> None:
    """A second window tries again; so does a copy in float32."""
    live, batch = Net().to(dtype), BATCH.to(dtype)
    live.calls += 2
    objective = Objective(live, counting)
    for _ in range(3):
        objective.adapt(batch)
        found = [float(objective.loss(batch)) for _ in range(2)]
        assert found == pytest.approx([3 * float(mean(objective.module, batch.to(objective.dtype)))] * 2)
    assert float(live.calls) == 2.0


def test_a_copy_that_is_given_up_is_kept_by_nothing() -> None:
    def loss(module: Any, batch: Tensor) -> Tensor:
        module.seen += 1
        return mean(module, batch) * module.seen

    objective = Objective(Net(), loss)
    objective.adapt(BATCH)
    twins: list[weakref.ref[nn.Module]] = []

    def ask(twin: nn.Module) -> bool:
        twins.append(weakref.ref(twin))
        return float(objective.loss_of(twin, BATCH)) > 0

    assert objective.in_training(ask, False)
    gc.collect()
    assert twins[0]() is None


@pytest.mark.parametrize(("needed", "left"), [(True, 1), (False, 0)])
def test_hooks_are_taken_off_where_the_loss_is_the_same_without(needed: bool, left: int) -> None:
    live = Net()
    live.layer.register_forward_hook(lambda module, inputs, output: 2 * output if needed else None)
    module = shadow_copy(live)
    before = copy.deepcopy(module.state_dict())
    trials_of(live, module).take_off_idle(StepCall(mean))
    assert len(module.layer._forward_hooks) == left and len(live.layer._forward_hooks) == 1  # type: ignore[arg-type, union-attr]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_copy_in_half_precision_is_tried_in_float32() -> None:
    live = Net().bfloat16()
    call = StepCall(mean, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    wide = trials_of(live, batch=BATCH.bfloat16()).in_float32(call, None)
    assert wide is not None
    module, found = wide
    assert {p.dtype for p in module.parameters()} == {torch.float32} and found.upcast
    assert found.loss(module, BATCH.bfloat16()).dtype == torch.float32
    assert not call.upcast and call.autocasts(torch.device("cpu"))


def test_it_stays_in_half_precision_where_it_does_not_run_in_float32() -> None:
    def insists(module: Any, batch: Tensor) -> Tensor:
        assert module.layer.weight.dtype == torch.bfloat16
        return mean(module, batch)

    assert trials_of(Net().bfloat16(), batch=BATCH.bfloat16()).in_float32(StepCall(insists), None) is None
    assert trials_of(Net()).in_float32(StepCall(mean), None) is None


@pytest.mark.parametrize(
    ("loss", "mutates", "draws"),
    [
        (mean, False, False),
        (lambda module, batch: module(batch.mul_(2)).mean(), True, False),
        (lambda module, batch: mean(module, batch) * torch.rand(()), False, True),
    ],
    ids=["neither", "changes its batch", "draws"],
)
def test_what_a_step_does_with_its_batch_and_with_random_numbers_is_seen(
    loss: LossFn, mutates: bool, draws: bool
) -> None:
    batch, call = torch.ones(4, 2), StepCall(loss, mutates=not mutates)
    trials, state = trials_of(Net(), batch=batch), torch.get_rng_state()
    used = trials.find_use(call)
    assert (used.call.mutates, used.draws) == (mutates, draws) and call.mutates is not mutates
    assert torch.equal(batch, BATCH) and torch.equal(torch.get_rng_state(), state)


@dataclass(slots=True)
class Slotted:
    x: Any


@dataclass
class Outer:
    x: Any


@pytest.mark.parametrize(
    ("wrap", "read"),
    [
        (Slotted, lambda batch: batch.x),
        (lambda x: {"of": Slotted(x)}, lambda batch: batch["of"].x),
        (lambda x: Outer(Slotted(x)), lambda batch: batch.x.x),
        (lambda x: deque([x]), lambda batch: batch[0]),
        (lambda x: [x.numpy()], lambda batch: torch.from_numpy(batch[0])),
    ],
    ids=["slots", "slots in a dict", "slots in a dataclass", "deque", "array"],
)
def test_a_step_that_changes_its_batch_changes_a_copy_of_any_structure(
    wrap: Callable[[Tensor], Any], read: Callable[[Any], Tensor]
) -> None:
    batch = wrap(torch.ones(4, 2))
    changes = trials_of(Net(), batch=batch).find_use(StepCall(lambda m, b: mean(m, read(b).mul_(2)))).call
    assert changes.mutates
    changes.loss(Net(), batch)
    assert torch.equal(read(batch), BATCH)
    keeps = trials_of(Net(), batch=batch).find_use(StepCall(lambda m, b: mean(m, read(b) * 2))).call
    assert not keeps.mutates
    assert num_bytes(batch) == 32


def test_weights_are_moved_and_put_back_whatever_happens() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    seen: list[Tensor] = []

    def fails() -> None:
        seen.append(weight.detach().clone())
        raise KeyError

    with pytest.raises(KeyError), moved([weight]):
        fails()
    assert torch.allclose(seen[0], torch.tensor([1.051, -2.099]))
    assert weight.tolist() == [1.0, -2.0]


def test_a_copy_is_asked_in_training_mode_and_random_numbers_are_put_back() -> None:
    state = torch.get_rng_state()

    def ask(module: nn.Module) -> bool:
        torch.rand(1)
        return module.training and not torch.is_grad_enabled()

    assert ask_in_training(lambda: Net().eval(), ask, False)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_answer_is_the_other_one_where_it_cannot_be_asked() -> None:
    def ask(module: nn.Module) -> str:
        raise ValueError("not in training mode either")

    assert ask_in_training(Net, ask, "otherwise") == "otherwise"
