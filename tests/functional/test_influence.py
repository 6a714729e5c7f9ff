"""Covariances of losses over draws: the streamed answer is the two-pass one, and its error bar is true."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_slt.functional.between_chains import between_share, factor_of, whole_of
from lightning_slt.functional.block_errors import block_edges, blocks_per_chain, error_of_mean, mean_and_error
from lightning_slt.functional.influence import (
    Covariance,
    CovarianceAccumulator,
    LinearParts,
    correlation,
    covariance,
    group_means,
    shrink,
    variance,
)


def autocorrelated(chains: int, draws: int, n: int, memory: float, seed: int) -> Tensor:
    """AR(1) draws of unit variance whose columns share a factor: true covariance 0.5 between columns, 1 on itself."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(chains, draws, n + 1, generator=g, dtype=torch.float64)
    out = torch.empty_like(noise)
    out[:, 0] = noise[:, 0]
    for t in range(1, draws):
        out[:, t] = memory * out[:, t - 1] + math.sqrt(1 - memory**2) * noise[:, t]
    return math.sqrt(0.5) * (out[:, :, :n] + out[:, :, n:])


def two_pass(x: Tensor, y: Tensor) -> Tensor:
    x, y = (z.double() - z.double().mean(dim=1, keepdim=True) for z in (x, y))
    return torch.einsum("ctq,cti->qi", y, x) / (x.shape[0] * (x.shape[1] - 1))


