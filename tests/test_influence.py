"""Influence in one call: what goes in, what comes out, and what it finds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_slt import estimate_influence
from lightning_slt.functional.between_chains import whole_of
from lightning_slt.influence.sides import Sides
from tests.influences import TINY, class_loss, clusters, functional, same, tiny, token_losses, trained
from tests.sampling.helpers import Attention, WithMetric, classification, gen, mlp, regression, seeded, tokens

# ------------------------------------------------------------------------------------------------ queries and samples


def test_queries_that_are_training_samples_have_the_same_numbers_as_no_queries() -> None:
    data = regression(24)
    alone, overlap = tiny(mlp(), data), tiny(mlp(), data, TensorDataset(*data[4:10]))
    assert alone.queries_are_train and not overlap.queries_are_train
    assert alone.matrix.shape == (24, 24) and overlap.matrix.shape == (6, 24)
    # float32 losses of one sample and of many differ in rounding: against the two standard deviations, that is small
    scale = alone.self_influence.sqrt()
    away = (overlap.matrix - alone.matrix[4:10]).abs() / (scale[4:10, None] * scale[None])
    assert float(away.max()) < 1e-5
    torch.testing.assert_close(alone.matrix, alone.matrix.T)
    torch.testing.assert_close(alone.matrix.diagonal(), alone.self_influence, rtol=1e-9, atol=0)
    torch.testing.assert_close(overlap.correlation, alone.correlation[4:10], rtol=0, atol=1e-5)
    # other samples: apart from all of them
    other = tiny(mlp(), TensorDataset(*data[:12]), TensorDataset(*data[12:]))
    assert other.matrix.shape == (12, 12) and other.query_index.tolist() == list(range(12))
    assert not torch.allclose(other.matrix, other.matrix.T)


def test_over_one_posterior_a_sample_has_the_mean_loss_of_the_query_that_it_is() -> None:
    """The mean losses of training samples are of a posterior of their own where none is given."""
    data, given = regression(24), {"nbeta": 300.0, "localization": 70.0}
    alone, overlap = tiny(mlp(), data, **given), tiny(mlp(), data, TensorDataset(*data[4:10]), **given)
    assert torch.equal(alone.query_mean_loss, alone.mean_loss)
    torch.testing.assert_close(overlap.query_mean_loss, overlap.mean_loss[4:10], rtol=1e-5, atol=0)
    moved = (alone.mean_loss - alone.init_loss).abs()
    assert 0 < float(moved.median()) < 0.5 * float(alone.init_loss.median())


def test_one_query() -> None:
    data = regression(24)
    inf = tiny(mlp(), data, TensorDataset(*data[3:4]))
    assert inf.matrix.shape == (1, 24) and inf.valid
    index, value, error = inf.top(0, 1)[0]
    assert index == int(inf.matrix[0].argmax()) and value == float(inf.matrix.max())
    assert error == float(inf.se[0, index])


def test_a_subset_is_reproducible_and_says_which_samples_it_is() -> None:
    data = regression(96)
    module, changes = mlp(), {"max_train": 10, "max_query": 3}
    first, again = (tiny(module, data, data, **changes) for _ in range(2))
    assert first.train_index.tolist() == again.train_index.tolist() and same(first, again)
    assert first.matrix.shape == (3, 10) and len(set(first.train_index.tolist())) == 10
    assert first.train_index.tolist() != tiny(module, data, data, **changes, seed=2).train_index.tolist()
    x, y = data.tensors
    with torch.no_grad():
        expected = (module(x) - y).square().mean(dim=1).double()
    torch.testing.assert_close(first.init_loss, expected[first.train_index], rtol=1e-5, atol=0)
    torch.testing.assert_close(first.query_init_loss, expected[first.query_index], rtol=1e-5, atol=0)
    # the posterior is that of all the data, whichever samples are looked at; what the chains' lengths miss is estimated
    # from those
    plain = {**changes, "control_variates": False}
    some, whole = tiny(module, data, data, **plain), tiny(module, data, control_variates=False)
    within = (e.self_influence / whole_of(e.between_share, e.num_draws) for e in (some, whole))
    torch.testing.assert_close(next(within), next(within)[first.train_index], rtol=1e-4, atol=1e-12)


def test_a_loader_and_a_sampler_over_some_of_its_dataset() -> None:
    data = regression(32)
    plain, loaded = tiny(mlp(), data), tiny(mlp(), DataLoader(data, batch_size=8, shuffle=True))
    assert same(plain, loaded)
    some = [3, 30, 7, 11, 20, 1]
    part = tiny(mlp(), DataLoader(data, batch_size=2, sampler=SubsetRandomSampler(some)), DataLoader(data))
    assert part.train_index.tolist() == some and part.matrix.shape == (32, 6) and part.num_samples == 6
    torch.testing.assert_close(part.init_loss, plain.init_loss[some])


def test_a_lightning_module_with_its_own_step_and_dict_samples() -> None:
    module, data = seeded(WithMetric), classification((5,), n=24)
    own = estimate_influence(module, data, **TINY)
    given = tiny(module, data, None, lambda m, b: functional.cross_entropy(m.net(b[0]), b[1], reduction="none"))
    torch.testing.assert_close(own.matrix, given.matrix, rtol=1e-3, atol=1e-9)
    dicts = [{"x": x, "label": y} for x, y in zip(*data.tensors, strict=True)]
    named = tiny(module, dicts, None, lambda m, b: functional.cross_entropy(m.net(b["x"]), b["label"]))
    torch.testing.assert_close(named.matrix, given.matrix, rtol=1e-3, atol=1e-9)
    assert named.train_group == tuple(str(int(y)) for y in data.tensors[1]) == own.train_group


def test_tokens_of_a_language_model_are_rows_and_their_mean_is_the_row_of_the_text() -> None:
    train, query = tokens(n=16), TensorDataset(*tokens(n=20)[16:])
    module = seeded(Attention)
    # control variates are scaled row by row, which is not linear
    whole = tiny(module, train, query, token_losses, control_variates=False)
    apart = tiny(module, train, query, token_losses, per_token=True, control_variates=False)
    assert whole.matrix.shape == (4, 16) and apart.matrix.shape == (24, 16) and whole.query_token is None
    assert apart.query_token is not None
    assert apart.query_token.tolist() == [*range(6)] * 4 and apart.query_index[::6].tolist() == [0, 1, 2, 3]
    # covariance is linear, and the loss of a text the mean of its tokens'
    mean = apart.matrix.reshape(4, 6, 16).mean(dim=1)
    torch.testing.assert_close(mean, whole.matrix, rtol=1e-3, atol=1e-4 * float(whole.matrix.abs().max()))
    torch.testing.assert_close(apart.query_init_loss.reshape(4, 6).mean(1), whole.query_init_loss, rtol=1e-5, atol=0)
    assert torch.equal(apart.self_influence, whole.self_influence)
    # with them, the same within the errors of both: other chains, in a metric that begins with the samples' gradients,
    # so that the root mean square is about 1, of some tens of independent numbers
    many = {"num_draws": 60, "per_token": True}
    plain, less = (tiny(module, train, query, token_losses, control_variates=c, **many) for c in (False, True))
    off = (plain.matrix - less.matrix) / (plain.se.square() + less.se.square()).sqrt()
    assert 0 < float(off.square().mean().sqrt()) < 1.5


def test_the_group_matrix_is_the_covariance_of_group_means() -> None:
    x, y = clusters(24, classes=3)
    inf = tiny(trained(x, y), TensorDataset(x, y), TensorDataset(x[:7], y[:7]), class_loss)
    assert inf.groups == ("0", "1", "2") and inf.group_matrix is not None and inf.group_se is not None
    for a, rows in enumerate(inf.groups):
        for b, columns in enumerate(inf.groups):
            q = torch.tensor([g == rows for g in inf.query_group or ()])
            t = torch.tensor([g == columns for g in inf.train_group or ()])
            assert float(inf.group_matrix[a, b]) == pytest.approx(float(inf.matrix[q][:, t].mean()), rel=1e-9)
    assert bool((inf.group_se > 0).all())
    named = tiny(
        mlp(), regression(12), regression(5), group_fn=lambda sample: "up" if sample[0][0] > 0 else None, num_draws=8
    )
    assert named.groups == ("up",) and set(named.train_group or ()) == {"up", ""}
    names = {True: "class 10", False: "class 9"}
    counted = tiny(
        mlp(), regression(12), regression(5), group_fn=lambda sample: names[bool(sample[0][0] > 0)], num_draws=8
    )
    assert counted.groups == ("class 9", "class 10")
    # a class that has no query has no number
    part = tiny(trained(x, y), TensorDataset(x, y), TensorDataset(x[:2], y[:2]), class_loss)
    assert (
        part.group_matrix is not None and part.group_matrix[2].isnan().all() and not part.group_matrix[:2].isnan().any()
    )


# ------------------------------------------------------------------------------------------------ what it finds


def test_correlation_finds_planted_near_duplicates() -> None:
    """20 queries are training samples with a little noise: the right one of 120 comes first for all of them (by chance
    for one in 120)."""
    x, y = clusters(120, scale=0.7)
    net = trained(x, y)
    planted = torch.arange(0, 120, 6)
    near = x[planted] + 0.02 * torch.randn(20, 8, generator=gen(5))
    inf = estimate_influence(net, TensorDataset(x, y), TensorDataset(near, y[planted]), class_loss, seed=0)
    first = [inf.nearest(q, 1)[0] for q in range(20)]
    assert [index for index, _ in first] == planted.tolist()
    assert min(rho for _, rho in first) > 0.95


def test_flipped_labels_have_the_largest_posterior_mean_losses() -> None:
    """12 of 120 labels are wrong: nine at least among the twelve first; one would be by chance."""
    x, y = clusters(120)
    flipped = torch.arange(3, 120, 10)
    wrong = y.clone()
    wrong[flipped] = (y[flipped] + 1) % 4
    inf = estimate_influence(trained(x, wrong, steps=100), TensorDataset(x, wrong), None, class_loss, seed=0)
    assert inf.valid
    assert len({int(inf.train_index[j]) for j in inf.suspects(12)} & set(flipped.tolist())) >= 9


@pytest.mark.parametrize("group_fn", [lambda sample: sample[1], lambda sample: sample[1][None], lambda s: int(s[1])])
def test_a_label_is_a_group_as_the_sample_has_it(group_fn: Any) -> None:
    data = classification([5], 3, 25)
    found = tiny(mlp(), data, None, lambda m, b: functional.cross_entropy(m(b[0]), b[1]), group_fn=group_fn)
    assert found.groups == ("0", "1", "2") and found.train_group == tuple(str(int(y)) for y in data.tensors[1])


def test_a_list_of_samples_with_a_number_of_them() -> None:
    data = regression(16)
    inf = tiny(mlp(), [data[i] for i in range(16)], num_samples=1000)
    assert inf.num_samples == 1000 and inf.matrix.shape == (16, 16)


def test_what_chains_miss_within_themselves_is_in_variances_and_in_their_errors() -> None:
    """What is known to first order is whole already."""
    draws = torch.randn(4, 60, 3, generator=gen(1), dtype=torch.float64)
    plain, known = Sides(draws, draws), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    for of_train in (True, False):
        value, error = plain.variance(1.0, of_train)
        for sides, more in ((plain, torch.zeros(3)), (replace(plain, known_x=known, known_y=known), known)):
            twice, its_error = sides.variance(2.0, of_train)
            torch.testing.assert_close(twice, 2 * value + more)
            torch.testing.assert_close(its_error, 2 * error)
    torch.testing.assert_close(plain.covariance(2.0).matrix, 2 * plain.covariance(1.0).matrix)
    torch.testing.assert_close(plain.covariance(2.0).se, 2 * plain.covariance(1.0).se)
