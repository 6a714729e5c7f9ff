"""A step may keep state in Python: counters, lists, generators, graphs, frozen weights. The loss of a chain must not
depend on how often it was asked for, and what the step does beside must reach neither training nor its run."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset, default_collate

from lightning_slt import SGLD, Estimate
from tests.integration.harness import Scenario, quiet_trainer, seed_everything, steps_of, tiny_monitor
from tests.integration.models import BATCH, CLASSES, IN, Plain, loaders, tensors


def estimates(make: Callable[[], Any], tmp_path: Path, data: Any = None, **settings: Any) -> list[Estimate]:
    """Of one epoch of six steps, fired at after the third and the sixth."""
    seed_everything()
    monitor = tiny_monitor(**{"every_n_train_steps": 3, **settings})
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor])
    trainer.fit(make(), **(data or loaders(6 * BATCH)))
    assert steps_of(monitor) == [3, 6]
    return list(monitor.estimates)


class Counts(Plain):
    """The further the run, the more its weights cost: as a temperature that is annealed."""

    def count(self) -> Any:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        share = self.count() / 100
        return cross_entropy(self.net(batch[0]), batch[1]) + share * self.net.weight.square().sum()


class InBuffer(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def count(self) -> Any:
        self.n += 1
        return self.n


class InNumber(Counts):
    n = 0

    def count(self) -> Any:
        self.n += 1
        return self.n


class InTensor(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.n = torch.zeros(())

    def count(self) -> Any:
        self.n += 1
        return self.n


class InArray(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.n = np.zeros(1, dtype=np.float32)

    def count(self) -> Any:
        self.n += 1
        return float(self.n[0])


class InList(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def count(self) -> Any:
        self.outputs.append(self.net.weight.detach().sum())
        return len(self.outputs)


class InNested(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.log_of: dict[str, Any] = {"steps": []}

    def count(self) -> Any:
        self.log_of["steps"].append(1)
        return len(self.log_of["steps"])


class Tally:
    def __init__(self) -> None:
        self.n = 0


class InObject(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.tally: Any = Tally()

    def count(self) -> Any:
        self.tally.n += 1
        return self.tally.n


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class InSlots(InObject):
    def __init__(self) -> None:
        super().__init__()
        self.tally = Slotted()


class InBytes(InNested):
    def __init__(self) -> None:
        super().__init__()
        self.log_of = {"steps": bytearray()}


class InNumbers(InNested):
    """An array of Python's own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_of = {"steps": array("i")}


class Anneal:
    """Weighs a loss by how often it was called."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> int:
        self.n += 1
        return self.n


class InCallable(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.anneal = Anneal()

    def count(self) -> Any:
        return self.anneal()


class InChild(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Identity()
        self.child.n = 0  # type: ignore[assignment]

    def count(self) -> Any:
        self.child.n += 1  # type: ignore[operator, assignment]
        return self.child.n


class InHidden(Counts):
    """As a teacher that shall not be in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.LayerNorm(1)]
        self.hidden[0].requires_grad_(False).weight.zero_()

    def count(self) -> Any:
        self.hidden[0].weight.data.add_(1)
        return self.hidden[0].weight.sum()


class InData(InTensor):
    def count(self) -> Any:
        self.n.data.add_(1)
        return self.n


@pytest.mark.parametrize("method", ["sequential", "batched"])
@pytest.mark.parametrize(
    "module",
    [
        InHidden,
        InData,
        InNumber,
        InTensor,
        InArray,
        InList,
        InNested,
        InObject,
        InSlots,
        InBytes,
        InNumbers,
        InCallable,
        InChild,
    ],
)
def test_a_count_is_put_back_wherever_it_is_kept(module: type[Counts], method: str, tmp_path: Path) -> None:
    counted = estimates(module, tmp_path, method=method)
    # buffers have no path through vmap, and are put back as ever; the paths agree to rounding
    expected = estimates(InBuffer, tmp_path, method="sequential")
    for ours, theirs in zip(counted, expected, strict=True):
        assert torch.allclose(ours.trace, theirs.trace, rtol=1e-3, atol=1e-3)
        assert ours.init_loss == pytest.approx(theirs.init_loss, rel=1e-5)


