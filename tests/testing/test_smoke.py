"""The smoke test that a user's repository calls: what passes, with what notes, and what is in the way."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_slt.testing import SmokeReport, SmokeTestFailed, smoke_test
from lightning_slt.testing.trace import flatten, rng_state
from tests.integration import models
from tests.integration.models import BATCH, IN, Net, Plain, tensors
from tests.publish.helpers import make_estimate


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(tensors(), batch_size=BATCH, shuffle=True)


class Contrastive(Net):
    """Each sample is told from the others of its batch."""

    def loss(self, batch: Any) -> torch.Tensor:
        hidden = self.net(batch[0])
        return cross_entropy(hidden @ hidden.T, torch.arange(len(hidden)))


class Socket:
    """Refuses to be copied, and is of no known kind."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a connection cannot be copied")


class Typo(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.network(batch[0]).sum()


def loader(dataset: Any = None, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(tensors() if dataset is None else dataset, batch_size=BATCH, **kwargs)


def stream() -> DataLoader[Any]:
    return loader(models.Stream())


@pytest.mark.parametrize("data", [Data, loader], ids=["datamodule", "loader"])
def test_a_module_that_can_be_measured(
    data: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module, before = Net(), flatten(rng_state())
    report = smoke_test(module, data())
    assert report.notes == ()
    e = report.estimate
    assert (e.num_chains, e.num_draws, e.step, e.num_samples) == (1, 4, 1, 24)
    assert e.num_weights == 8 * IN + 8 + 16 + 8 * 2 + 2
    assert 0 < report.seconds < 60
    after = flatten(rng_state())
    assert all(torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items())
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_printed_as_one_line_and_its_notes() -> None:
    report = SmokeReport(make_estimate(num_weights=1130, num_samples=512, nbeta=82.07, method="batched"), (), 0.94)
    assert str(report) == "OK in 0.9 s: 1,130 weights, n = 512, nbeta = 82, batched chains. Notes: none."
    assert repr(report).startswith("SmokeReport(estimate=Estimate(mean=12")
    noted = SmokeReport(make_estimate(num_samples=None, nbeta=2.5), ("It is slow.", "It is coupled."), 0.94)
    assert str(noted).endswith("n = not known, nbeta = 2.5, sequential chains. Notes:\n- It is slow.\n- It is coupled.")


def test_generators_are_put_back_after_a_failure() -> None:
    module = models.RaisesInChain()
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state()  # noqa: NPY002
    with pytest.raises(SmokeTestFailed):
        smoke_test(module, loader())
    assert (random.getstate(), np.random.get_state()[2]) == before[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_arguments_of_the_trainer_and_the_monitor() -> None:
    report = smoke_test(Net(), loader(), restrict="net.4.*", nbeta=3.0, precision="64-true")
    assert (report.estimate.num_weights, report.estimate.nbeta) == (18, 3.0)


IN_THE_WAY: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any], str]] = {
    "manual optimisation": (models.Manual, loader, {}, r"Manual: Manual uses manual optimisation.*Give loss_fn"),
    "a step that draws its own batches": (models.TakesIterator, loader, {}, r"dataloader_iter.*Give loss_fn"),
    "a loss that is not finite": (models.NaNInChain, loader, {}, r"loss at the current weights is nan.*eval mode"),
    "a step without a loss": (models.AlwaysNone, loader, {}, r"returned None.*Give loss_fn"),
    "data without a length": (Plain, stream, {}, r"training data has no length.*num_samples=.*nbeta="),
    "one sample": (Plain, lambda: loader(tensors(1)), {}, r"num_samples=1.*at least 2"),
    "no data": (Plain, lambda: loader(TensorDataset(torch.empty(0, IN))), {}, "training data is empty"),
    "a restriction that matches nothing": (Plain, loader, {"restrict": "body.*"}, r"'body\.\*' matches no"),
    "a step that fails in chains only": (models.RaisesInChain, loader, {}, "the step failed inside a chain"),
    "a loss that couples samples": (Contrastive, loader, {"probe": True}, "couples the samples of a batch.*loss_fn"),
    "samples without numbers": (
        Plain, stream, {"probe": True, "num_samples": 24}, "cannot be asked for a sample by number.*probe=Dataset"
    ),
    "a mistake of its own": (Typo, loader, {}, "training itself fails, before anything is measured.*'network'"),
    "an argument out of range": (Plain, loader, {"nbeta": -1.0}, "nbeta=-1.0: must be positive"),
}  # fmt: skip


@pytest.mark.parametrize(("module", "data", "arguments", "message"), IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_what_is_in_the_way_is_said(
    module: Callable[[], Any], data: Callable[[], Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(SmokeTestFailed, match=message) as caught:
        smoke_test(module(), data(), **arguments)
    assert str(caught.value).startswith("SLTMonitor cannot measure ") and caught.value.problem in str(caught.value)


def test_manual_optimisation_with_a_loss() -> None:
    assert smoke_test(models.Manual(), loader(), loss_fn=models.loss_of_net).estimate.num_weights == 74


NOTED: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any], str]] = {
    "not copyable": (
        lambda: models.Holds(lambda _: Socket()),
        loader,
        {},
        r"the attribute Holds\.held blocks.*in place",
    ),
    "coupled loss": (Contrastive, loader, {}, r"probe=.*couples the samples of a batch"),
    "iterable data": (Plain, stream, {"num_samples": 24}, r"probe=.*cannot be asked for a sample by number"),
}


@pytest.mark.parametrize(("module", "data", "arguments", "note"), NOTED.values(), ids=NOTED)
def test_what_works_with_less_is_noted(
    module: Callable[[], Any], data: Callable[[], Any], arguments: dict[str, Any], note: str
) -> None:
    report = smoke_test(module(), data(), **arguments)
    assert len(report.notes) == 1
    assert re.search(note, report.notes[0])
    assert report.estimate.num_samples == 24


class GradientPenalty(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = batch[0].clone().requires_grad_()
        logits = self.net(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return cross_entropy(logits, batch[1]) + slope.square().mean()


def test_a_derivative_in_the_step_is_no_obstacle() -> None:
    assert smoke_test(GradientPenalty(), loader(), probe=True).notes == ()


def test_a_lock_is_no_obstacle() -> None:
    assert smoke_test(models.Holds(lambda _: threading.Lock()), loader()).notes == ()
