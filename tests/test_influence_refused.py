"""Influence in one call: what is left alone, samples that have none, and what is refused and how."""

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
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_slt import SGLD, estimate_influence
from lightning_slt.sampling.probe import CoupledLossError
from tests.influences import TINY, functional, same, squares, tiny
from tests.sampling.helpers import classification, mlp, regression, seeded

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


class Named(Dataset[Any]):
    """A regression whose samples are dicts."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        return {"x": torch.full((5,), 0.1 * i), "y": torch.zeros(3)}


def by_name(module: nn.Module, batch: Any) -> Tensor:
    return squares(module, (batch["x"], batch["y"]))


@pytest.mark.parametrize(
    ("changes", "ours", "expected", "own"),
    [
        ({"query_data": Named()}, "{'x': Tensor, 'y': Tensor}", "[Tensor, Tensor]", "KeyError: 0"),
        (
            {"train_data": Named(), "query_data": regression(4), "loss_fn": by_name},
            "[Tensor, Tensor]",
            "{'x': Tensor, 'y': Tensor}",
            "TypeError: list indices",
        ),
        ({"query_data": TensorDataset(torch.zeros(4, 5))}, "[Tensor]", "[Tensor, Tensor]", "IndexError: "),
    ],
    ids=["a dict for a pair", "a pair for a dict", "without targets"],
)
def test_queries_of_another_structure_are_named(changes: dict[str, Any], ours: str, expected: str, own: str) -> None:
    """With what the loss itself raises on them."""
    arguments: dict[str, Any] = {"train_data": regression(12), "loss_fn": squares, **TINY, **changes}
    with pytest.raises(ValueError) as caught:
        estimate_influence(mlp(), **arguments)
    said = str(caught.value)
    assert said.startswith(
        f"query_data: its samples give the step {ours}, and a batch of the training data is {expected}."
    )
    assert "Give query_data=Dataset" in said and own in said


@pytest.mark.parametrize(
    ("query", "said", "own"),
    [
        pytest.param(
            TensorDataset(torch.zeros(4, 6), torch.zeros(4, 3)),
            "batch[0] of its samples is float32 [batch, 6], and of a batch of the training data float32 [batch, 5]",
            "RuntimeError: mat1 and mat2",
            id="sizes",
        ),
        pytest.param(
            TensorDataset(torch.zeros(4, 5), torch.zeros(4, 2)),
            "batch[1] of its samples is float32 [batch, 2], and of a batch of the training data float32 [batch, 3]",
            "RuntimeError: The size of tensor",
            id="of targets",
        ),
        pytest.param(
            TensorDataset(torch.zeros(4, 5).long(), torch.zeros(4, 3)),
            "batch[0] of its samples is int64 [batch, 5], and of a batch of the training data float32 [batch, 5]",
            "RuntimeError: ",
            id="types",
        ),
    ],
)
def test_queries_of_other_tensors_are_named(query: TensorDataset, said: str, own: str) -> None:
    with pytest.raises(ValueError) as caught:
        tiny(mlp(), regression(12), query)
    message = str(caught.value)
    assert message.startswith(f"query_data: {said}. Give query_data=Dataset with samples like those of training")
    assert own in message


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("full"), TypeError("of another kind")])
def test_an_error_that_no_size_explains_stays_as_it_is(error: Exception) -> None:
    def failing(module: nn.Module, batch: Any) -> Tensor:
        if batch[0].shape[1] == 6:
            raise error
        return squares(module, batch)

    with pytest.raises(type(error)) as caught:
        tiny(mlp(), regression(12), TensorDataset(torch.zeros(4, 6), torch.zeros(4, 3)), failing)
    assert caught.value is error


def test_queries_of_which_the_loss_takes_what_it_needs_may_have_more() -> None:
    x, y = regression(4).tensors
    inf = tiny(mlp(), regression(12), TensorDataset(x, y, torch.arange(4)))
    assert torch.equal(inf.matrix, tiny(mlp(), regression(12), regression(4)).matrix)


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


def test_a_weighted_sampler_is_refused_by_its_name() -> None:
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    loader = DataLoader(TensorDataset(x, y), 4, sampler=WeightedRandomSampler([1.0] * 20, 20))
    with pytest.raises(ValueError, match="without a sampler or a batch sampler of its own"):
        estimate_influence(nn.Linear(3, 1), loader, None, lambda m, b: (m(b[0]) - b[1]).square().mean())
