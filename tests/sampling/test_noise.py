"""The noise of the chains: normal as far as a Langevin step can tell, and the same for the same key."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_slt.sampling.noise import (
    INTERVALS,
    TOGETHER,
    NormalStream,
    TableNormal,
    normal_rows,
    normal_stream,
    normal_table,
)

CPU = torch.device("cpu")


def test_the_moments_of_the_table_are_the_normal_ones() -> None:
    table = normal_table()
    assert len(table) == INTERVALS
    assert np.array_equal(table, -table[::-1]), "every odd moment is zero"
    assert np.mean(table**2) == pytest.approx(1.0, abs=1e-7)
    assert np.mean(table**4) == pytest.approx(3.0, abs=3e-4)
    assert np.mean(table**6) == pytest.approx(15.0, abs=0.02)


def test_the_table_follows_the_normal_distribution_function() -> None:
    table = normal_table()
    middle = (np.arange(INTERVALS) + 0.5) / INTERVALS
    # a value that stands for an interval of probability 1/N is within it
    assert np.abs(stats.norm.cdf(table) - middle).max() < 0.5 / INTERVALS


def test_no_moment_up_to_the_third_tells_the_rows_from_normal_ones_and_hardly_one_of_the_fourth() -> None:
    rows = normal_rows().astype(np.float64)
    assert rows.shape == (INTERVALS, TOGETHER) and normal_rows().flags.c_contiguous
    assert np.array_equal(rows, -rows[::-1]), "every odd moment is zero, also of several columns"
    np.testing.assert_allclose(rows.T @ rows / INTERVALS, np.eye(TOGETHER), rtol=0, atol=1e-7)
    pairs = list(itertools.combinations_with_replacement(range(TOGETHER), 2))
    products = np.stack([rows[:, i] * rows[:, j] for i, j in pairs], axis=1)
    same = np.eye(TOGETHER)
    normal = [
        [same[i, j] * same[k, m] + same[i, k] * same[j, m] + same[i, m] * same[j, k] for k, m in pairs]
        for i, j in pairs
    ]  # Isserlis
    np.testing.assert_allclose(products.T @ products / INTERVALS, normal, rtol=0, atol=5e-3)
    np.testing.assert_allclose(np.mean(rows**6, axis=0), 15.0, rtol=0, atol=0.02)
    assert np.abs(rows).max() < 4.4


def test_the_rows_fill_four_dimensions_evenly() -> None:
    """65,536 rows in 16^2 cells of equal probability for every pair of columns, and 6^4 for all four: random ones would
    have 256 +- 16 and 50.6 +- 7.1 in a cell; those of a lattice are nearer."""
    places = stats.norm.cdf(normal_rows().astype(np.float64))
    for pair in itertools.combinations(range(TOGETHER), 2):
        counts = np.unique((places[:, pair] * 16).astype(int) @ (16, 1), return_counts=True)[1]
        assert len(counts) == 16**2 and counts.std() < 16
    counts = np.unique((places * 6).astype(int) @ (216, 36, 6, 1), return_counts=True)[1]
    assert len(counts) == 6**4 and counts.std() < 7.1


def test_numbers_of_a_stream_pass_a_kolmogorov_smirnov_test() -> None:
    """At level 1e-3, on a fixed seed: one in a thousand seeds would fail."""
    numbers = TableNormal(3, 1).fill_(torch.empty(200_000)).double().numpy()
    assert stats.kstest(numbers, "norm").pvalue > 1e-3


def test_neighbouring_numbers_and_neighbouring_streams_are_uncorrelated() -> None:
    """Each correlation has a standard error of 1/sqrt(n) = 0.0022; 4.5 of them: seven in a million seeds fail."""
    n = 200_000
    a, b = (TableNormal(0, k).fill_(torch.empty(n)).double() for k in (0, 1))
    for lag in range(1, 9):
        assert abs(float((a[lag:] * a[:-lag]).mean())) < 4.5 / n**0.5
    assert abs(float((a * b).mean())) < 4.5 / n**0.5


@pytest.mark.parametrize("size", [1, 3, 4, 5, 15, 16, 17, 1001])
def test_any_size_is_filled_and_the_same_key_gives_the_same_numbers(size: int) -> None:
    first, second = (TableNormal(7, 2).fill_(torch.full((size,), torch.nan)) for _ in range(2))
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    other = TableNormal(7, 3).fill_(torch.full((size,), torch.nan))
    assert not torch.equal(first, other)


def test_what_looks_numbers_up_is_used_on_the_cpu_in_single_precision_only() -> None:
    assert type(normal_stream(1, device=CPU, dtype=torch.float32)) is TableNormal
    assert type(normal_stream(1, device=CPU, dtype=torch.float64)) is NormalStream
    assert type(normal_stream(1, device=CPU, dtype=torch.float32, exact=True)) is NormalStream


def test_a_row_of_a_larger_tensor_is_filled_in_place() -> None:
    rows = torch.zeros(3, 10)
    TableNormal(0).fill_(rows[1])
    assert (rows[1] != 0).all()
    assert not rows[0].any() and not rows[2].any()
