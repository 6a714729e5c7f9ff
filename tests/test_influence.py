"""Influence in one call: what goes in, what comes out, what is refused and how, what is left alone."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_slt import SGLD, InfluenceEstimate, estimate_influence
from lightning_slt.functional.block_errors import blocks_per_chain
from lightning_slt.functional.influence import whole_of
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.influence import probe_set, reading_interval
from lightning_slt.influence.reader import InfluenceReader
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.probe import CoupledLossError
from tests.sampling.helpers import Attention, WithMetric, classification, gen, mlp, regression, seeded, tokens

functional = nn.functional

# the engine is fixed: the one that is faster here differs in rounding from the other
TINY: dict[str, Any] = {
    "num_chains": 4,
    "num_draws": 10,
    "num_burnin_steps": 4,
    "seed": 1,
    "method": "sequential",
    "shrinkage": 1.0,
}
"""The plain covariance: linear in either side, so that rows, groups and subsets can be compared."""


def squares(module: nn.Module, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean(dim=1)


def token_losses(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]).transpose(1, 2), batch[1], reduction="none")


def tiny(module: nn.Module, data: Any, query: Any = None, loss_fn: Any = squares, **changes: Any) -> InfluenceEstimate:
    return estimate_influence(module, data, query, loss_fn, **{**TINY, **changes})


def same(a: InfluenceEstimate, b: InfluenceEstimate) -> bool:
    return all(torch.equal(v, b.tensors()[k]) for k, v in a.tensors().items())


def clusters(n: int, classes: int = 4, dim: int = 8, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Points around class centres, and their classes."""
    centre = scale * torch.randn(classes, dim, generator=gen(99))
    y = torch.arange(n) % classes
    return centre[y] + torch.randn(n, dim, generator=gen(seed)), y


def trained(x: Tensor, y: Tensor, width: int = 16, steps: int = 200) -> nn.Module:
    net = seeded(lambda: nn.Sequential(nn.Linear(x.shape[1], width), nn.Tanh(), nn.Linear(width, int(y.max()) + 1)))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net


def class_loss(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


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
    # other samples: apart from all of them
    other = tiny(mlp(), TensorDataset(*data[:12]), TensorDataset(*data[12:]))
    assert other.matrix.shape == (12, 12) and other.query_index.tolist() == list(range(12))
    assert not torch.allclose(other.matrix, other.matrix.T)


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


# ------------------------------------------------------------------------------------------------ how it is sampled


def test_another_sampler() -> None:
    data = regression(32)
    inf = tiny(
        mlp(), data, None, squares, sampler=SGLD(), nbeta=10.0, localization=5.0, num_draws=40, num_steps_bw_draws=4
    )
    assert inf.nbeta == 10.0 and inf.localization == 5.0 and inf.matrix.shape == (32, 32)
    given = tiny(mlp(), data, None, squares, sampler=SGLD(lr=1e-3), localization=5.0)
    assert given.nbeta == pytest.approx(32 / np.log(32)) and bool(torch.isfinite(given.matrix).all())


def test_the_posterior_that_is_asked_for_is_used() -> None:
    data = regression(32)
    both = tiny(mlp(), data, nbeta=300.0, localization=70.0)
    assert (both.nbeta, both.localization) == (300.0, 70.0)
    one, other, none = tiny(mlp(), data, nbeta=300.0), tiny(mlp(), data, localization=70.0), tiny(mlp(), data)
    # the same damping for all: 2.5 times the mean curvature
    damping = one.localization / one.nbeta
    assert other.localization / other.nbeta == pytest.approx(damping) == none.localization / none.nbeta
    assert one.nbeta == 300.0 and other.localization == 70.0
    anchor = torch.cat([p.detach().flatten() for p in mlp().parameters()])
    assert none.localization == pytest.approx(len(anchor) / (0.35**2 * float(anchor.square().sum())), rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-6])
