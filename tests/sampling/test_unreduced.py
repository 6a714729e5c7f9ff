"""A mean that is left out: the numbers of samples alone, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from lightning_slt.sampling.unreduced import Unreduced
from tests.sampling.helpers import gen

OUTPUT, CLASSES = torch.randn(6, 4, generator=gen(0)), torch.tensor([0, 3, 1, 1, 2, 0])
VALUES = torch.rand(6, 4, generator=gen(1))


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (functional.cross_entropy, CLASSES),
        (functional.cross_entropy, VALUES.softmax(1)),
        (functional.mse_loss, VALUES),
        (functional.l1_loss, VALUES),
        (functional.smooth_l1_loss, VALUES),
        (functional.huber_loss, VALUES),
        (functional.binary_cross_entropy_with_logits, VALUES),
    ],
)
def test_a_step_with_two_terms_gives_each_sample_what_it_has_alone(loss: Any, target: torch.Tensor) -> None:
    def step(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return 0.5 * loss(output, wanted) + 0.1 * functional.mse_loss(output, output.detach() ** 2)

    alone = torch.stack([step(OUTPUT[k : k + 1], target[k : k + 1]) for k in range(6)])
    with Unreduced(6):
        found = step(OUTPUT, target)
    torch.testing.assert_close(found, alone)
    assert step(OUTPUT, target).ndim == 0  # and only inside


def test_tokens_that_are_ignored_are_no_part_of_the_mean_of_their_text() -> None:
    logits, tokens = torch.randn(3, 5, 7, generator=gen(2)), torch.randint(0, 7, (3, 5), generator=gen(3))
    tokens[0, 2:] = -100
    alone = torch.stack([functional.cross_entropy(logits[k], tokens[k]) for k in range(3)])
    with Unreduced(3):
        torch.testing.assert_close(functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()), alone)
        torch.testing.assert_close(functional.cross_entropy(logits.mT, tokens), alone)


def test_sums_weighted_classes_and_rows_that_do_not_divide_stay_as_they_are() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with Unreduced(4):
        assert functional.cross_entropy(OUTPUT, CLASSES).ndim == 0
    with Unreduced(6):
        assert functional.cross_entropy(OUTPUT, CLASSES, weight=weight).ndim == 0
        assert functional.mse_loss(OUTPUT, VALUES, reduction="sum").ndim == 0
