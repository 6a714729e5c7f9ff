"""Susceptibilities as values of a logger and as files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_slt.callbacks.susceptibilities import keys_of
from lightning_slt.susceptibility_record import SusceptibilityEstimate, SusceptibilityRecord


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


def test_what_is_not_a_number_is_null_in_the_file_and_comes_back(tmp_path: Path) -> None:
    record, found = SusceptibilityRecord(tmp_path), of_groups("a")
    record.save(found.replace(step=3, nbeta=math.nan, localization=(math.nan,)))
    with np.load(record.path(3)) as arrays:
        plain = json.loads(str(arrays["plain"]), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (plain["nbeta"], plain["localization"], plain["seconds"], plain["epoch"]) == (None, [None], None, None)
    (read,) = record.read()
    assert all(math.isnan(value) for value in (read.nbeta, *read.localization, read.seconds))
    assert (read.step, read.epoch, read.num_samples, read.num_weights) == (3, None, 100, (3,))


def test_a_file_of_an_earlier_version_has_nan_and_is_read(tmp_path: Path) -> None:
    record = SusceptibilityRecord(tmp_path)
    record.save(of_groups("a"))
    with np.load(record.path(None)) as arrays:
        written = dict(arrays)
    written["plain"] = np.array(str(written["plain"]).replace('"seconds": null', '"seconds": NaN'))
    np.savez(record.path(None), **written)
    (read,) = record.read()
    assert math.isnan(read.seconds) and read.nbeta == 1.0
