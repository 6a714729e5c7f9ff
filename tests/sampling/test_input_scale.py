"""How large what goes into layers is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_slt.sampling.input_scale import LARGE_INPUT, LargeInput, largest_input
from lightning_slt.sampling.objective import Objective
from tests.sampling.helpers import gen


def output(module: nn.Module, batch: Any) -> Tensor:
    out = module(batch)
    out = out[0] if isinstance(module, nn.RNNBase) else out
    return (out.data if isinstance(out, PackedSequence) else out).square().mean()


def found(module: nn.Module, batch: Any, **settings: Any) -> LargeInput | None:
    objective = Objective(module, output, **settings)
    objective.adapt(batch)
    return largest_input(objective, batch)


def columns(*sizes: float) -> Tensor:
    """``[2, k]``: columns whose root mean square is known."""
    return torch.tensor([sizes, tuple(-size for size in sizes)])


def test_the_largest_feature_counts_and_not_their_mean() -> None:
    told = found(nn.Sequential(nn.Linear(3, 2)), columns(1.0, 40.0, 3.0))
    assert told is not None and told.layer == "0" and told.size == pytest.approx(40.0)


def test_the_largest_layer_is_named_also_a_hidden_one() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[100.0, 0.0], [0.0, 1.0]]))
    told = found(module, columns(1.0, 1.0))
    assert told is not None and told.layer == "1" and told.size == pytest.approx(100.0)


@pytest.mark.parametrize(("size", "is_large"), [(0.9 * LARGE_INPUT, False), (1.1 * LARGE_INPUT, True)])
def test_from_a_size_on(size: float, is_large: bool) -> None:
    assert (found(nn.Linear(2, 2), columns(1.0, size)) is not None) is is_large


def test_a_layer_under_a_parametrisation_counts_and_one_that_is_the_module_has_the_name_of_its_class() -> None:
    told = found(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), columns(1.0, 50.0))
    assert told is not None and told.size == pytest.approx(50.0)
    told = found(nn.Linear(2, 2), columns(1.0, 50.0))
    assert told is not None and told.layer == "Linear"


def test_of_a_convolution_it_is_a_channel() -> None:
    images = torch.ones(2, 3, 4, 4)
    images[:, 1] = 30.0
    told = found(nn.Sequential(nn.Conv2d(3, 2, 3)), images)
    assert told is not None and told.size == pytest.approx(30.0)


def test_of_sequences_of_many_lengths() -> None:
    packed = pack_sequence([torch.full((length, 2), 20.0) for length in (4, 2)])
    told = found(nn.GRU(2, 3), packed)
    assert told is not None and told.size == pytest.approx(20.0)


def test_what_is_standardised_inside_the_module_is_not_large() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    x = 500.0 * torch.randn(64, 2, generator=gen(0))
    module.train()
    for _ in range(100):
        module(x)
    assert found(module, x) is None


def test_layers_that_do_not_move_do_not_count() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    assert found(module, columns(1.0, 50.0), restrict="2.*") is None


def test_nothing_is_told_where_the_step_fails_and_no_hook_stays() -> None:
    objective = Objective(nn.Sequential(nn.Linear(2, 2)), output)
    objective.adapt(columns(1.0, 50.0))
    assert largest_input(objective, torch.ones(2, 5)) is None
    assert not any(layer._forward_pre_hooks for layer in objective.module.modules())


def test_inputs_that_are_not_finite_or_no_numbers_are_left_out() -> None:
    assert found(nn.Linear(2, 2), torch.tensor([[1.0, torch.inf], [1.0, 1.0]])) is None


def test_the_random_state_and_the_weights_stay() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    objective = Objective(module, lambda m, b: output(m, b + torch.rand(())))
    objective.adapt(columns(1.0, 50.0))
    before, weights = torch.get_rng_state(), [p.clone() for p in objective.parameters()]
    assert largest_input(objective, columns(1.0, 50.0)) is not None
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, objective.parameters(), strict=True))
