"""Susceptibilities as values of a logger."""

from __future__ import annotations

import pytest
import torch

from lightning_slt.callbacks.susceptibilities import keys_of
from lightning_slt.susceptibility_record import SusceptibilityEstimate


def of_groups(*groups: str) -> SusceptibilityEstimate:
    """One component, whose susceptibility to group k is k + 1."""
    values = torch.arange(1, len(groups) + 1).double()[None]
    one = torch.ones(1).double()
    return SusceptibilityEstimate(
        ("head",), one, one, one[None], values, values, torch.arange(len(groups)), groups, values, 0.1 * values, one,
        1.0, (1.0,), (3,), 100, 4, 100, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "labels"),
    [
        (("cat", "dog 2"), ["group_cat", "group_dog_2"]),
        (("Cat", "cat"), ["group_cat_0", "group_cat_1"]),
        (("猫", "犬", "a"), ["group___0", "group___1", "group_a_2"]),
        (("a", "a se"), ["group_a_0", "group_a_se_1"]),
    ],
    ids=["plain", "case", "letters", "error"],
)
def test_every_group_has_a_key_of_its_own(groups: tuple[str, ...], labels: list[str]) -> None:
    keys = keys_of(of_groups(*groups), "slt")
    assert {k: v for k, v in keys.items() if "group_" in k} == {
        **{f"slt/susceptibility/head/{label}": k + 1.0 for k, label in enumerate(labels)},
        **{f"slt/susceptibility/head/{label}_se": pytest.approx(0.1 * (k + 1)) for k, label in enumerate(labels)},
    }