def test_weights_that_are_zero_have_a_region_in_which_losses_differ(scale: float) -> None:
    """As of a layer that begins at zero: a share of a norm of nothing was a localisation of 2e13, and noise was valid.
    The local posterior of linear regression is Gaussian, its mean is downhill of these weights."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=g)
    y = x.sum(dim=1) + 0.3 * torch.randn(60, generator=g)
    net = nn.Linear(3, 1, bias=False)
    nn.init.constant_(net.weight, scale)
    inf = estimate_influence(
        net, TensorDataset(x, y), None, lambda m, b: 0.5 * (m(b[0])[:, 0] - b[1]).square().mean(), shrinkage=1.0
    )
    rows, hessian = x.double(), (x.T @ x / 60).double()
    spread = torch.linalg.inv(inf.nbeta * hessian + inf.localization * torch.eye(3).double())
    mean = scale + spread @ (inf.nbeta * (rows.T @ (y.double() - rows.sum(dim=1) * scale)) / 60)
    residual, shared = rows @ mean - y, rows @ spread @ rows.T
    exact = torch.outer(residual, residual) * shared + 0.5 * shared.square()
    assert inf.valid and float((inf.matrix - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("settings", [{}, {"control_variates": False}])
def test_chains_far_from_the_posterior_burn_in_until_they_are_there(settings: dict[str, Any]) -> None:
    """The posterior's mean is 21 of its widths away. Read on the way, covariances were 3.3 times the exact ones (0.955
    with control variates), with all of 20 seeds valid."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=g)
    y = x.sum(dim=1) + 0.3 * torch.randn(60, generator=g)
    net = nn.Linear(3, 1, bias=False)
    nn.init.constant_(net.weight, 0.05)
    found, rows = [], x.double()
    for seed in range(6):
        data = TensorDataset(x, y)
        inf = estimate_influence(
            net, data, None, lambda m, b: 0.5 * (m(b[0])[:, 0] - b[1]).square().mean(), seed=seed, **settings
        )
        precision = inf.nbeta * rows.T @ rows / 60 + inf.localization * torch.eye(3).double()
        spread = torch.linalg.inv(precision)
        mean = 0.05 + spread @ (inf.nbeta * (rows.T @ (y.double() - 0.05 * rows.sum(dim=1))) / 60)
        residual, shared = rows @ mean - y, rows @ spread @ rows.T
        exact = torch.outer(residual, residual) * shared + 0.5 * shared.square()
        assert inf.valid
        found.append(float((inf.matrix * exact).sum() / exact.square().sum()))
    spread_of = 0.01 if not settings else 0.15
    assert sum(found) / 6 == pytest.approx(1.0, abs=3 * spread_of / 6**0.5), found


def test_minibatches_and_all_data() -> None:
    data = regression(64)
    kinds = [{}, {"full_batch": True}, {"batch_size": 64}, {"batch_size": 16}, {"batch_size": 16, "full_batch": True}]
    found = [tiny(mlp(), data, **kind) for kind in kinds]
    for k in (1, 4):
        assert same(found[0], found[k])
    assert not same(found[0], found[3])
    assert bool(torch.isfinite(found[3].matrix).all())


@pytest.mark.parametrize("batch_size", [None, 8])
def test_both_engines_give_the_same_numbers(batch_size: Any) -> None:
    data = regression(32)
    one, all_at_once = (tiny(mlp(), data, method=m, batch_size=batch_size) for m in ("sequential", "batched"))
    scale = float(one.matrix.abs().max())
    torch.testing.assert_close(one.matrix, all_at_once.matrix, rtol=1e-3, atol=1e-3 * scale)
    torch.testing.assert_close(one.mean_loss, all_at_once.mean_loss, rtol=1e-3, atol=0)


def test_the_same_seed_gives_the_same_answer_and_another_another() -> None:
    data = regression(24)
    first, again, other = tiny(mlp(), data), tiny(mlp(), data), tiny(mlp(), data, seed=2)
    assert same(first, again) and not torch.allclose(first.matrix, other.matrix)


