"""A live module that chains move in place: what it is given back, and what ranks compare; one rank with all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_slt.sampling.collective import Alone, Together
from lightning_slt.sampling.layout import Layout
from lightning_slt.sampling.noise import TableNormal
from lightning_slt.sampling.sharded import ShardedObjective, fully_sharded, whole_weights
from lightning_slt.sampling.steps import NoLossError
from tests.sampling.helpers import gen, mean_squared, seeded


class State:
    _is_root = True


class Wrapped(nn.Sequential):
    """Counts what ``fully_shard`` would be asked for."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.asked: list[str] = []
        self.state = State()

    def reshard(self) -> None:
        self.asked.append("reshard")

    def unshard(self) -> None: ...

    def reset_iter_state(self) -> None:
        self.asked.append("reset")

    def _get_fsdp_state(self) -> State:
        return self.state


class Ranks(Alone):
    """The second rank of two, of which the first one says something else."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self._change = change
        self._told = 0

    def exchange(self, work: Callable[[], Any]) -> list[Any]:
        own = work()
        self._told += 1
        return [self._change(own) if self._told == 1 else own, own]


def objective_of(net: nn.Module, ranks: Any = None, loss_fn: Any = mean_squared, **more: Any) -> ShardedObjective:
    return ShardedObjective(net, ranks or Alone(), 1, loss_fn, **more)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3, generator=gen(1)), torch.randn(5, 2, generator=gen(2))


def kept_of(net: nn.Module) -> dict[str, Any]:
    """Everything that training has, by name."""
    named = dict(net.named_parameters())
    return {
        **{f"{n}.data": p.detach().clone() for n, p in named.items()},
        **{f"{n}.grad": None if p.grad is None else p.grad.clone() for n, p in named.items()},
        **{f"{n}.flag": p.requires_grad for n, p in named.items()},
        **{n: b.clone() for n, b in net.named_buffers()},
        "training": [m.training for m in net.modules()],
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name], name


@pytest.mark.parametrize("breaks", [False, True])
def test_training_has_back_what_it_had_whatever_came_in_between(breaks: bool) -> None:
    net = seeded(Wrapped)
    mean_squared(net, batch()).backward()
    net[2].bias.requires_grad_(False)
    net[2].bias.grad = torch.full((2,), 7.0)
    net[0].bias.grad = None
    objective = objective_of(net, restrict=["0.*", "2.weight"])
    before, grads = kept_of(net), [p.grad for p in net.parameters()]
    net.asked.clear()
    try:
        with objective.active():
            assert net.asked[-1] == "reshard"  # a pass of training has left gathered weights
            assert all(p.grad is None for p in net.parameters()) and not net[1].training
            moving = {n for n, p in net.named_parameters() if p.requires_grad}
            assert moving == {"0.weight", "0.bias", "2.weight"}
            objective.load(objective.pieces(torch.zeros_like(objective.anchor)))
            assert not net[0].weight.detach().any()
            objective.loss(batch()).backward()
            net.asked.clear()
            if breaks:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert breaks
    assert_same(kept_of(net), before)
    assert [p.grad for p in net.parameters()] == grads  # themselves, not copies
    assert "reset" in net.asked and "reshard" in net.asked


def test_only_the_root_is_told_that_a_pass_was_broken_off() -> None:
    net = seeded(Wrapped)
    objective = objective_of(net)
    for root in (True, False):
        net.state._is_root = root  # type: ignore[misc]
        net.asked.clear()
        objective.break_off()
        assert net.asked == ["reset"] * root + ["reshard"]
    assert fully_sharded(nn.Sequential(net, nn.Linear(2, 1))) == [net]


def test_gradients_are_moved_or_added_and_leave_the_module() -> None:
    net = seeded(Wrapped)
    objective = objective_of(net)
    pieces = [torch.full_like(p, 5.0) for p in net.parameters()]
    for factor, keep, expected in ((2.0, False, 2.0), (3.0, True, 5.0)):
        for p in list(net.parameters())[1:]:
            p.grad = torch.full_like(p, factor)
        objective.take_gradients(pieces, keep)
        assert all(p.grad is None for p in net.parameters())
        assert not pieces[0].any()  # which had no gradient, either time
        assert all(torch.equal(piece, torch.full_like(piece, expected)) for piece in pieces[1:])
    pieces[0].fill_(1.0)
    objective.take_gradients(pieces, True)
    assert all(torch.equal(piece, torch.full_like(piece, 5.0 if k else 1.0)) for k, piece in enumerate(pieces))


def test_a_pass_leaves_the_shards_where_no_backward_pass_will_and_is_undone_where_it_fails() -> None:
    net = seeded(Wrapped)
    fails: list[Any] = []

    def loss(module: nn.Module, given: Any) -> Any:
        if fails:
            raise fails[0]
        return mean_squared(module, given)

    objective = objective_of(net, loss_fn=loss)
    with objective.active():
        for grad, asked in ((True, []), (False, ["reshard"])):
            net.asked.clear()
            with torch.set_grad_enabled(grad):
                objective._call.losses(net, batch())
            assert net.asked == asked
        net.asked.clear()
        fails.append(NoLossError("none"))
        with pytest.raises(NoLossError):
            objective._call.losses(net, batch())
        assert net.asked == ["reset", "reshard"]


def test_ranks_that_run_a_chain_together_are_told_of_its_passes() -> None:
    told: list[str] = []

    class Told(Together):
        def begin_pass(self) -> None:
            told.append("begins")

        def break_off(self) -> None:
            told.append("broken off")

    net = seeded(Wrapped)
    objective = objective_of(net, Told(Alone()))  # type: ignore[arg-type]
    with objective.active():
        objective._call.losses(net, batch())
        assert told == ["begins"]
        with pytest.raises(RuntimeError):
            objective._call.losses(net, (torch.zeros(2, 9), torch.zeros(2, 2)))
    assert told == ["begins", "begins", "broken off"]


def test_weights_are_read_and_written_where_they_are_shards() -> None:
    net = seeded(Wrapped)
    objective = objective_of(net)
    assert net.asked[0] == "reshard"
    for pieces in (objective.pieces(objective.anchor), None):
        net.asked.clear()
        objective.load(pieces)
        assert net.asked == ["reshard"]


def test_the_pieces_lie_one_after_another() -> None:
    """So that their noise is that of the whole."""
    objective = objective_of(seeded(Wrapped))
    d = sum(p.numel() for p in seeded(Wrapped).parameters())
    assert objective.layout.num_weights == d == len(objective.anchor)
    drawn = [torch.empty(d), torch.empty(d)]
    for layout, out in zip((objective.layout, Layout(d)), drawn, strict=True):
        layout.normal_(out, TableNormal(0))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_of_any_precision_come_back_to_the_last_bit(dtype: torch.dtype) -> None:
    net = seeded(Wrapped).to(dtype)
    before = kept_of(net)
    objective = objective_of(net)
    with objective.active():
        objective.load([torch.zeros_like(p) for p in objective.pieces(objective.anchor)])
    assert_same(kept_of(net), before)


def test_chains_have_the_buffers_of_the_first_rank_and_training_its_own() -> None:
    net = seeded(Wrapped)

    def other(told: Any) -> Any:
        return told[0], told[1], {name: buffer + 1 for name, buffer in told[2].items()}

    objective = objective_of(net, Ranks(other))
    before = kept_of(net)
    objective.settle()
    with objective.active():
        assert torch.equal(net[1].running_mean, before["1.running_mean"] + 1)
        assert torch.equal(net[1].running_var, before["1.running_var"] + 1)
    assert_same(kept_of(net), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: ([*told[0][:-1], ("2.bias", (3,))], *told[1:]), "the ranks hold different parameters"),
        (lambda told: (told[0], {**told[1], "2.bias": 1e-9 + told[1]["2.bias"]}, told[2]), "the weight 2.bias is not"),
        (lambda told: (told[0], {}, told[2]), "the weight 0.weight is not sharded, and is another one on each rank"),
    ],
    ids=["shapes", "one weight", "sharded there"],
)
def test_ranks_that_train_several_models_are_refused(change: Any, said: str) -> None:
    objective = objective_of(seeded(Wrapped), Ranks(change))
    with pytest.raises(ValueError, match=said):
        objective.settle()
    objective_of(seeded(Wrapped), Ranks(lambda told: told)).settle()


def test_complex_weights_are_refused_where_they_move() -> None:
    net = seeded(Wrapped)
    net.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"complex, which chains do not know: use restrict="):
        objective_of(net)
    assert len(objective_of(net, restrict=["0.*"]).anchor) == 16


def test_whole_weights_are_copies_of_no_shard_and_wanted_on_one_rank() -> None:
    net = seeded(Wrapped)
    kept = whole_weights(net)
    assert kept.keys() == net.state_dict().keys() and net.asked == ["reshard"]
    assert all(
        torch.equal(kept[name], value) and not kept[name].requires_grad for name, value in net.state_dict().items()
    )
    assert whole_weights(net, keep=False) == {}