class Draws(Plain):
    """Noise from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.from_numpy(self.rng.normal(size=(len(batch[0]), IN)).astype(np.float32))
        return cross_entropy(self.net(batch[0] + noise), batch[1])


class DrawsInPlace(Draws):
    """Called in place: what is bound to it cannot be copied with it."""

    def __init__(self) -> None:
        super().__init__()
        self.score = lambda x: self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.from_numpy(self.rng.normal(size=(len(batch[0]), IN)).astype(np.float32))
        return cross_entropy(self.score(batch[0] + noise), batch[1])


@pytest.mark.parametrize("module", [Draws, DrawsInPlace])
def test_a_generator_of_the_module_s_own_is_not_moved_on(module: type[Plain], tmp_path: Path) -> None:
    monitor = tiny_monitor()
    Scenario(module, loaders).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 3


class Caches(Plain):
    """Builds a table once."""

    built = 0

    def __init__(self) -> None:
        super().__init__()
        self.table: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.table is None:
            type(self).built += 1
            self.table = torch.linspace(0.0, 1.0, CLASSES)
        return cross_entropy(self.net(batch[0]) + self.table, batch[1])


def test_a_cache_is_not_built_at_every_call(tmp_path: Path) -> None:
    Caches.built = 0
    found = estimates(Caches, tmp_path)
    assert all(bool(torch.isfinite(e.trace).all()) for e in found)
    assert Caches.built == 1  # by the first step of training; copies have it


class Graph:
    """A batch that is no collection, as of PyTorch Geometric."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: Any, **_: Any) -> Graph:
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


def to_graph(samples: list[Any]) -> Graph:
    return Graph(*default_collate(samples))


class OnGraphs(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(torch.tanh(1.5 * batch.x) + 1), batch.y)