def test_one_chain() -> None:
    inf = tiny(mlp(), regression(16), num_chains=1, num_draws=64)
    assert inf.valid and inf.num_chains == 1 and inf.num_blocks == blocks_per_chain(1, 64) == 16
    assert np.isnan(inf.between_share) and bool((inf.se > 0).all()) and "NOT VALID" not in str(inf)


def test_what_no_error_of_few_readings_can_say_is_noted() -> None:
    """One chain has blocks alone, of 4 readings here; four chains have themselves. Chains with a memory of 0.9 draws,
    in 20 of them (all 20 seeds), show two thirds of a variance at the most."""
    one = tiny(mlp(), regression(16), num_chains=1, num_draws=9)
    assert any("9 readings of one chain: what is correlated over more than 4 of them" in note for note in one.notes)
    assert tiny(mlp(), regression(16), num_draws=9).notes == ()
    data = TensorDataset(*regression(16).tensors)
    reader = InfluenceReader(
        Objective(mlp(), squares, None, torch.device("cpu")), probe_set(DatasetSource(data, 16), None, None, None, 0), 0
    )
    for seed in range(20):
        trace = torch.randn(4, 20, 16, generator=gen(seed), dtype=torch.float64)
        independent = reader.read(trace, torch.ones(4, dtype=torch.bool), LocalPosterior(1.0, 1.0), 16)
        assert independent.valid and independent.notes == ()
        for t in range(1, 20):
            trace[:, t] = 0.9 * trace[:, t - 1] + (1 - 0.9**2) ** 0.5 * trace[:, t]
        slow = reader.read(trace, torch.ones(4, dtype=torch.bool), LocalPosterior(1.0, 1.0), 16)
        assert not slow.valid or "chains of 20 readings are short for their memory" in slow.notes[0]


def test_few_readings_are_not_valid_and_say_why() -> None:
    inf = tiny(mlp(), regression(16), num_draws=2)
    assert not inf.valid and "2 readings of 4 chains are too few" in inf.reasons
    none = tiny(mlp(), regression(16), num_draws=1)
    assert not none.valid and none.matrix.numel() == 0 and "NOT VALID" in str(none)


def test_a_sharp_bend_shortens_the_step() -> None:
    """A quartic far steeper away from w* than its curvature there says."""

    def quartic(module: nn.Module, batch: Any) -> Tensor:
        return squares(module, batch) + 1e4 * (module(batch[0]) - batch[1]).square().square().mean(dim=1)

    net = nn.Linear(3, 1, bias=False)
    nn.init.ones_(net.weight)
    x = torch.randn(32, 3, generator=gen(0))
    inf = tiny(net, TensorDataset(x, x.sum(dim=1, keepdim=True)), None, quartic, localization=1.0)
    assert inf.num_chains == 4 and bool(torch.isfinite(inf.matrix).all())


# ------------------------------------------------------------------------------------------------ what is left alone


def state_of_generators() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


def test_module_and_generators_are_unchanged_bit_for_bit() -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)))
    module.train()
    module[0].weight.grad = torch.ones_like(module[0].weight)
    before, generators = copy.deepcopy(module.state_dict()), state_of_generators()
    tiny(module, regression(24))
    assert state_of_generators() == generators
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert module.training and module[1].training and all(p.requires_grad for p in module.parameters())
    assert torch.equal(module[0].weight.grad, torch.ones_like(module[0].weight)) and module[3].weight.grad is None


def test_weights_of_a_checkpoint_in_place_of_the_modules_own() -> None:
    module, other = mlp(), mlp()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    given = tiny(module, regression(16), weights={"state_dict": other.state_dict()})
    assert same(given, tiny(other, regression(16)))


# ------------------------------------------------------------------------------------------------ awkward data


