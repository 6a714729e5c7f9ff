"""The closed forms against each other, against published values and against direct integration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.cases.problems import quadrature_llc
from tests.cases.theory import deep_linear_llc, normal_crossing_llc, reduced_rank_llc, regular_llc


def test_regular_values() -> None:
    assert regular_llc([1.0] * 20, 1000 / math.log(1000), 1.0) == pytest.approx(9.931, abs=1e-3)
    assert regular_llc([1.0, 2.0, 0.5], 100.0, 0.0) == 1.5
    assert regular_llc([0.0, 4.0], 10.0, 40.0) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("powers", "value", "multiplicity"),
    [((1, 1), 0.5, 2), ((1, 2), 0.25, 1), ((1, 1, 1), 0.5, 3), ((3, 0, 3), 1 / 6, 2)],
)
def test_normal_crossing_values(powers: tuple[int, ...], value: float, multiplicity: int) -> None:
    assert normal_crossing_llc(powers) == (pytest.approx(value), multiplicity)


@pytest.mark.parametrize(
    ("sizes", "rank", "value", "multiplicity"),
    [
        ((8, 4, 8), 2, 19.5, 1),
        ((5, 3, 5), 1, 8.0, 1),
        ((6, 6, 6), 2, 16.0, 1),
        ((5, 2, 5), 2, 8.0, 1),  # hidden width = rank: regular, (rank (M + N) - rank^2) / 2
        ((2, 2, 9), 1, 5.5, 1),  # case 2
        ((9, 2, 2), 1, 5.5, 1),  # case 3
        ((3, 9, 4), 1, 6.0, 1),  # case 4: a full linear regression, 3 * 4 / 2
    ],
)
def test_reduced_rank_values(sizes: tuple[int, int, int], rank: int, value: float, multiplicity: int) -> None:
    assert reduced_rank_llc(*sizes, rank) == (value, multiplicity)


def test_deep_linear_value_of_the_brief() -> None:
    assert deep_linear_llc([6, 6, 6, 6], 2) == (15.5, 3)


def test_one_layer_is_a_regular_model() -> None:
    for p, q in itertools.product(range(1, 8), repeat=2):
        for rank in range(min(p, q) + 1):
            assert deep_linear_llc([p, q], rank) == (p * q / 2, 1)


def test_two_layers_agree_with_reduced_rank_regression() -> None:
    compared = 0
    for sizes in itertools.product(range(1, 13), repeat=3):
        for rank in range(min(sizes) + 1):
            assert deep_linear_llc(sizes, rank) == reduced_rank_llc(*sizes, rank), (sizes, rank)
            compared += 1
    assert compared > 7000


def test_deep_linear_bounds_and_symmetry() -> None:
    """lambda is at least the regular rank part, at most half the parameters or map entries, and symmetric."""
    for widths in itertools.product((1, 2, 4, 7), repeat=4):
        for rank in range(min(widths) + 1):
            value, multiplicity = deep_linear_llc(widths, rank)
            regular = (rank * (widths[0] + widths[-1]) - rank**2) / 2
            parameters = sum(a * b for a, b in itertools.pairwise(widths))
            assert regular <= value <= min(parameters, widths[0] * widths[-1]) / 2
            assert multiplicity >= 1
            assert deep_linear_llc(widths[::-1], rank) == (value, multiplicity)
            if rank == 0:  # only then do all layers play the same part
                assert deep_linear_llc(sorted(widths), 0) == (value, multiplicity)


def test_width_one_chain_is_a_normal_crossing() -> None:
    """w_1 w_2 ... w_L with true value 0 is the normal crossing of L simple factors."""
    for layers in range(1, 7):
        assert deep_linear_llc([1] * (layers + 1), 0) == normal_crossing_llc([1] * layers)


def test_quadrature_reproduces_the_regular_form() -> None:
    hessian = (3.0, 0.01)
    value = quadrature_llc(lambda w: 0.5 * (hessian[0] * w[0] ** 2 + hessian[1] * w[1] ** 2), 145.0, 1.0, dim=2)
    assert value == pytest.approx(regular_llc(hessian, 145.0, 1.0), rel=1e-8)


@pytest.mark.parametrize(("powers", "points"), [((1, 1), (801, 1201)), ((1, 2), (801, 1201)), ((1, 1, 1), (121, 161))])
def test_quadrature_is_converged_in_its_grid(powers: tuple[int, ...], points: tuple[int, int]) -> None:
    def loss(w: list[torch.Tensor]) -> torch.Tensor:
        return 0.5 * math.prod(c ** (2 * k) for c, k in zip(w, powers, strict=True))

    coarse, fine = (quadrature_llc(loss, 145.0, 1.0, len(powers), points=size) for size in points)
    assert coarse == pytest.approx(fine, rel=1e-6)


def test_quadrature_approaches_the_asymptotic_normal_crossing() -> None:
    """w1 w2^2 has multiplicity 1: the finite-n value climbs to 1/4; w1 w2 (m = 2) stays below 1/2 by about 1 / log."""

    def simple(w: list[torch.Tensor]) -> torch.Tensor:
        return 0.5 * (w[0] * w[1] ** 2) ** 2

    def double(w: list[torch.Tensor]) -> torch.Tensor:
        return 0.5 * (w[0] * w[1]) ** 2

    climb = [quadrature_llc(simple, nbeta, 1.0, dim=2) for nbeta in (1e2, 1e3, 1e4)]
    assert climb == sorted(climb) and 0.20 < climb[-1] < 0.25
    values = [quadrature_llc(double, nbeta, 1.0, dim=2) for nbeta in (1e2, 1e3, 1e4)]
    assert values == sorted(values) and 0.40 < values[-1] < 0.47
