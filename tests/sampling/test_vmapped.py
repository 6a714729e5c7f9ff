"""Rows at once are what torch.vmap makes of them, and weights are in every place where a module has them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_slt.sampling import vmapped
from lightning_slt.sampling.vmapped import Slots, Vmapped
from tests.sampling.helpers import gen


def of_one(weights: Tensor, x: Tensor, shared: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that depend on the row, also by random numbers, and one that does not."""
    noise = torch.rand(3)
    return (weights @ x * noise).sum() ** power, torch.outer(x, shared), shared.sum()


def inputs() -> tuple[list[object], list[int | None]]:
    weights, x = torch.randn(5, 3, 4, generator=gen(0)), torch.randn(5, 4, generator=gen(1))
    return [weights, x, torch.arange(2.0), 2.0], [0, 0, None, None]


def test_later_calls_give_what_torch_vmap_gives() -> None:
    given, dims = inputs()
    rows = Vmapped(of_one)
    torch.manual_seed(0)
    rows(given, dims)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = torch.vmap(of_one, in_dims=tuple(dims), randomness="different")(*given)
        torch.manual_seed(seed)
        found = rows(given, dims)
        assert [f.shape for f in found] == [(5,), (5, 4, 2), (5,)]
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_the_user_is_not_asked_to_report_what_torch_cannot_batch() -> None:
    """Attention by the kernel of the CPU has no batching rule; a warning of the user's own is shown."""

    def attend(x: Tensor) -> tuple[Tensor]:
        warnings.warn("an old habit", stacklevel=1)
        return (nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),)

    rows, x = Vmapped(attend), torch.randn(3, 1, 2, 5, 4, generator=gen(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (first,), (second,) = rows([x], [0]), rows([x], [0])
    assert [str(warning.message) for warning in caught] == ["an old habit"] * 2
    assert torch.equal(first, second)
    with pytest.warns(UserWarning, match="performance drop"):  # others are told as before
        torch.vmap(attend)(x)


def test_later_calls_may_have_fewer_rows_and_are_differentiated() -> None:
    rows = Vmapped(lambda w, x: ((w * x).square().sum(),))
    x = torch.randn(5, 4, generator=gen(1))
    for count in (5, 3, 1):
        w = torch.randn(count, 4, generator=gen(count)).requires_grad_()
        (losses,) = rows([w, x[:count]], [0, 0])
        losses.backward(torch.ones_like(losses))
        torch.testing.assert_close(w.grad, 2 * w.detach() * x[:count] ** 2)


def test_gradients_under_it_are_those_of_each_row() -> None:
    def gradient(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        slope, value = torch.func.grad_and_value(lambda w, x: (w * x).square().sum())(w, x)
        return value, slope

    rows, w, x = Vmapped(gradient), torch.randn(4, 3, generator=gen(0)), torch.randn(3, generator=gen(1))
    for _ in range(2):
        values, slopes = rows([w, x], [0, None])
        torch.testing.assert_close(values, (w * x).square().sum(dim=1))
        torch.testing.assert_close(slopes, 2 * w * x**2)


def test_an_error_leaves_nothing_behind() -> None:
    """Of nesting: a call of torch.vmap after it would find one level too many."""
    fails = False

    def function(w: Tensor) -> tuple[Tensor]:
        if fails:
            raise ArithmeticError("of the step")
        return (w.sum(),)

    rows, w = Vmapped(function), torch.arange(6.0).view(2, 3)
    rows([w], [0])
    fails = True
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="of the step"):
            rows([w], [0])
    fails = False
    assert torch._C._functorch.maybe_current_level() is None
    assert rows([w], [0])[0].tolist() == [3.0, 12.0]


def test_a_torch_without_its_parts_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    given, dims = inputs()
    asked: list[int] = []
    whole = torch.vmap

    def counted(*args: object, **kwargs: object) -> object:
        asked.append(1)
        return whole(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "vmap", counted)
    rows = Vmapped(of_one)
    for _ in range(3):
        rows(given, dims)
    assert len(asked) == 1
    monkeypatch.setattr(vmapped, "_add_batch_dim", None)
    for _ in range(3):
        rows(given, dims)
    assert len(asked) == 4


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.again = self.second


def test_a_tied_weight_is_put_in_all_its_places_and_the_own_ones_come_back() -> None:
    module = Shared()
    own = dict(module.named_parameters())
    names = ["first.weight", "second.bias"]
    slots, values = Slots(module, names), [torch.full((3, 3), 7.0), torch.full((3,), 8.0)]
    slots.put(values)
    assert module.first.weight is module.second.weight is module.again.weight is values[0]
    assert module.second.bias is values[1] and module.first.bias is own["first.bias"]
    slots.empty()
    assert dict(module.named_parameters()).keys() == own.keys()
    assert all(p is own[name] for name, p in module.named_parameters())
    assert module.second.weight is own["first.weight"]
