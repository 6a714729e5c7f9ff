"""Influence while a model trains: data that is not one dataset with numbers, and samples of another structure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, WeightedRandomSampler

from lightning_slt.sampling.probe import CoupledLossError
from tests.integration import models
from tests.integration.harness import (
    Scenario,
    steps_of,
)
from tests.integration.models import BATCH, Net, Plain, loaders, tensors
from tests.integration.probing import Contrastive, Counts, probing, still


class OneBatch(Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.count += 1


NOT_INDEXED: dict[str, Callable[[], dict[str, Any]]] = {
    "an iterable dataset": lambda: loaders(dataset=models.Stream()),
    "several loaders": lambda: {"train_dataloaders": [DataLoader(tensors(8), BATCH), DataLoader(tensors(8), BATCH)]},
    "a batch sampler of its own": lambda: {
        "train_dataloaders": DataLoader(tensors(8), batch_sampler=[[0, 1, 2, 3], [4, 5, 6, 7]])
    },
}


@pytest.mark.parametrize("data", NOT_INDEXED.values(), ids=NOT_INDEXED)
@pytest.mark.parametrize("probe", [True, 5])
def test_data_without_numbers_is_refused_before_training(
    data: Callable[[], dict[str, Any]], probe: Any, tmp_path: Path
) -> None:
    """Whatever ``on_failure`` says: else every firing would fail, and the learning coefficient with it."""
    monitor, batches = probing(probe, on_failure="warn", num_samples=24), OneBatch()
    with pytest.raises(
        MisconfigurationException, match=rf"SLTMonitor: probe={probe}: the training data .*probe=Dataset"
    ):
        Scenario(models.TwoStreams, data).run(tmp_path, monitor, batches)
    assert batches.count == 0


class Doubles(Plain):
    """Comes to its step with one more than the dataset has."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_data_without_numbers_and_a_dataset_to_look_at(precision: str, tmp_path: Path) -> None:
    """The samples come to the step as training's batches do: in its precision, through the module's hooks."""
    monitor = probing(tensors(9), query=tensors(3), num_samples=24, at_steps=[2])
    scenario = Scenario(
        lambda: Doubles(lr=0.0), lambda: loaders(dataset=models.Stream()), lambda: {"precision": precision}
    )
    trace = scenario.assert_undisturbed(tmp_path, monitor)
    (e,) = monitor.influences
    x, y = tensors(9).tensors
    with torch.no_grad():
        losses = cross_entropy(trace.module.net((x + 1).to(trace.module.net.weight.dtype)), y, reduction="none")
    torch.testing.assert_close(e.init_loss, losses.double(), rtol=1e-5, atol=1e-6)
    assert e.matrix.shape == (3, 9)


class Functions(Dataset[Any]):
    """Samples that only a collate function of their own puts together."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        sample = tensors()[index]
        return lambda: sample


def of_functions(samples: list[Any]) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*(sample() for sample in samples), strict=True)]


def losses_of_the_first(count: int, folder: Path) -> Tensor:
    """At the weights that every run here begins with."""
    monitor = probing(Subset(tensors(), range(count)), at_steps=[1])
    still().run(folder, monitor)
    return monitor.influences[0].init_loss


def test_a_dataset_is_collated_as_training_does_also_where_batches_are_replayed(tmp_path: Path) -> None:
    """Weighted sampling: batches that training saw; samples to look at are put together by the loader's function."""

    def weighted() -> dict[str, Any]:
        sampler = WeightedRandomSampler(torch.arange(8.0), 24, generator=torch.Generator().manual_seed(2))
        return {"train_dataloaders": DataLoader(Functions(), BATCH, sampler=sampler, collate_fn=of_functions)}

    monitor = probing(Functions(), at_steps=[1])
    Scenario(lambda: Plain(lr=0.0), weighted).run(tmp_path / "a", monitor)
    torch.testing.assert_close(monitor.influences[0].init_loss, losses_of_the_first(8, tmp_path / "b"))


class Pairs(Dataset[Any]):
    """What two loaders side by side give, sample by sample."""

    def __init__(self, make: Callable[[Any, Any], Any], data: Any = None) -> None:
        self.make, self.data = make, tensors() if data is None else data

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.make(self.data[index], self.data[index + 4])


def as_dict(a: Any, b: Any) -> dict[str, Any]:
    return {"a": a, "b": b}


def as_list(a: Any, b: Any) -> list[Any]:
    return [a, b]


def two_streams(make: Callable[[Any, Any], Any], lr: float = 0.1, **kwargs: Any) -> Scenario:
    def train() -> dict[str, Any]:
        return {"train_dataloaders": make(*(loaders(n, **kwargs)["train_dataloaders"] for n in (24, 12)))}

    return Scenario(lambda: models.TwoStreams(lr), train)


