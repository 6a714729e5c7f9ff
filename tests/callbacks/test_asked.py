"""What a monitor was asked for, as it tells monitors without names apart in a checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_slt.callbacks.asked import Asked
from lightning_slt.callbacks.schedule import Schedule
from lightning_slt.callbacks.susceptibilities import Measures
from lightning_slt.estimate import ChainSettings


def asked(restrict: Any = None, **settings: Any) -> Asked:
    return Asked(Schedule(every_n_train_steps=5), ChainSettings(**settings), Measures(None, False), restrict)


def test_a_key_has_what_was_asked_for_and_nothing_that_was_left_as_it_is() -> None:
    """So that a setting which a later version adds leaves the keys of the checkpoints of this one as they are."""
    assert asked().key()["settings"] == repr({})
    assert asked(num_draws=7, seed=3).key()["settings"] == repr({"num_draws": 7, "seed": 3})
    assert asked().key()["schedule"] == repr(Schedule(every_n_train_steps=5))


def test_a_key_has_the_weights_that_move() -> None:
    found = [asked(restrict).key()["restrict"] for restrict in (None, "a.*", ["a.*", "b"], [nn.Linear(2, 2), "b"])]
    assert found == [None, "a.*", ["a.*", "b"], ["Linear", "b"]]
