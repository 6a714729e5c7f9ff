"""What a module keeps in its attributes is training's: chains neither change it nor read it away."""

from __future__ import annotations

import itertools
import multiprocessing
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_slt.sampling import belongings
from lightning_slt.sampling.belongings import contents_kept
from tests.integration.harness import Scenario, tiny_monitor
from tests.integration.models import CLASSES, IN, Plain, loaders, tensors


class Blocks:
    """Nothing that holds it can be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not this one")


class Tally:
    """An object of the user's, changed by every step."""

    def __init__(self) -> None:
        self.seen, self.losses = 0, [0.0]


class Bookkeeping(Plain):
    """Its loss depends on all that it writes down, and it cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.losses: list[Tensor] = []
        self.counts: dict[str, Any] = {"calls": 0, "recent": deque(maxlen=3)}
        self.tally = Tally()
        self.mean, self.array = torch.zeros(CLASSES), np.zeros(CLASSES)
        self.teachers = [torch.nn.Linear(IN, CLASSES).requires_grad_(False)]
        self.kept = torch.zeros(CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        self.mean.mul_(0.9).add_(logits.detach().mean(0))
        self.array += logits.detach().numpy().mean(0)
        self.counts["calls"] += 1
        self.counts["recent"].append(self.counts["calls"])
        self.tally.seen += 1
        written = len(self.losses) + sum(self.counts["recent"]) + self.tally.seen + len(self.tally.losses)
        self.teachers[0].weight.data.lerp_(self.net.weight.data, 0.1)
        self.kept.data.add_(logits.detach().mean(0))
        shift = self.mean + torch.from_numpy(self.array).float() + self.kept + self.teachers[0](batch[0])
        loss = torch.nn.functional.cross_entropy(logits - 0.1 * shift, batch[1]) * (1 + 0.01 * written)
        self.losses.append(loss.detach())
        self.tally.losses.append(loss.item())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean of the epoch", torch.stack(self.losses).mean())
        self.losses.clear()


def test_what_a_step_writes_down_is_training_s_where_it_is_called_in_place(tmp_path: Path) -> None:
    monitor = tiny_monitor()
    Scenario(Bookkeeping, loaders).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 3


@dataclass(frozen=True, slots=True)
class Frozen:
    number: int
    members: list[int]


class Later:
    __slots__ = ("first", "later")

    def __init__(self) -> None:
        self.first = [1]


def test_slots_and_bytes_are_put_back_in_the_same_objects() -> None:
    module = torch.nn.Linear(2, 2)
    frozen, later, ints, raw = Frozen(1, [1]), Later(), array("d", [1.0, 2.0]), bytearray(b"ab")
    module.held = [frozen, later, ints, raw]
    with contents_kept(module):
        object.__setattr__(frozen, "number", 2)
        frozen.members.append(2)
        later.first, later.later = [3], 1
        ints.append(3.0)
        ints[0] = 7.0
        raw[0] = 0
        raw += b"c"
    assert frozen == Frozen(1, [1]) and later.first == [1] and not hasattr(later, "later")
    assert ints == array("d", [1.0, 2.0]) and raw == b"ab"
    assert all(a is b for a, b in zip(module.held, [frozen, later, ints, raw], strict=True))


class Period(timedelta):
    """Its days and seconds may be read only."""


def test_what_an_object_shows_of_itself_is_not_put_back() -> None:
    module = torch.nn.Linear(2, 2)
    module.held = Period(seconds=900)
    with contents_kept(module):
        pass
    assert module.held == timedelta(seconds=900)


def test_large_bytes_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(belongings, "MAX_BYTES", 3)
    module = torch.nn.Linear(2, 2)
    module.held = [bytearray(b"abcd"), bytearray(b"abc")]
    with contents_kept(module):
        for raw in module.held:
            raw[0] = 0
    assert module.held == [b"\0bcd", b"abc"]


def test_contents_are_put_back_in_the_same_objects() -> None:
    module = torch.nn.Linear(2, 2)
    held: dict[str, Any] = {
        "list": [1, [2]],
        "ordered": OrderedDict(a=1, b=2),
        "default": defaultdict(list, a=[1]),
        "counter": Counter("aab"),
        "set": {1, 2},
        "object": SimpleNamespace(a=1, inner=[3]),
        "iterator": iter([1, 2]),
        "tuple": ([1],),
    }
    module.held = held
    with contents_kept(module):
        held["list"][1].append(5)
        held["list"].append(6)
        held["ordered"].move_to_end("a")
        held["default"]["b"].append(1)
        held["counter"].update("c")
        held["set"].add(3)
        held["object"].a, held["object"].new = 2, 1
        held["object"].inner.clear()
        held["tuple"][0].append(1)
        with pytest.raises(ValueError, match=r"iterator Linear.held\['iterator'\].*loss_fn"):
            next(held["iterator"])
        del held["set"]
    assert held["list"] == [1, [2]] and list(held["ordered"]) == ["a", "b"] and dict(held["default"]) == {"a": [1]}
    assert held["counter"] == Counter("aab") and held["set"] == {1, 2} and held["tuple"] == ([1],)
    assert vars(held["object"]) == {"a": 1, "inner": [3]} and list(held["iterator"]) == [1, 2]


def endless() -> Iterator[Any]:
    g = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(4, 4, generator=g), torch.randint(CLASSES, (4,), generator=g)


ITERATORS: dict[str, Callable[[], Iterator[Any]]] = {
    "a loader's": lambda: iter(DataLoader(tensors(96), 4)),
    "a loader's with a worker": lambda: iter(DataLoader(tensors(96), 4, num_workers=1)),
    "a loader in a cycle": lambda: itertools.cycle(DataLoader(tensors(96), 4)),
    "a generator": endless,
}


class Unlabelled(Plain):
    """A second stream of batches that the step reads itself."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_fit_start(self) -> None:
        self.others = ITERATORS[self.name]()

    def on_fit_end(self) -> None:
        self.others = iter(())  # its worker ends

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + super().training_step(next(self.others), batch_idx)


