"""Which samples are looked at, and what is known of them before any loss."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.samples import Samples, choose_samples, default_group
from tests.sampling.helpers import gen


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_samples_in_nested_tensors_are_refused_with_what_can_be_done(layout: torch.layout) -> None:
    rows = [torch.randn(2 + k % 3, 4, generator=gen(k)) for k in range(12)]
    source = DatasetSource(
        rows, 4, lambda some: torch.nested.nested_tensor(some, layout=layout), None, lambda batch: batch, 0
    )
    with pytest.raises(ValueError, match=r"hold nested tensors.*collate function pads.*probe=None"):
        Samples.of(source, range(6))


class Augmented(Dataset[Any]):
    def __init__(self, noisy: bool) -> None:
        self.noisy = noisy

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        noise = torch.randn(5) if self.noisy and i != 2 else torch.zeros(5)
        return torch.full((5,), float(i)) + noise, torch.zeros(3)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_dataset_that_changes_between_two_readings_is_recognised(workers: int) -> None:
    def read(noisy: bool, count: int = 12) -> Samples:
        source = DatasetSource(Augmented(noisy), 4, None, None, lambda batch: batch, 0, workers)
        return Samples.of(source, range(count))

    assert read(True).changed == [0, 1, 3, 4, 5, 6, 7]
    assert read(False).changed == []
    assert read(True, 1).changed == [0]


def test_numbers_are_those_of_the_dataset() -> None:
    x = torch.arange(10.0)[:, None]
    source = DatasetSource(TensorDataset(x, x), 2, None, [7, 3, 5], lambda batch: batch, 0)
    samples = Samples.of(source, [0, 2])
    assert samples.index == [7, 5] and [float(b[0]) for b in samples.batches] == [7.0, 5.0]
    chosen = choose_samples(1000, 50, seed=1)
    assert chosen == sorted(set(chosen)) and len(chosen) == 50 and chosen != choose_samples(1000, 50, seed=2)
    assert choose_samples(1000, None, 0) == list(range(1000))


def test_a_few_of_a_thousand_million_samples_are_chosen_without_an_order_of_all() -> None:
    chosen = choose_samples(10**9, 1000, seed=1)
    assert chosen == sorted(set(chosen)) and len(chosen) == 1000 and chosen[0] >= 0 and chosen[-1] < 10**9
    assert chosen == choose_samples(10**9, 1000, seed=1) != choose_samples(10**9, 1000, seed=2)
    assert abs(sum(chosen) / len(chosen) / 10**9 - 0.5) < 4 / (12 * 1000) ** 0.5


@pytest.mark.parametrize(
    ("sample", "group"),
    [
        ((torch.zeros(2), np.int64(4)), "4"),
        ((torch.zeros(2), torch.tensor(1.5)), None),
        ((torch.zeros(2), torch.tensor([1, 2])), None),
        ((torch.zeros(2), "cat"), "cat"),
        ({"x": 1.0, "target": np.array(3)}, "3"),
        (UserDict({"input_ids": torch.zeros(4).long(), "labels": torch.tensor(2)}), "2"),
        (torch.zeros(3), None),
        ((torch.zeros(2), True), "True"),
    ],
)
def test_the_group_of_a_sample(sample: Any, group: Any) -> None:
    assert default_group(sample) == group
