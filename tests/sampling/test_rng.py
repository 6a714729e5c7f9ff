"""Randomness that belongs to a chain; the caller's is put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from lightning_slt.sampling.rng import NOISE, derive_seed, generator, preserve_rng


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002 - the legacy global is meant


def after(seed: int, inside: Any) -> tuple[float, float, float]:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    inside()
    return draws()


@pytest.mark.parametrize("inner_seed", [None, 7])
def test_global_generators_are_put_back(inner_seed: int | None) -> None:
    def inside() -> None:
        with preserve_rng(inner_seed):
            draws()

    with preserve_rng():
        assert after(3, inside) == after(3, lambda: None)


def test_global_generators_are_put_back_after_an_exception() -> None:
    def fails() -> None:
        with preserve_rng(11):
            draws()
            raise ZeroDivisionError

    def inside() -> None:
        with pytest.raises(ZeroDivisionError):
            fails()

    with preserve_rng():
        assert after(3, inside) == after(3, lambda: None)


def test_a_seed_inside_makes_a_random_module_repeat_itself() -> None:
    seen = []
    for _ in range(2):
        with preserve_rng(5):
            seen.append(draws())
    with preserve_rng(6):
        other = draws()
    assert seen[0] == seen[1]
    assert all(a != b for a, b in zip(seen[0], other, strict=True))


def test_preserving_without_a_seed_does_not_reseed() -> None:
    with preserve_rng():
        expected = after(3, lambda: None)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(3)
        with preserve_rng():
            assert draws() == expected


def test_streams_are_independent_and_repeat() -> None:
    def sample(*key: int) -> torch.Tensor:
        return torch.randn(4000, generator=generator(*key))

    torch.testing.assert_close(sample(0, 3, NOISE), sample(0, 3, NOISE), rtol=0, atol=0)
    keys = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 10, 0), (2**40, 0, 0)]
    table = torch.corrcoef(torch.stack([sample(*key) for key in keys]))
    # an error of 1 / sqrt(4000) = 0.016 each: beyond 0.08 in 1 of 10^5 runs
    assert (table - torch.eye(len(keys))).abs().max() < 0.08


def test_derived_seeds_depend_on_every_part_of_the_key_and_take_any_integer() -> None:
    keys = [(s, k, j) for s in (0, 1, -1, 2**63) for k in range(5) for j in range(3)]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("seed", [2**64, 2**200 + 3, -(2**63) - 1, -(2**64)])
def test_a_seed_may_be_any_whole_number(seed: int) -> None:
    """As of a hash; torch alone takes 64 bits only."""
    with preserve_rng(seed):
        first = draws()
    with preserve_rng(seed):
        assert draws() == first
    with preserve_rng(seed + 1):
        assert draws() != first


def test_seeds_that_torch_takes_stay_what_they_were() -> None:
    for seed in (0, 7, -1, -(2**63), 2**64 - 1):
        with preserve_rng(seed):
            ours = torch.rand(3)
        torch.testing.assert_close(ours, torch.rand(3, generator=torch.Generator().manual_seed(seed)), rtol=0, atol=0)