@pytest.mark.parametrize("name", ITERATORS)
def test_an_iterator_that_the_step_reads_is_not_read_by_chains(name: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"takes from the iterator Unlabelled.others.*Give loss_fn"):
        Scenario(lambda: Unlabelled(name), loaders).assert_undisturbed(tmp_path, tiny_monitor(on_failure="warn"))


def test_with_a_loss_function_the_rest_of_such_a_module_is_measured(tmp_path: Path) -> None:
    def loss(module: Any, batch: Any) -> Tensor:
        return Plain.training_step(module, batch, 0)

    monitor = tiny_monitor(loss_fn=loss)
    Scenario(lambda: Unlabelled("a generator"), loaders).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 3


class Piped(Plain):
    """Tells another process of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.ours, self.theirs = multiprocessing.Pipe()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ours.send(1)
        self.theirs.recv()


def test_a_pipe_stays_open(tmp_path: Path) -> None:
    monitor = tiny_monitor()
    trace = Scenario(Piped, loaders).run(tmp_path, monitor)
    assert trace.num_batches == 12 and len(monitor.estimates) == 3


class Counting(LightningDataModule):
    """Counts the steps, which weigh the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.seen, self.total = 0, [0], torch.zeros(2)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(tensors(), 4)


class Reaching(Plain):
    """Changes something through its trainer at each step."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.change = change

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.change(self)
        counted = self.trainer.callback_metrics.get("counted", torch.zeros(()))
        return super().training_step(batch, batch_idx) * (1 + 0.01 * (counted + self.trainer.datamodule.steps))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 100), "interval": "step"}]


def slower(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.9


def count(module: Any) -> None:
    module.trainer.datamodule.steps += 1
    module.trainer.datamodule.seen.append(1)


def count_in_place(module: Any) -> None:
    data = module.trainer.datamodule
    data.total += 1
    data.steps = float(data.total[0])


def count_in_metrics(module: Any) -> None:
    metrics = module.trainer.callback_metrics
    metrics["counted"] = metrics.get("counted", torch.zeros(())) + 1


def ask(module: Any) -> None:
    assert isinstance(module.trainer.strategy, SingleDeviceStrategy)
    assert isinstance(module.optimizers(), torch.optim.SGD)
    assert module.optimizers().param_groups[0]["lr"] == module.lr_schedulers().get_last_lr()[0]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "learning rate": lambda m: slower(m.optimizers()),
    "learning rate of the optimiser inside": lambda m: slower(m.optimizers().optimizer),
    "learning rate through the trainer": lambda m: slower(m.trainer.optimizers[0]),
    "scheduler": lambda m: m.lr_schedulers().step(),
    "scheduler through the trainer": lambda m: m.trainer.lr_scheduler_configs[0].scheduler.step(),
    "datamodule": count,
    "datamodule in place": count_in_place,
    "metrics": count_in_metrics,
    "nothing": ask,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_step_writes_through_its_trainer_is_training_s(change: Callable[[Any], Any], tmp_path: Path) -> None:
    made: list[Counting] = []

    def data() -> dict[str, Any]:
        made.append(Counting())
        return {"datamodule": made[-1]}

    monitor = tiny_monitor()
    Scenario(lambda: Reaching(change), data).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 3
    assert made[0].seen == made[1].seen and made[0].steps == made[1].steps


def test_chains_write_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "inside.ckpt"

    def save(module: Any) -> None:
        if not module.training:  # the chains' copy
            module.trainer.save_checkpoint(path)

    monitor = tiny_monitor()
    Scenario(lambda: Reaching(save), lambda: {"datamodule": Counting()}).run(tmp_path, monitor)
    assert len(monitor.estimates) == 3 and not path.exists()
