"""Which weights move, and that only those do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.restriction import select_parameters
from tests.sampling.helpers import Tied, make_chains, mean_squared, mlp, next_token, regression, tokens


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
        self.encoder2 = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)


ALL = [f"{name}.{kind}" for name in ("encoder.0", "encoder.1", "encoder2", "head") for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    ("restrict", "expected"),
    [
        (None, ALL),
        ("head", ["head.weight", "head.bias"]),
        ("encoder", ALL[:4]),  # and not encoder2
        ("*.weight", [n for n in ALL if n.endswith("weight")]),
        ("encoder.?.bias", ["encoder.0.bias", "encoder.1.bias"]),
        (["head.bias", "encoder.0"], ["encoder.0.weight", "encoder.0.bias", "head.bias"]),
        (("head.bias", "head"), ["head.weight", "head.bias"]),
    ],
)
def test_patterns(restrict: Any, expected: list[str]) -> None:
    assert select_parameters(Net(), restrict) == expected


def test_submodules_alone_and_beside_patterns() -> None:
    net = Net()
    assert select_parameters(net, net.head) == ["head.weight", "head.bias"]
    assert select_parameters(net, [net.encoder[1], "head.bias"]) == ["encoder.1.weight", "encoder.1.bias", "head.bias"]
    assert select_parameters(net, net) == ALL


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight", "head", "embedding"])
def test_a_tied_weight_is_found_by_either_name_and_counted_once(name: str) -> None:
    assert select_parameters(Tied(), name) == ["embedding.weight"]


def test_frozen_parameters_never_move() -> None:
    net = Net()
    net.encoder.requires_grad_(False)
    assert select_parameters(net) == ALL[4:]
    assert select_parameters(net, "*.bias") == ["encoder2.bias", "head.bias"]


@pytest.mark.parametrize(
    ("restrict", "message"),
    [
        ([], r"restrict is empty: leave it None"),
        ("hed", r"'hed' matches no parameter.*encoder\.0\.weight.*head\.bias"),
        (["head", "nothing.*"], r"'nothing\.\*' matches no parameter"),
        (nn.Linear(2, 2), r"submodule Linear matches no parameter"),
    ],
)
def test_restrictions_that_name_nothing(restrict: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_parameters(Net(), restrict)


def test_restriction_to_frozen_parameters_says_that_they_are_frozen() -> None:
    net = Net()
    net.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'head'.* is frozen \(requires_grad=False\).*thaw them"):
        select_parameters(net, "head")


def test_a_module_without_trainable_parameters() -> None:
    with pytest.raises(ValueError, match=r"Linear has no parameter with requires_grad=True"):
        select_parameters(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("method", ["sequential", "batched"])
def test_only_the_restricted_weights_move(method: str) -> None:
    net = mlp()
    chains = make_chains(net, regression(), mean_squared, restrict="2", method=method)
    assert chains.weights.shape == (4, 7 * 3 + 3)
    seen: list[dict[str, torch.Tensor]] = []
    handle = chains.objective.module.register_forward_hook(
        lambda m, *_: seen.append({n: p.detach().clone() for n, p in m.named_parameters()})
    )
    chains.advance(10, 1e-3)
    handle.remove()
    assert (chains.weights - chains.objective.anchor).abs().min(dim=0).values.max() > 0
    for parameters in seen:
        torch.testing.assert_close(parameters["0.weight"], net[0].weight, rtol=0, atol=0)  # type: ignore[index]
    if method == "sequential":
        assert any((p["2.weight"] != net[2].weight).any() for p in seen)  # type: ignore[index]


def test_frozen_and_left_out_weights_take_no_gradient() -> None:
    net = mlp()
    net[0].bias.requires_grad_(False)  # type: ignore[index]
    objective = Objective(net, mean_squared, "2.weight")
    assert {n for n, p in objective.module.named_parameters() if p.requires_grad} == {"2.weight"}
    assert len(objective.anchor) == 21


def test_tied_weights_move_together() -> None:
    chains = make_chains(Tied(), tokens(), next_token)
    assert len(chains.objective.anchor) == 11 * 8 + 8 * 8 + 8
    shared: list[bool] = []
    chains.objective.module.register_forward_hook(
        lambda m, *_: shared.append(bool((m.head.weight == m.embedding.weight).all()))
    )
    chains.advance(5, 1e-3)
    assert len(shared) >= 20 and all(shared)


def test_a_pruned_weight_keeps_its_name() -> None:
    net = mlp()
    prune.l1_unstructured(net[0], "weight", 0.5)  # type: ignore[index]
    assert select_parameters(net, "0.weight") == select_parameters(net, "0.weight_orig") == ["0.weight_orig"]
    assert select_parameters(net, "*.weight") == ["0.weight_orig", "2.weight"]


def test_a_weight_of_such_a_name_without_a_mask_has_no_other() -> None:
    net = nn.Module()
    net.register_parameter("scale_orig", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="'scale' matches no parameter"):
        select_parameters(net, "scale")


def test_weights_without_a_shape_are_named() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(1))
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet: a lazy module .* first training step"):
        Objective(net, mean_squared)


def test_weights_without_an_element_are_refused_alone_and_let_be_beside_others() -> None:
    """``nn.Linear(4, 0)`` after pruning or with a size from a configuration."""
    net = nn.Sequential(nn.Linear(4, 3))
    net.register_parameter("none", nn.Parameter(torch.zeros(0)))
    with pytest.raises(ValueError, match=r"the moving weights \['none'\] have no elements.*sizes of the layers"):
        Objective(net, mean_squared, restrict="none")
    assert len(Objective(net, mean_squared).anchor) == 15
