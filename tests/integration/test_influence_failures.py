"""Influence while a model trains: samples that have none cost nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_slt.sampling.probe import CoupledLossError
from tests.integration import models
from tests.integration.harness import (
    Scenario,
    SLTMonitor,
)
from tests.integration.models import Net, loaders, tensors
from tests.integration.probing import Contrastive, probing, refuses


def test_a_sample_without_a_finite_loss_is_dropped_and_named_and_training_goes_on(tmp_path: Path) -> None:
    x, y = tensors(6).tensors
    x = x.clone()
    x[4, 0] = float("nan")
    monitor = probing(TensorDataset(x, y), query=tensors(2))
    with pytest.warns(
        UserWarning, match=r"1 samples are left out of influence: train 4 \(its loss is not fin"
    ) as caught:
        trace = Scenario(Net, loaders).run(tmp_path, monitor)
    assert trace.num_batches == 12 and len([w for w in caught if "left out" in str(w.message)]) == 1
    for e in monitor.influences:
        assert e.train_index.tolist() == [0, 1, 2, 3, 5] and e.matrix.shape[-1] == 5
        assert [(d.kind, d.index) for d in e.dropped] == [("train", 4)]
        assert e.mean_loss.isfinite().all()
        assert not [reason for reason in e.reasons if "finite" in reason]
    assert monitor.influences[-1].matrix.isfinite().all()
    assert all(e.valid or e.reasons for e in monitor.estimates) and len(monitor.estimates) == 3


def test_no_sample_with_a_finite_loss(tmp_path: Path) -> None:
    x, y = tensors(4).tensors
    monitor = probing(TensorDataset(torch.full_like(x, float("nan")), y), at_steps=[1])
    with pytest.warns(UserWarning, match="4 samples are left out"):
        Scenario(Net, loaders).run(tmp_path, monitor)
    (e,) = monitor.influences
    assert not e.valid and "no sample has finite losses" in e.reasons and len(e.train_index) == 0
    assert monitor.estimates[0].trace.isfinite().all()


def test_a_loss_that_couples_samples_leaves_influence_out_and_nothing_else(tmp_path: Path) -> None:
    """Said once; and the learning coefficient is that of a monitor without samples, number by number."""
    monitor, plain = probing(on_failure="warn"), probing(probe=None)
    with pytest.warns(UserWarning, match="influence is left out of this run.*couples the samples.*loss_fn") as caught:
        trace = Scenario(Contrastive, loaders).assert_undisturbed(tmp_path / "a", monitor)
    Scenario(Contrastive, loaders).run(tmp_path / "b", plain)
    assert trace.num_batches == 12
    assert monitor.influences == [] and len(monitor.estimates) == 3
    assert [e.mean for e in monitor.estimates] == [e.mean for e in plain.estimates]
    assert len([w for w in caught if "couples" in str(w.message)]) == 1


def test_a_loss_that_couples_samples_raises_where_failures_raise(tmp_path: Path) -> None:
    with pytest.raises(CoupledLossError, match="not defined for such a loss"):
        Scenario(Contrastive, loaders).run(tmp_path, probing(on_failure="raise"))


class Weighs(Net):
    """Classes count by weights whose sum divides."""

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1], weight=torch.linspace(1.0, 9.0, models.CLASSES))


@pytest.mark.parametrize("changes", [{}, {"batch_size": models.SAMPLES}], ids=["minibatches", "all the data at once"])
def test_a_weighted_mean_is_said_to_read_samples_without_their_weights(changes: Any, tmp_path: Path) -> None:
    weighted, plain = probing(**changes), probing(**changes)
    Scenario(Weighs, loaders).run(tmp_path / "a", weighted)
    Scenario(Net, loaders).run(tmp_path / "b", plain)
    assert all("its loss alone, without its weight" in found.notes[-1] for found in weighted.influences)
    assert len(weighted.influences) == 3 and not any("alone" in note for i in plain.influences for note in i.notes)


def test_a_group_fn_that_fails_names_the_sample(tmp_path: Path) -> None:
    monitor = probing(group_fn=refuses, on_failure="warn")
    with pytest.warns(UserWarning, match="group_fn failed on sample 0: KeyError: 'no such field'"):
        trace = Scenario(Net, loaders).run(tmp_path, monitor)
    assert trace.num_batches == 12 and monitor.influences == [] and len(monitor.estimates) == 3
    with pytest.raises(ValueError, match="group_fn failed on sample 0"):
        Scenario(Net, loaders).run(tmp_path, probing(group_fn=refuses))


def test_fast_dev_run_makes_a_failure_a_failure(tmp_path: Path) -> None:
    with pytest.raises(CoupledLossError):
        Scenario(Contrastive, loaders, lambda: {"fast_dev_run": True}).run(tmp_path, SLTMonitor(probe=True))
