"""The noise of the chains: normal as far as a Langevin step can tell, and the same for the same key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_slt.sampling.noise import (
    PERIOD,
    WINDOW,
    NormalStream,
    TableNormal,
    fill_rows_,
    normal_sequence,
    normal_stream,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sequence() -> np.ndarray:
    return normal_sequence().astype(np.float64)


def by_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The mean of ``a[t] b[t + k]`` over the cyclic sequence, at index k."""
    return np.fft.irfft(np.conj(np.fft.rfft(a)) * np.fft.rfft(b), len(a)) / len(a)


def test_the_numbers_of_the_sequence_are_normal_ones(sequence: np.ndarray) -> None:
    half = PERIOD // 2
    assert normal_sequence().dtype == np.float32 and len(sequence) == PERIOD
    assert np.array_equal(sequence[half:], -sequence[:half]), "every odd moment is zero, also of several numbers"
    assert np.mean(sequence**2) == pytest.approx(1.0, abs=1e-7)
    assert np.mean(sequence**4) == pytest.approx(3.0, abs=5e-3)
    assert np.mean(sequence**6) == pytest.approx(15.0, abs=0.02)
    assert np.abs(sequence).max() < 4.5
    # of as many random ones 0.002 would be usual
    assert stats.kstest(sequence, "norm").statistic < 1e-3


def test_numbers_of_a_window_are_uncorrelated_and_their_fourth_moments_are_nearly_the_normal_ones(
    sequence: np.ndarray,
) -> None:
    covariance = by_distance(sequence, sequence)
    assert np.abs(covariance[1:WINDOW]).max() < 1e-7
    assert WINDOW < PERIOD // 2  # where it is -1
    squares = by_distance(sequence**2, sequence**2)[1:WINDOW]
    cubes = by_distance(sequence**3, sequence)
    assert max(np.abs(squares - 1).max(), np.abs(cubes[1:WINDOW]).max(), np.abs(cubes[1 - WINDOW :]).max()) < 0.05
    assert max(np.abs(squares[:63] - 1).max(), np.abs(cubes[1:64]).max(), np.abs(cubes[-63:]).max()) < 0.02


@pytest.mark.parametrize("size", [2, 100, 10_000, WINDOW])
def test_windows_are_normal_along_any_direction(sequence: np.ndarray, size: int) -> None:
    """Along ten random directions: the variance is 1, and the kurtosis 3 up to what as many random numbers as the half
    of the sequence would show, ``sqrt(24 / 65536) = 0.019`` (4.5 of them: one in 15,000 such tests would fail)."""
    random = np.random.Generator(np.random.PCG64(0))
    for _ in range(10):
        direction = np.zeros(PERIOD)
        direction[:size] = random.standard_normal(size)
        along = by_distance(direction / np.linalg.norm(direction), sequence) * PERIOD
        assert np.mean(along**2) == pytest.approx(1.0, abs=1e-6)
        assert np.mean(along**4) == pytest.approx(3.0, abs=4.5 * (24 / 65536) ** 0.5)


@pytest.mark.parametrize("size", [4, 64, 1024, 2**14])
def test_the_square_of_a_window_varies_about_as_that_of_normal_numbers(sequence: np.ndarray, size: int) -> None:
    """Of variance ``2 d``."""
    totals = np.concatenate([[0.0], np.cumsum(np.concatenate([sequence, sequence[:size]]) ** 2)])
    squares = (totals[size:] - totals[:-size])[:PERIOD]
    assert squares.mean() == pytest.approx(size, rel=1e-6)
    assert 0.7 < squares.var() / (2 * size) < 1.1


def test_the_longest_windows_differ_in_length_half_as_much_as_normal_numbers(sequence: np.ndarray) -> None:
    """Of d numbers the square has variance ``2 d`` and the product of two windows ``d``; here it is half of both, but
    for windows from the same place, or from half a period further on."""
    twice = np.concatenate([sequence, sequence])
    totals = np.concatenate([[0.0], np.cumsum(twice**2)])
    squares = (totals[WINDOW:] - totals[:-WINDOW])[:PERIOD]
    assert 0.4 < squares.var() / (2 * WINDOW) < 0.6
    first = sequence[:WINDOW]
    products = np.fft.irfft(np.conj(np.fft.rfft(first, PERIOD)) * np.fft.rfft(sequence), PERIOD)
    same = np.abs(products) > 0.9 * WINDOW
    assert same.sum() == 2
    assert np.mean(products**2) == pytest.approx(np.sum(first**2), rel=1e-6)  # as the covariance asks
    assert 0.4 < np.var(products[~same]) / WINDOW < 0.6


def test_a_window_may_begin_anywhere(sequence: np.ndarray) -> None:
    """Every number is the one after it in the cyclic sequence, up to the next window."""
    numbers = normal_sequence().tolist()
    places = {triple: i for i, triple in enumerate(zip(numbers, numbers[1:], numbers[2:], strict=False))}
    assert len(places) == PERIOD - 2
    stream, begun = TableNormal(0), []
    for _ in range(50):
        filled = stream.fill_(torch.empty(WINDOW + 10)).tolist()
        for window in (filled[:WINDOW], filled[WINDOW:]):
            first = places[tuple(window[:3])]
            assert np.array_equal(window, np.take(sequence, np.arange(first, first + len(window)), mode="wrap"))
            begun.append(first)
    assert max(begun[::2]) > PERIOD - WINDOW  # so that some went around the end: of all seeds but (3/4)^50
    assert stats.kstest(np.array(begun) / PERIOD, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 100, WINDOW, WINDOW + 1])
def test_numbers_that_are_read_are_those_that_would_be_filled_in(size: int) -> None:
    for kind in (TableNormal, NormalStream):
        reading, filling = kind(5), kind(5)
        for _ in range(3):
            buffer = torch.zeros(1, size)
            assert torch.equal(reading.read(buffer), filling.fill_(torch.empty(1, size)))


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


@pytest.mark.parametrize("size", [1, 3, 4, 5, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
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


@pytest.mark.parametrize("size", [1, 64, WINDOW, WINDOW + 10])
@pytest.mark.parametrize("kind", [TableNormal, NormalStream])
def test_rows_of_several_chains_have_the_numbers_of_each(kind: type[NormalStream], size: int) -> None:
    """Also where they are a part of a wider memory, as a last block is, of which the rest stays as it was."""
    together, alone = ([kind(5, k) for k in range(3)] for _ in range(2))
    memory = torch.zeros(3, size + 7)
    for _ in range(3):
        out = memory[:, :size]
        assert fill_rows_(together, out) is out
        assert torch.equal(out, torch.stack([stream.fill_(torch.empty(size)) for stream in alone]))
    assert not memory[:, size:].any()
