"""A step may keep state in Python: counters, lists, generators, graphs, frozen weights. The loss of a chain must not
depend on how often it was asked for, and what the step does beside must reach neither training nor its run."""

from __future__ import annotations

import threading
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from tests.integration.harness import Scenario, tiny_monitor
from tests.integration.models import BATCH, CLASSES, IN, Plain, loaders
from tests.integration.one_epoch import estimates


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


class Locked(Tally):
    """No copy can be made of a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class InLocked(InObject):
    def __init__(self) -> None:
        super().__init__()
        self.tally = Locked()


class NotToCopy(Tally):
    def __deepcopy__(self, _: Any) -> Any:
        raise RuntimeError("there is one of me")


class InPlace(InObject):
    def __init__(self) -> None:
        super().__init__()
        self.tally = NotToCopy()


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
        InLocked,
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


class InPlaceAlone(Plain):
    """Called in place, and keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = NotToCopy()


def test_what_a_step_keeps_and_cannot_be_put_back_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = {}
    for module in (InPlace, DrawsInPlace, InPlaceAlone, InLocked):
        caplog.clear()
        estimates(module, tmp_path)
        told[module] = sum("another one at each call" in record.getMessage() for record in caplog.records)
    assert told == {InPlace: 1, DrawsInPlace: 1, InPlaceAlone: 0, InLocked: 0}


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