@pytest.mark.parametrize("make", [as_dict, pytest.param(as_list, marks=pytest.mark.slow)])
def test_samples_of_several_loaders_side_by_side(make: Callable[[Any, Any], Any], tmp_path: Path) -> None:
    """The loss of a sample is that of its parts, and training is the same."""
    monitor = probing(Pairs(make), query=Pairs(make))
    two_streams(make).assert_undisturbed(tmp_path / "a", monitor)
    assert steps_of(monitor) == [4, 8, 12] == [e.step for e in monitor.influences]
    at_start = probing(Pairs(make), at_steps=[1])
    two_streams(make, lr=0.0).run(tmp_path / "b", at_start)
    losses = losses_of_the_first(8, tmp_path / "c")
    torch.testing.assert_close(at_start.influences[0].init_loss, losses[:4] + losses[4:])


def test_several_loaders_collate_each_its_own_part(tmp_path: Path) -> None:
    monitor = probing(Pairs(as_dict, Functions()), at_steps=[1])
    two_streams(as_dict, lr=0.0, dataset=Functions(), collate_fn=of_functions).run(tmp_path / "a", monitor)
    losses = losses_of_the_first(8, tmp_path / "b")
    torch.testing.assert_close(monitor.influences[0].init_loss, losses[:4] + losses[4:])


@pytest.mark.parametrize("make", [as_dict, as_list])
@pytest.mark.parametrize("name", ["probe", "query"])
def test_samples_that_are_not_what_several_loaders_give_are_named(
    name: str, make: Callable[[Any, Any], Any], tmp_path: Path
) -> None:
    """Which argument, what its samples are, and what they should be; the learning coefficient is measured."""
    expected = {as_dict: r"\{'a': \[Tensor, Tensor\], 'b'", as_list: r"\[\[Tensor, Tensor\], \["}[make]
    message = rf"{name}: its samples give the step \[Tensor, Tensor\], and .* data is {expected}.*Give {name}=Dataset"
    samples: dict[str, Any] = {"probe": Pairs(make), name: tensors(6)}
    monitor = probing(**samples, on_failure="warn")
    with pytest.warns(UserWarning, match=f"influence is left out of this run.*{message}"):
        two_streams(make).run(tmp_path / "a", monitor)
    assert steps_of(monitor) == [4, 8, 12] and monitor.influences == []
    with pytest.raises(ValueError, match=message):
        two_streams(make).run(tmp_path / "b", probing(**samples))


def test_a_sample_that_lacks_its_label_is_named(tmp_path: Path) -> None:
    message = r"probe: its samples give the step \[Tensor\], and a batch of the training data is \[Tensor, Tensor\]"
    with pytest.raises(ValueError, match=message):
        Scenario(Net, loaders).run(tmp_path, probing(TensorDataset(tensors().tensors[0])))


class OfTwo(Net):
    def loss(self, batch: Any) -> Tensor:
        assert len(batch) == 2
        return super().loss(batch)


@pytest.mark.parametrize("measures", [["influence"], ["susceptibility"]])
def test_queries_that_have_more_than_the_step_takes_are_named(measures: list[str], tmp_path: Path) -> None:
    """The assertion of the step says nothing itself."""
    three = TensorDataset(*tensors(6).tensors, torch.arange(6))
    message = (
        r"query: its samples give the step \[Tensor, Tensor, Tensor\], and a batch of the training data is "
        r"\[Tensor, Tensor\]"
    )
    monitor = probing(query=three, measures=measures, on_failure="warn")
    with pytest.warns(UserWarning, match=message):
        Scenario(OfTwo, loaders).run(tmp_path, monitor)
    assert len(monitor.estimates) == 3 and not monitor.influences and not monitor.susceptibilities
    taken = probing(query=three, measures=measures)  # where the step passes over what it has no use for
    Scenario(Passes, loaders).run(tmp_path / "b", taken)
    assert len(taken.influences) + len(taken.susceptibilities) == 3


class Passes(Net):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch[:2])


def test_a_loss_that_couples_samples_is_no_fault_of_what_they_have_besides(tmp_path: Path) -> None:
    three = TensorDataset(*tensors(6).tensors, torch.arange(6))
    with pytest.raises(CoupledLossError, match="not defined for such a loss"):
        Scenario(Contrastive, loaders).run(tmp_path, probing(three))


def test_a_dataset_that_changes_between_reads_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = probing(6, at_steps=[1])
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        Scenario(Net, lambda: loaders(dataset=Counts())).run(tmp_path, monitor)
    assert "gives other training samples when read again" in monitor.influences[0].notes[0]
    (said,) = [r.getMessage() for r in caplog.records if ": influence " in r.getMessage()]
    assert said.startswith("SLTMonitor: step 1: influence is not valid: ")  # of few draws; why comes first
    assert " (of 6 training samples on 6 queries; the dataset gives other" in said


# ------------------------------------------------------------------------------------------------ how samples are shown
