"""The public comparison: it passes where training is the same, and says what differed, and why, where it is not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_slt import SGLD, SLTMonitor, TransitionMonitor
from lightning_slt.testing import TrainingDisturbed, assert_training_undisturbed, trace
from tests.integration.models import BATCH, CLASSES, Net, loaders, tensors, with_validation


def trainer_with(*callbacks: Callable[[], Callback], **kwargs: Any) -> Callable[[], Trainer]:
    settings = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return lambda: Trainer(callbacks=[make() for make in callbacks], **{**settings, **kwargs})


def small(**changes: Any) -> SLTMonitor:
    chains = {"num_chains": 2, "num_draws": 4, "num_burnin_steps": 2, "num_steps_bw_draws": 1}
    return SLTMonitor(**{"at_steps": [2, 4], "sampler": SGLD(lr=1e-4), "on_failure": "raise", **chains, **changes})


def test_a_trainer_without_a_monitor_gets_the_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = random.getstate(), torch.get_rng_state()
    trace = assert_training_undisturbed(trainer_with(), Net, with_validation)
    (monitor,) = [c for c in trace.trainer.callbacks if isinstance(c, SLTMonitor)]
    assert [e.step for e in monitor.estimates] == [1, 3, 6]
    assert trace.num_batches == 6 and trace.rows
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert list(tmp_path.iterdir()) == []  # the checkpoint and the record went to the temporary folder


def test_the_trainers_own_callbacks_are_what_is_tested() -> None:
    trace = assert_training_undisturbed(trainer_with(small, TransitionMonitor), Net, loaders)
    (monitor,) = [c for c in trace.trainer.callbacks if isinstance(c, SLTMonitor)]
    assert [e.step for e in monitor.estimates] == [2, 4]


@pytest.mark.parametrize("data", [None, lambda: DataLoader(tensors(), batch_size=BATCH)], ids=["its own", "a loader"])
def test_data_of_the_module_or_a_loader(data: Optional[Callable[[], Any]]) -> None:
    class WithData(Net):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(tensors(), batch_size=BATCH, shuffle=True)

    assert assert_training_undisturbed(trainer_with(), WithData, data).num_batches == 6


CALLS: list[int] = []


class CountsGlobally(Net):
    """Its step moves a counter that its copies share, and the loss depends on it."""

    def loss(self, batch: Any) -> torch.Tensor:
        CALLS.append(1)
        return super().loss(batch) * (1 + len(CALLS) / 100)


def drawing(monitor: SLTMonitor) -> SLTMonitor:
    """A monitor that draws a random number at each firing and does not put it back."""
    fire = monitor._fire
    monitor._fire = lambda *args, **kwargs: (fire(*args, **kwargs), torch.rand(1))  # type: ignore[assignment, return-value]
    return monitor


def test_a_random_number_too_many_is_found() -> None:
    with pytest.raises(
        TrainingDisturbed, match=r"after batch \d+: rng/torch differs.*Likely.*global generator"
    ) as caught:
        assert_training_undisturbed(trainer_with(lambda: drawing(small())), Net, loaders)
    assert caught.value.difference.name == "rng/torch"


def test_state_that_copies_share_is_found_and_the_way_out_is_named() -> None:
    def make() -> CountsGlobally:
        CALLS.clear()
        return CountsGlobally()

    with pytest.raises(TrainingDisturbed, match=r"grad/net.0.weight differs.*a global.*loss_fn=") as caught:
        assert_training_undisturbed(trainer_with(), make, loaders)
    assert caught.value.difference.moment == "before optimiser step 1"


def test_training_that_does_not_repeat_is_no_fault_of_the_callbacks() -> None:
    CALLS.clear()  # and not at each run
    with pytest.raises(TrainingDisturbed, match=r"not reproducible by itself.*make_module"):
        assert_training_undisturbed(trainer_with(), CountsGlobally, loaders)


def test_the_same_object_twice() -> None:
    module, trainer = Net(), trainer_with()()
    with pytest.raises(ValueError, match="make_module gave the same object twice"):
        assert_training_undisturbed(trainer_with(), lambda: module, loaders)
    with pytest.raises(ValueError, match="make_trainer gave the same object twice"):
        assert_training_undisturbed(lambda: trainer, Net, loaders)


def test_nothing_to_compare() -> None:
    with pytest.raises(AssertionError, match="no batch was trained on"):
        assert_training_undisturbed(trainer_with(), Net, lambda: loaders(dataset=tensors(0), shuffle=False))
    with pytest.raises(AssertionError, match=r"nothing was measured in 6 batches.*at_steps"):
        assert_training_undisturbed(trainer_with(lambda: small(at_steps=[100])), Net, loaders)


class Adversarial(Net):
    """Its step calls ``backward()`` to find the inputs that it is then trained on."""

    def loss(self, batch: Any) -> torch.Tensor:
        x = batch[0].clone().requires_grad_()
        super().loss((x, batch[1])).backward()
        assert x.grad is not None
        return super().loss((batch[0] + 0.1 * x.grad.sign(), batch[1]))

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


class AdversarialInPlace(Adversarial):
    """As it cannot be copied, its gradients are those of training."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not this one")


class GradientPenalty(Net):
    def loss(self, batch: Any) -> torch.Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return super().loss(batch) + slope.square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


@pytest.mark.parametrize("module", [Adversarial, AdversarialInPlace, GradientPenalty])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_differentiates(module: type[Net], accumulate: int) -> None:
    firing = {"at_steps": [1, 2]}
    trainer = trainer_with(lambda: small(**firing), accumulate_grad_batches=accumulate)
    trace = assert_training_undisturbed(trainer, module, loaders)
    (monitor,) = [c for c in trace.trainer.callbacks if isinstance(c, SLTMonitor)]
    assert [e.step for e in monitor.estimates] == [1, 2]


class Monitored(Net):
    def configure_callbacks(self) -> list[Callback]:
        return [small()]


def test_a_monitor_of_the_modules_own_cannot_be_taken_off() -> None:
    with pytest.raises(ValueError, match=r"configure_callbacks.*SLTMonitor"):
        assert_training_undisturbed(trainer_with(), Monitored, loaders)


class Looks(LightningModule):
    """Gradients of its embedding are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.Embedding(10, 4, sparse=True), nn.Linear(4, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows = batch[0].values() if batch[0].is_nested else batch[0]
        places = (3 * rows[:, 0]).long().clamp(-4, 4) + 5
        return self.net(self.table(places)).logsumexp(dim=1).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def to_ragged(samples: list[Any]) -> Any:
    rows = [x.repeat(1 + i % 2, 1) for i, (x, _) in enumerate(samples)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged), torch.stack([y for _, y in samples])


@pytest.mark.parametrize("collate", [None, to_ragged], ids=["dense", "ragged"])
def test_sparse_gradients_and_ragged_batches_are_compared(collate: Optional[Callable[[Any], Any]]) -> None:
    data = lambda: loaders(collate_fn=collate)["train_dataloaders"]  # noqa: E731
    assert assert_training_undisturbed(trainer_with(small), Looks, data).num_batches == 6


def test_a_sparse_or_ragged_difference_is_found() -> None:
    dense = torch.eye(3)
    assert trace._same_parts(dense.to_sparse(), dense.to_sparse())
    assert not trace._same_parts(dense.to_sparse(), (2 * dense).to_sparse())
    ragged = to_ragged([(torch.ones(1, 2), torch.zeros(())), (torch.ones(1, 2), torch.zeros(()))])[0]
    assert trace._same_parts(ragged, ragged.detach().clone())
    assert not trace._same_parts(ragged, 2 * ragged)