def test_a_sample_with_a_nan_loss_is_left_out_by_name() -> None:
    data = regression(24)
    query = TensorDataset(*(t.clone() for t in data[:5]))
    query.tensors[1][2] = torch.nan
    inf = tiny(mlp(), data, query)
    assert inf.query_index.tolist() == [0, 1, 3, 4] and bool(torch.isfinite(inf.matrix).all()) and inf.valid
    assert [(d.kind, d.index) for d in inf.dropped] == [("query", 2)]
    assert inf.dropped[0].reason == "its loss is not finite at the current weights"
    plain = tiny(mlp(), data, TensorDataset(*data[:5]))
    torch.testing.assert_close(inf.matrix, plain.matrix[[0, 1, 3, 4]], rtol=1e-5, atol=1e-12)


class Skips(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        keep = batch[1] >= 0
        return functional.cross_entropy(self.net(batch[0][keep]), batch[1][keep]) if bool(keep.any()) else None


def test_a_sample_without_a_loss_is_left_out_by_name() -> None:
    x, y = classification((5,), classes=3, n=16).tensors
    y = y.clone()
    y[5] = -1
    inf = estimate_influence(seeded(Skips), TensorDataset(x, y), **TINY)
    assert inf.train_index.tolist() == [i for i in range(16) if i != 5]
    assert [(d.kind, d.index, d.reason) for d in inf.dropped] == [("train", 5, "the step gives no loss for it")]
    assert inf.train_group == tuple(str(int(c)) for i, c in enumerate(y) if i != 5)


def test_no_usable_query_is_said() -> None:
    data = regression(16)
    query = TensorDataset(data.tensors[0][:2], torch.full((2, 3), torch.nan))
    inf = tiny(mlp(), data, query)
    assert not inf.valid and inf.reasons == ("no sample has finite losses",) and len(inf.dropped) == 2
    assert inf.matrix.numel() == 0 and "no sample has finite losses" in str(inf)


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        return torch.full((5,), 0.1 * i) + 0.1 * torch.randn(5), torch.zeros(3)


def test_random_augmentation_is_noted() -> None:
    inf = tiny(mlp(), Augmented())
    assert len(inf.notes) == 1 and "random augmentation?" in inf.notes[0] and "[0, 1, 2]" in inf.notes[0]
    assert inf.valid and tiny(mlp(), regression(12)).notes == ()


# ------------------------------------------------------------------------------------------------ what is refused


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(5), torch.zeros(3))] * 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data": []}, "train_data.*empty"),
        ({"query_data": []}, "query_data.*empty"),
        ({"train_data": Stream()}, "train_data.*by number.*map-style"),
        ({"query_data": DataLoader(Stream(), 2)}, "query_data.*by number.*map-style"),
        ({"num_draws": 0}, "num_draws=0.*at least 1"),
        ({"num_chains": 0}, "num_chains=0.*at least 1"),
        ({"num_burnin_steps": -1}, "num_burnin_steps=-1"),
        ({"num_steps_bw_draws": 0}, "num_steps_bw_draws=0"),
        ({"localization": -1.0}, r"localization=-1\.0: must not be negative"),
        ({"localization": float("nan")}, "localization=nan"),
        ({"localization": 0.0}, r"localization=0\.0"),
        ({"nbeta": -2.0}, r"nbeta=-2\.0: must be positive"),
        ({"nbeta": 0.0}, r"nbeta=0\.0: must be positive"),
        ({"shrinkage": 0.9}, r"shrinkage=0\.9: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_samples": 0}, "num_samples=0: must be at least 1, or None"),
        ({"max_train": 0}, "max_train=0: must be at least 1"),
        ({"max_query": 0, "query_data": regression(4)}, "max_query=0: must be at least 1"),
        ({"method": "fast"}, "method='fast'"),
        ({"per_token": True}, "per_token=True: give query_data"),
        ({"per_token": True, "query_data": regression(4)}, r"per_token=True.*\[batch, tokens\]"),
        ({"group_fn": lambda sample: sample["label"]}, "group_fn failed on sample 0: TypeError|group_fn failed"),
        ({"loss_fn": None}, "loss_fn is None"),
        ({"loss_fn": lambda m, b: None}, "loss"),
        ({"loss_fn": lambda m, b: m(b[0]).sum() * torch.nan}, "nan: there is no minimum"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"train_data": regression(12), "query_data": None, "loss_fn": squares, **TINY}
    with pytest.raises(ValueError, match=message):
        estimate_influence(mlp(), **{**arguments, **changes})