def test_streaming_equals_two_passes_however_the_draws_are_cut() -> None:
    # means a million times the scatter: a one-pass sum of products would lose every digit
    x = autocorrelated(3, 120, 40, 0.5, 0) + 1e6
    y = autocorrelated(3, 120, 7, 0.5, 1) * 3 - 1e5 + 0.5 * x[:, :, :7]
    whole = CovarianceAccumulator(40, 7)
    parts = [CovarianceAccumulator(40, 7) for _ in range(2)]
    for chain in range(3):
        for start in range(0, 120, 17):
            stop = min(start + 17, 120)
            block = start // 40
            for low, high in ((start, min(stop, 40 * (block + 1))), (min(stop, 40 * (block + 1)), stop)):
                key = min(low // 40, 2)
                whole.update(chain, key, x[chain, low:high], y[chain, low:high])
                parts[chain % 2].update(chain, key, x[chain, low:high], y[chain, low:high])
    parts[0].load(parts[1].state())  # as from another process
    expected = two_pass(x, y)
    for acc in (whole, parts[0]):
        found = acc.result()
        assert float((found.matrix - expected).norm() / expected.norm()) < 1e-9
        assert found.num_blocks == 9
        torch.testing.assert_close(found.mean_x, x.mean(dim=(0, 1)), rtol=1e-12, atol=0)


def test_columns_in_chunks_give_the_same_and_float32_deltas_keep_six_digits() -> None:
    x, y = autocorrelated(4, 200, 50, 0.3, 2), autocorrelated(4, 200, 5, 0.3, 3) + 0.2
    one, many = covariance(x, y), covariance(x, y, columns=7)
    torch.testing.assert_close(one.matrix, many.matrix, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(one.se, many.se, rtol=1e-9, atol=1e-14)
    low = covariance(x.float(), y.float())
    assert float((low.matrix - two_pass(x, y)).norm() / one.matrix.norm()) < 1e-6


@pytest.mark.parametrize(
    ("chains", "draws", "blocks"),
    [(16, 50, 1), (16, 100, 3), (8, 100, 3), (4, 100, 4), (1, 100, 16), (1, 9, 2), (16, 5000, 4), (100, 5000, 1)],
)
def test_blocks_per_chain(chains: int, draws: int, blocks: int) -> None:
    assert blocks_per_chain(chains, draws) == blocks


@pytest.mark.parametrize("memory", [0.0, 0.7])
def test_the_error_is_the_spread_over_repetitions(memory: float) -> None:
    """True covariance 0.5. 80 repetitions: the mean squared z of a true error bar is 1.15 (15 degrees of freedom);
    that of one which ignores the memory of 0.7 would be about 3 (integrated autocorrelation of the products 2.9)."""
    found, errors = [], []
    for seed in range(80):
        x = autocorrelated(4, 400, 6, memory, 100 + seed)
        c = covariance(x[:, :, :3], x[:, :, 3:])
        found.append(c.matrix.diagonal())
        errors.append(c.se.diagonal())
    values, se = torch.stack(found), torch.stack(errors)
    assert abs(float(values.mean()) - 0.5) < 0.01
    ratio = float(values.std(dim=0).mean() / se.mean())
    assert 0.85 < ratio < 1.2, ratio
    outside = float(((values - 0.5).abs() > 3 * se).double().mean())
    assert outside < 0.025


@pytest.mark.parametrize(
    ("draws", "memory", "least", "most", "of_blocks"),
    [(8, 0.0, 0.8, 1.05, 0.98), (8, 0.7, 0.9, 1.15, 1.2), (20, 0.0, 0.8, 1.05, 0.95), (20, 0.8, 0.85, 1.12, 1.25)],
)
def test_the_error_of_few_draws_is_no_smaller_than_the_spread(
    draws: int, memory: float, least: float, most: float, of_blocks: float
) -> None:
    """Four chains, 400 repetitions, those that are valid: the root mean square error of 21 pairs over the reported one.
    Blocks of four or five draws alone, as they were used, have 1.2 to 1.4 of it where there is memory. Six ranges of
    seeds hold, with a distance of 0.03."""
    found, reported, blocks = [], [], []
    for seed in range(400):
        x = autocorrelated(4, draws, 6, memory, 1000 + seed)
        share = between_share(x)
        if share > 0.5:
            continue
        c = covariance(x, x).scaled(factor_of(share, draws))
        found.append(c.matrix - (torch.eye(6).double() + 1) / 2)
        reported.append(c.se.square())
        assert c.num_blocks == 4
        cut = torch.stack((x - x.mean(dim=1, keepdim=True)).split(draws // blocks_per_chain(4, draws), dim=1))
        parts = torch.einsum("bctq,bcti->bcqi", cut, cut).flatten(0, 1) * (len(cut) / (draws - 1))
        blocks.append(parts.var(dim=0) / len(parts) * factor_of(share, draws) ** 2)
    square = torch.stack(found).square().mean(dim=0)
    ratio, old = (float((square / torch.stack(v).mean(dim=0)).sqrt().mean()) for v in (reported, blocks))
    assert least < ratio < most, ratio
    assert old > of_blocks, old


@pytest.mark.parametrize(
    ("chains", "draws", "memory", "of_blocks"),
    [
        pytest.param(8, 400, 0.97, 1.15, marks=pytest.mark.slow),
        pytest.param(8, 200, 0.97, 1.25, marks=pytest.mark.slow),
        (4, 200, 0.95, 1.15),
        (4, 400, 0.5, 0.9),
    ],
)
def test_the_error_of_draws_whose_memory_is_beyond_that_of_long_blocks_is_no_smaller_than_the_spread(
    chains: int, draws: int, memory: float, of_blocks: float
) -> None:
    """Blocks of 33 to 50 draws and memories of 39 and 66 (and of 3): the root mean square error of covariances and
    means over the reported one, 200 repetitions. Blocks alone have 1.2 to 1.4 of it, where all are valid."""
    whole, reported, of_means, blocks = [], [], [], []
    for seed in range(200):
        x = autocorrelated(chains, draws, 6, memory, 2000 + seed)
        share = between_share(x)
        factor = factor_of(share, draws)
        c, (mean, mean_se) = covariance(x, x).scaled(factor), mean_and_error(x)
        assert share < 0.5 and c.num_blocks == chains * blocks_per_chain(chains, draws) > chains
        whole.append(c.matrix - (torch.eye(6).double() + 1) / 2)
        reported.append(c.se.square())
        of_means.append(torch.stack([mean, mean_se]).square())
        cut = (x - x.mean(dim=1, keepdim=True)).tensor_split(blocks_per_chain(chains, draws), dim=1)
        parts = torch.cat([torch.einsum("ctq,cti->cqi", v, v) * len(cut) / (draws - 1) for v in cut])
        blocks.append(parts.var(dim=0) / len(parts) * factor**2)
    square = torch.stack(whole).square().mean(dim=0)
    ratio, old = (float((square / torch.stack(v).mean(dim=0)).sqrt().mean()) for v in (reported, blocks))
    of_mean = torch.stack(of_means).mean(dim=0)
    assert 0.8 < ratio < 1.12, ratio
    assert 0.8 < float((of_mean[0] / of_mean[1]).sqrt().mean()) < 1.12
    assert old > of_blocks, old


def test_the_error_is_the_larger_one_of_blocks_and_of_chains_whether_blocks_are_long_or_short() -> None:
    """Two formulas, to the last digits: 4 chains of 400 in blocks of 33 draws, and of 8 in blocks of 4."""
    x = autocorrelated(4, 400, 5, 0.5, 9)
    long = covariance(x, x)
    assert long.num_blocks == 4 * blocks_per_chain(4, 400) == 48
    centred = x - x.mean(dim=1, keepdim=True)
    edges = torch.linspace(0, 400, 13).round().long().tolist()
    parts = torch.stack([v[a:b].T @ v[a:b] for v in centred for a, b in pairwise(edges)])
    chains = torch.stack([v.T @ v for v in centred])
    wanted = torch.maximum(parts.std(dim=0) * 48**0.5, chains.std(dim=0) * 4**0.5) / (4 * 399)
    torch.testing.assert_close(long.se, wanted, rtol=1e-9, atol=0)
    x = autocorrelated(4, 8, 5, 0.5, 9)
    short, centred = covariance(x, x), x - x.mean(dim=1, keepdim=True)
    parts = torch.stack([v[a : a + 4].T @ v[a : a + 4] for v in centred for a in (0, 4)])
    chains = torch.stack([v.T @ v for v in centred])
    wanted = torch.maximum(parts.std(dim=0) * 8**0.5, chains.std(dim=0) * 4**0.5) / (4 * 7)
    torch.testing.assert_close(short.se, wanted, rtol=1e-9, atol=0)
    accumulated = CovarianceAccumulator(5, 5)
    for chain in range(4):
        for block in range(2):
            part = x[chain, 4 * block : 4 * block + 4]
            accumulated.update(chain, block, part, part)
    torch.testing.assert_close(accumulated.result().se, wanted, rtol=1e-9, atol=0)
    assert short.num_blocks == accumulated.result().num_blocks == 4
    torch.testing.assert_close(variance(x)[1], wanted.diagonal(), rtol=1e-9, atol=0)
    means = torch.stack([v[a : a + 4].mean(dim=0) for v in x for a in (0, 4)])
    wanted = torch.maximum(means.std(dim=0) / 8**0.5, x.mean(dim=1).std(dim=0) / 2)
    torch.testing.assert_close(mean_and_error(x)[1], wanted, rtol=1e-9, atol=0)
    assert covariance(x[:1], x[:1]).num_blocks == 2  # of one chain there is nothing else


def test_what_a_weight_takes_off_entries_that_stand_out_is_in_their_error() -> None:
    """Ten of 900 entries are five times the noise, the others nothing but noise: the James-Stein factor is about 0.2,
    and takes four times the noise off the ten. 100 repetitions."""
    truth = torch.zeros(30, 30).double()
    truth.view(-1)[::90] = 5.0
    g, ones = torch.Generator().manual_seed(0), torch.ones(30).double()
    beyond, of_plain, larger = [], [], []
    for _ in range(100):
        rest = Covariance(truth + torch.randn(30, 30, generator=g).double(), torch.ones_like(truth), ones, ones, 64)
        found = rest.plus(torch.zeros_like(truth), rest.stein_weight)
        off = (found.matrix - truth).abs()
        beyond.append((off > 3 * found.se)[truth > 0])
        of_plain.append((off > 3 * rest.se)[truth > 0])
        larger.append(found.se[truth == 0])
        assert bool((found.se >= rest.se).all()) and rest.plus(None).se is rest.se
    assert float(torch.stack(of_plain).double().mean()) > 0.75
    assert float(torch.stack(beyond).double().mean()) < 0.01
    assert float(torch.stack(larger).mean()) < 1.05


def test_variance_is_the_diagonal_and_its_error_too() -> None:
    x = autocorrelated(4, 100, 9, 0.4, 5)
    full = covariance(x, x)
    value, se = variance(x)
    torch.testing.assert_close(value, full.matrix.diagonal(), rtol=1e-10, atol=0)
    torch.testing.assert_close(se, full.se.diagonal(), rtol=1e-8, atol=1e-12)


def test_a_difference_between_chains_is_no_influence() -> None:
    x = autocorrelated(4, 200, 4, 0.0, 6)
    shifted = x + torch.tensor([0.0, 10.0, -10.0, 5.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(covariance(shifted, shifted).matrix, covariance(x, x).matrix, rtol=1e-9, atol=1e-10)
    assert between_share(shifted) > 0.9
    assert between_share(x) < 0.05
    assert math.isnan(between_share(x[:1]))


def test_mean_and_error() -> None:
    x = autocorrelated(16, 50, 3, 0.0, 7) + 2.0
    mean, se = mean_and_error(x)
    torch.testing.assert_close(mean, x.mean(dim=(0, 1)))
    # sd 1 over 800 draws, known to one part in sqrt(30)
    assert torch.all((se > 0.02) & (se < 0.06))


def test_correlation_is_bounded_and_zero_for_a_constant() -> None:
    matrix = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    rho = correlation(matrix, torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64))
    assert rho.tolist() == [[1.0, 0.0]]


def test_shrinkage_weights_weak_pairs_down_and_one_is_none() -> None:
    matrix, rho = torch.tensor([[2.0, -0.2]]), torch.tensor([[0.5, -0.1]])
    assert shrink(matrix, rho, 1.0) is matrix
    torch.testing.assert_close(shrink(matrix, rho, 2.0), torch.tensor([[1.0, -0.02]]))
    with pytest.raises(ValueError, match=r"shrinkage=0\.5"):
        shrink(matrix, rho, 0.5)


def test_group_means_are_linear_and_nan_for_an_empty_group() -> None:
    x = autocorrelated(2, 30, 4, 0.0, 8)
    means = group_means(x, ["a", "b", "a", None], ["a", "b", "c"])
    torch.testing.assert_close(means[..., 0], (x[..., 0] + x[..., 2]) / 2)
    torch.testing.assert_close(means[..., 1], x[..., 1])
    assert means[..., 2].isnan().all()


def test_errors_name_the_shapes() -> None:
    acc = CovarianceAccumulator(3, 2)
    with pytest.raises(ValueError, match=r"expected \[draws, 3\] and \[draws, 2\]"):
        acc.update(0, 0, torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="no draws"):
        acc.result()


def test_control_variates_of_a_known_covariance_keep_the_mean_and_take_the_noise() -> None:
    """Losses that are linear with a little of something else: with the linear part's known covariance the error is that
    of the rest. z of 60 pairs: beyond 4 of them in fewer than one run of a hundred."""
    g = torch.Generator().manual_seed(5)
    gradients = torch.randn(12, 6, generator=g, dtype=torch.float64)
    at = torch.randn(8, 200, 6, generator=g, dtype=torch.float64)
    rest = 0.1 * torch.randn(8, 200, 12, generator=g, dtype=torch.float64)
    linear = at @ gradients.T
    losses = 3.0 * linear + rest
    x, y = losses[:, :, :10], losses[:, :, 10:]
    exact = 9.0 * gradients[10:] @ gradients[:10].T
    plain = covariance(x, y)
    sides = [LinearParts(part, part) for part in (linear[:, :, :10], linear[:, :, 10:])]
    (a, a_down, a_across), (b, b_down, b_across) = (s.fitted(v) for s, v in zip(sides, (x, y), strict=True))
    torch.testing.assert_close(a_down, torch.full((10,), 3.0).double(), rtol=0.01, atol=0)
    known = (torch.outer(b_down, a_across) + torch.outer(b_across, a_down)) / 2 * (gradients[10:] @ gradients[:10].T)
    less = covariance(x, y, columns=3, x_parts=a, y_parts=b).plus(known)
    assert float((plain.se / less.se).median()) > 8
    assert float(((less.matrix - exact) / less.se).abs().max()) < 4
    own, _ = variance(x, a)
    own = own + a_down * a_across * gradients[:10].square().sum(dim=1)
    whole = covariance(x, x, x_parts=a, y_parts=a).plus(
        (torch.outer(a_down, a_across) + torch.outer(a_across, a_down)) / 2 * (gradients[:10] @ gradients[:10].T)
    )
    torch.testing.assert_close(whole.matrix.diagonal(), own, rtol=1e-9, atol=0)


def test_each_control_is_scaled_by_the_slope_of_the_losses_on_it_within_chains() -> None:
    """Chains that lie apart, and the more so the smaller their losses are: across them the slopes are negative."""
    g = torch.Generator().manual_seed(0)
    direct, pulled = torch.randn(2, 3, 40, 2, generator=g, dtype=torch.float64).unbind()
    apart = 100.0 * torch.arange(3).double()[:, None, None]
    slopes = torch.tensor([2.0, 0.5]).double()
    parts, down, across = LinearParts(direct + apart, pulled - apart).fitted(slopes * direct - apart)
    torch.testing.assert_close(down, slopes)
    torch.testing.assert_close(parts.direct, slopes * (direct + apart))
    _, _, own = LinearParts(direct + apart, pulled - apart).fitted(3 * slopes * pulled + apart)
    torch.testing.assert_close(own, 3 * slopes)
    torch.testing.assert_close(parts.pulled, across * (pulled - apart))
    assert float((across - down).abs().min()) > 0.1


def test_where_no_error_is_known_nothing_is_taken_for_noise() -> None:
    """Of a single chain with too few draws for two blocks."""
    x = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = covariance(x, x)
    assert found.num_blocks == 1 and bool(found.se.isnan().all()) and found.stein_weight == 1.0


def test_a_control_that_does_not_vary_changes_nothing() -> None:
    x, y = autocorrelated(4, 100, 6, 0.3, 2), autocorrelated(4, 100, 5, 0.3, 3)
    still = [LinearParts(torch.zeros_like(v), torch.zeros_like(v)).fitted(v)[0] for v in (x, y)]
    less = covariance(x, y, x_parts=still[0], y_parts=still[1])
    torch.testing.assert_close(less.matrix, covariance(x, y).matrix, rtol=1e-12, atol=0)
    assert bool(torch.isfinite(less.matrix).all())


def test_a_few_independent_draws_of_each_chain_are_not_made_more_of() -> None:
    """Three draws of four chains, 4,000 times: the variance is 1; the share between chains alone would give 4 / 3."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 4000, generator=g)
    within = variance(x)[0].mean()
    assert float(within) * whole_of(between_share(x), 3) == pytest.approx(1.0, abs=0.13)
    many = torch.randn(400, 3, 200, generator=g)
    assert float(variance(many)[0].mean()) * whole_of(between_share(many), 3) == pytest.approx(1.0, abs=0.02)


def test_controls_are_taken_off_a_stream_as_they_are_off_whole_traces() -> None:
    """The mean of two, block by block, in the covariance and in its error."""
    x, y = autocorrelated(3, 100, 6, 0.5, 2), autocorrelated(3, 100, 4, 0.5, 3)
    x_parts, y_parts = (
        LinearParts(0.7 * v + 0.2 * autocorrelated(3, 100, v.shape[2], 0.3, 4), 0.9 * v + 0.1 * v.square())
        for v in (x, y)
    )
    whole, *less = (CovarianceAccumulator(6, 4) for _ in range(3))
    sides = [(x, y), (x_parts.direct, y_parts.pulled), (x_parts.pulled, y_parts.direct)]
    for stream, (left, right) in zip((whole, *less), sides, strict=True):
        for chain in range(3):
            for block, (low, high) in enumerate(block_edges(3, 100)):
                stream.update(chain, block, left[chain, low:high], right[chain, low:high])
    found, expected = whole.result(less), covariance(x, y, x_parts=x_parts, y_parts=y_parts)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.se, expected.se, rtol=1e-9, atol=1e-12)
    controls = [two_pass(*side) for side in sides[1:]]
    torch.testing.assert_close(found.matrix, two_pass(x, y) - sum(controls) / 2, rtol=1e-9, atol=1e-12)


def test_the_share_between_chains_is_a_mean_over_losses_of_any_size() -> None:
    """One that differs within chains alone, a far larger one between them alone, and one that stands still."""
    within, between = torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([[10.0, 10.0], [30.0, 30.0]])
    x = torch.stack([within, between, torch.ones(2, 2)], dim=2)
    assert between_share(x) == pytest.approx(0.5)


def test_blocks_of_a_mean_count_by_their_share_of_the_draws() -> None:
    """Nine draws of one chain, in blocks of four and of five."""
    x = torch.tensor([1.0, 4.0, 2.0, 0.0, 3.0, -1.0, -2.0, 5.0, -4.0]).reshape(1, 9, 1)
    assert float(error_of_mean(x)) == pytest.approx(abs(7.0 - 1.0) * (2 / 9) / 2)


def test_chains_of_unequal_length_count_by_their_draws_and_a_block_may_come_in_two_parts() -> None:
    x, y = autocorrelated(1, 40, 5, 0.5, 2)[0], autocorrelated(1, 40, 3, 0.5, 3)[0] + 2.0
    here, elsewhere = CovarianceAccumulator(5, 3), CovarianceAccumulator(5, 3)
    for stream, chain, rows in ((here, 0, slice(0, 12)), (elsewhere, 0, slice(12, 30)), (here, 1, slice(30, 40))):
        stream.update(chain, 0, x[rows], y[rows])
    here.load(elsewhere.state())
    found = here.result()
    away = [(v[rows] - v[rows].mean(dim=0)) for v in (y, x) for rows in (slice(0, 30), slice(30, 40))]
    torch.testing.assert_close(found.matrix, (away[0].T @ away[2] + away[1].T @ away[3]) / (29 + 9), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.mean_x, x.mean(dim=0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.mean_y, y.mean(dim=0), rtol=1e-9, atol=1e-12)