class ChangesGraphs(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch.x = torch.tanh(1.5 * batch.x) + 1
        return cross_entropy(self.net(batch.x), batch.y)


def test_a_step_that_changes_an_object_batch_gets_a_copy_each_time(tmp_path: Path) -> None:
    changed, pure = (
        estimates(module, tmp_path, loaders(6 * BATCH, collate_fn=to_graph)) for module in (ChangesGraphs, OnGraphs)
    )
    for ours, theirs in zip(changed, pure, strict=True):
        assert torch.equal(ours.trace, theirs.trace)


class Momentum(Plain):
    """A frozen second network follows the first one, as in MoCo and BYOL."""

    through_data = False

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(IN, CLASSES)
        self.key.requires_grad_(False)

    @torch.no_grad()
    def follow(self) -> None:
        for query, key in zip(self.net.parameters(), self.key.parameters(), strict=True):
            if self.through_data:
                key.data.mul_(0.5).add_(query.data, alpha=0.5)
            else:
                key.mul_(0.5).add_(query, alpha=0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.follow()
        logits = self.net(batch[0])
        return cross_entropy(logits, batch[1]) + (logits - self.key(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)


class MomentumThroughData(Momentum):
    through_data = True


def test_frozen_weights_written_through_data_are_put_back(tmp_path: Path) -> None:
    ours, theirs = (estimates(module, tmp_path, method="sequential") for module in (MomentumThroughData, Momentum))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.trace, b.trace)


class BackwardHooked(Plain):
    """Its hook of the backward pass keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        seen = self.seen
        self.net.register_full_backward_hook(lambda module, gi, go: seen.append(go[0].norm()))

    def on_train_epoch_end(self) -> None:
        self.log("gradients", torch.stack(self.seen).mean())


def test_a_backward_hook_does_not_hear_the_chains(tmp_path: Path) -> None:
    monitor = tiny_monitor()
    Scenario(BackwardHooked, loaders).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 3


WATCHED: list[bool] = []


class Watched(Plain):
    """Writes down at each call, where chains write as well, whether autograd looks for anomalies."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        WATCHED.append(torch.is_anomaly_enabled())
        return super().training_step(batch, batch_idx)


def test_anomalies_are_looked_for_in_training_alone(tmp_path: Path) -> None:
    WATCHED.clear()
    monitor = tiny_monitor(every_n_train_steps=3, method="sequential")
    trainer = quiet_trainer(tmp_path, max_epochs=1, detect_anomaly=True, callbacks=[monitor])
    trainer.fit(Watched(), **loaders(6 * BATCH))
    assert sum(WATCHED) == 6 and len(WATCHED) > 30


class Profiled(Plain):
    """Times a part of its step; it costs twice where the profiler is another one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.trainer.profiler.profile("mine"):  # type: ignore[attr-defined]
            loss = super().training_step(batch, batch_idx)
        return loss * (1.0 if isinstance(self.trainer.profiler, SimpleProfiler) else 2.0)  # type: ignore[attr-defined]


def test_what_a_step_profiles_is_of_training_alone(tmp_path: Path) -> None:
    profiler, monitor = SimpleProfiler(tmp_path, "profile"), tiny_monitor(every_n_train_steps=3)
    seed_everything()
    trainer = quiet_trainer(tmp_path, max_epochs=1, profiler=profiler, callbacks=[monitor])
    trainer.fit(Profiled(), **loaders(6 * BATCH))
    assert len(profiler.recorded_durations["mine"]) == 6
    assert [e.init_loss for e in monitor.estimates] == [e.init_loss for e in estimates(Plain, tmp_path)]


class LogsToWandb(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        wandb.log({"loss": loss.item()})
        return loss


def test_what_a_step_sends_to_wandb_itself_is_of_training_alone(tmp_path: Path) -> None:
    run = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    try:
        estimates(LogsToWandb, tmp_path)
        assert run.step == 6
        wandb.log({"after": 1})
        assert run.step == 7
    finally:
        run.finish()


class Mines(Plain):
    """Returns None where no triplet is left, which depends on the weights."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if loss.item() > 3.0 else loss


def test_a_chain_whose_step_has_no_loss_any_more_has_diverged_and_the_firing_is_not_lost(tmp_path: Path) -> None:
    for estimate in estimates(Mines, tmp_path, sampler=SGLD(lr=0.5)):
        assert estimate.reasons == ("no chain stayed finite",)
        assert estimate.num_bad_chains == estimate.num_chains == 2


class Jitters(Subset[Any]):
    """A subset of the user's own, with noise of its own."""

    def __init__(self) -> None:
        super().__init__(tensors(24), list(range(24)))
        self.noise = torch.Generator().manual_seed(2)
        self.reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        x, y = super().__getitem__(index)
        return x + torch.randn(x.shape, generator=self.noise) + 0.01 * self.reads, y

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


class Masks:
    """A collate function that draws."""

    def __init__(self) -> None:
        self.noise = torch.Generator().manual_seed(4)

    def __call__(self, samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return x * (torch.rand(x.shape, generator=self.noise) > 0.3), y


@pytest.mark.parametrize("data", [lambda: loaders(dataset=Jitters()), lambda: loaders(collate_fn=Masks())])
def test_data_with_a_state_of_its_own_is_not_moved_on(data: Callable[[], Any], tmp_path: Path) -> None:
    monitor = tiny_monitor()
    Scenario(Plain, data).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 3


class WithBackbone(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(IN, IN)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def test_weights_that_thaw_later_are_measured_from_then_on(tmp_path: Path) -> None:
    monitor = tiny_monitor(every_n_epochs=1, restrict="backbone", on_failure="warn")
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[monitor, thaw])
    with pytest.warns(UserWarning, match=r"step 6 failed and is left out.*'backbone'.* is frozen"):
        trainer.fit(WithBackbone(), **loaders(6 * BATCH))
    assert steps_of(monitor) == [12, 18]


def test_weights_that_nothing_thaws_are_refused_at_the_start(tmp_path: Path) -> None:
    module = WithBackbone()
    module.backbone.requires_grad_(False)
    trainer = quiet_trainer(tmp_path, callbacks=[tiny_monitor(restrict="backbone")])
    with pytest.raises(MisconfigurationException, match=r"'backbone'.* is frozen"):
        trainer.fit(module, **loaders())