def test_a_coupled_loss_is_refused() -> None:
    def contrastive(module: nn.Module, batch: Any) -> Tensor:
        z = module(batch[0])
        return functional.cross_entropy(z @ z.T, torch.arange(len(z)))

    with pytest.raises(CoupledLossError, match=r"loss_fn\(module, batch\) -> \[batch\]"):
        tiny(mlp(), regression(16), None, contrastive)


def by_class(module: nn.Module, batch: Any, reduction: str = "mean") -> Tensor:
    weight = torch.tensor([1.0, 4.0, 16.0])
    return functional.cross_entropy(module(batch[0]), batch[1], weight=weight, reduction=reduction)


@pytest.mark.parametrize(
    ("loss_fn", "changes", "said"),
    [
        (by_class, {}, True),  # all the data at once: its halves are compared
        (by_class, {"batch_size": 6}, True),
        (by_class, {"sampler": SGLD(lr=1e-4)}, True),
        (lambda m, b: by_class(m, b, "none"), {}, False),  # losses of single samples that have their weight
        (lambda m, b: by_class(m, b, "sum") / len(b[0]), {}, False),
        (lambda m, b: functional.cross_entropy(m(b[0]), b[1]), {}, False),
    ],
)
def test_a_weighted_mean_is_said_to_read_samples_without_their_weights(
    loss_fn: Any, changes: dict[str, Any], said: bool
) -> None:
    """The loss of a sample alone is the same for every weight of its class, its share of a batch's is not."""
    found = tiny(mlp(), classification([5], 3, 25), None, loss_fn, **changes)
    assert any("its loss alone, without its weight" in note for note in found.notes) is said


@pytest.mark.parametrize("group_fn", [lambda sample: sample[1], lambda sample: sample[1][None], lambda s: int(s[1])])
def test_a_label_is_a_group_as_the_sample_has_it(group_fn: Any) -> None:
    data = classification([5], 3, 25)
    found = tiny(mlp(), data, None, lambda m, b: functional.cross_entropy(m(b[0]), b[1]), group_fn=group_fn)
    assert found.groups == ("0", "1", "2") and found.train_group == tuple(str(int(y)) for y in data.tensors[1])


def test_a_list_of_samples_with_a_number_of_them() -> None:
    data = regression(16)
    inf = tiny(mlp(), [data[i] for i in range(16)], num_samples=1000)
    assert inf.num_samples == 1000 and inf.matrix.shape == (16, 16)


def test_shrinkage_is_noted() -> None:
    plain, shrunk = tiny(mlp(), regression(16)), tiny(mlp(), regression(16), shrinkage=1.5)
    assert shrunk.shrinkage == 1.5 and any("1.5" in note for note in shrunk.notes)
    torch.testing.assert_close(shrunk.matrix, plain.matrix * plain.correlation.abs().sqrt())


def test_reading_interval_is_a_multiple_of_four_and_grows_with_the_samples() -> None:
    found = [reading_interval(n, 64, 10**6) for n in (10, 1000, 10_000)]
    assert found == sorted(found) and all(k % 4 == 0 for k in found) and found[0] == 4


def test_a_weighted_sampler_is_refused_by_its_name() -> None:
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    loader = DataLoader(TensorDataset(x, y), 4, sampler=WeightedRandomSampler([1.0] * 20, 20))
    with pytest.raises(ValueError, match="without a sampler or a batch sampler of its own"):
        estimate_influence(nn.Linear(3, 1), loader, None, lambda m, b: (m(b[0]) - b[1]).square().mean())
