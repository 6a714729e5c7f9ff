"""What a module keeps of loggers, their writers and queues hears training alone, and chains wait for none of them."""

from __future__ import annotations

import functools
import multiprocessing
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_slt import SGLD, estimate_llc
from lightning_slt.callbacks.background.travel import StillTrainer
from lightning_slt.sampling.belongings import services_of
from lightning_slt.sampling.borrowing import prepare
from lightning_slt.sampling.services import stand_in
from lightning_slt.sampling.shadow import shadow_copy
from lightning_slt.sampling.stand_ins import LiveQueue
from tests.integration.harness import Scenario, tiny_monitor
from tests.integration.models import Plain, loaders, tensors


class Blocks:
    """Nothing that holds it can be copied: chains call the module in place."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not this one")


class Reporter:
    """A helper of the user's: it counts what it passes on to a service."""

    def __init__(self, send: Callable[[float, int], Any], service: Any) -> None:
        self.send, self.service, self.count = send, service, 0

    def __call__(self, loss: float) -> None:
        self.send(self.service, loss, self.count)  # type: ignore[call-arg]
        self.count += 1


class Reports(Plain):
    """Sends the loss of each step to a service that it keeps, in a helper that is kept in a dict."""

    def __init__(self, service: Callable[[Any], Any], send: Callable[..., Any], copied: bool) -> None:
        super().__init__()
        self.service, self.send = service, send
        if not copied:
            self.blocks = Blocks()

    def on_fit_start(self) -> None:
        self.kept = {"reporters": [Reporter(self.send, self.service(self))]}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        report = self.kept["reporters"][0]
        report(loss.item())
        return loss * (1 + 0.01 * report.count)  # a count that is put back before every call of the chains


def add_scalar(writer: Any, loss: float, step: int) -> None:
    writer.add_scalar("mine", loss, step)


def log_metrics(logger: Any, loss: float, step: int) -> None:
    assert isinstance(logger, Logger)
    logger.log_metrics({"mine": loss}, step)


WRITERS = {
    "a writer": (lambda module: module.logger.experiment, add_scalar),
    "a logger": (lambda module: module.logger, log_metrics),
}


@pytest.mark.parametrize("copied", [True, False], ids=["a copy", "in place"])
@pytest.mark.parametrize(("service", "send"), WRITERS.values(), ids=WRITERS)
def test_a_writer_that_the_module_keeps_writes_what_training_does(
    service: Callable[[Any], Any], send: Callable[..., Any], copied: bool, tmp_path: Path
) -> None:
    """A copied writer has a queue that nobody empties: the step after it was full never came back."""
    logger, monitor = TensorBoardLogger(tmp_path), tiny_monitor(every_n_train_steps=3)
    trace = Scenario(lambda: Reports(service, send, copied), loaders, lambda: {"logger": logger}).run(tmp_path, monitor)
    assert len(monitor.estimates) == 4
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0})
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("mine")]
    losses = [float(loss) / (1 + 0.01 * (step + 1)) for step, loss in enumerate(trace.losses)]
    assert written == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in enumerate(losses)]


def test_a_kept_logger_still_says_where_it_writes(tmp_path: Path) -> None:
    module = Plain()
    logger = CSVLogger(tmp_path, "run", 3)
    module.table = logger  # type: ignore[assignment]
    copied: Any = shadow_copy(module)
    assert isinstance(copied.table, CSVLogger) and copied.table.log_dir == logger.log_dir
    copied.table.log_metrics({"a": 1.0}, 0)
    copied.table.save()
    assert not Path(logger.log_dir).exists()


QUEUES: dict[str, Callable[[], Any]] = {
    "a bounded queue": lambda: queue.Queue(3),
    "a simple queue": queue.SimpleQueue,
    "a queue between processes": lambda: multiprocessing.get_context("fork").Queue(3),
}
KEPT: dict[str, tuple[Callable[[Any], Any], Callable[..., None]]] = {
    "the queue": (lambda items: items, lambda items, *item: items.put(item)),
    "its method": (lambda items: items.put, lambda put, *item: put(item)),
    "a partial of it": (lambda items: functools.partial(items.put, block=True), lambda put, *item: put(item)),
}


@pytest.mark.parametrize("copied", [True, False], ids=["a copy", "in place"])
@pytest.mark.parametrize(("kept", "send"), KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("make", QUEUES.values(), ids=QUEUES)
def test_a_queue_that_the_module_keeps_has_the_items_of_training(
    make: Callable[[], Any], kept: Callable[[Any], Any], send: Callable[..., None], copied: bool, tmp_path: Path
) -> None:
    """A copy of it, or of what it is bound to, would be full once and never come back."""
    items, taken = make(), []

    def take() -> None:
        while (item := items.get()) is not None:
            taken.append(item)

    reader = threading.Thread(target=take, daemon=True)
    reader.start()
    monitor = tiny_monitor(every_n_train_steps=3)
    made = Scenario(lambda: Reports(lambda _: kept(items), send, copied), loaders)
    made.run(tmp_path, monitor)
    items.put(None)
    reader.join(30)
    assert not reader.is_alive()
    assert [step for _, step in taken] == list(range(12)) and len(monitor.estimates) == 4


def test_a_queue_of_a_manager_is_one_and_its_other_proxies_are_none() -> None:
    with multiprocessing.get_context("fork").Manager() as manager:
        items, table = manager.Queue(3), manager.dict()
        assert isinstance(stand_in(items, "here"), LiveQueue) and stand_in(table, "there") is None


def test_what_is_taken_from_a_queue_would_be_missed_by_training(tmp_path: Path) -> None:
    items: queue.Queue[float] = queue.Queue()
    for _ in range(100):
        items.put(1.0)
    monitor = tiny_monitor(on_failure="warn")
    made = Scenario(lambda: Reports(lambda _: items, lambda q, *_: q.get(), True), loaders)
    with pytest.warns(UserWarning, match=r"takes from .*service.*Give loss_fn"):
        made.run(tmp_path, monitor)
    assert not monitor.estimates and items.qsize() == 100 - 12


def test_no_service_is_found_where_there_is_none() -> None:
    module = Plain()
    module.held = {"list": [1, torch.zeros(2), (None, "text")], "itself": module}  # type: ignore[assignment]
    assert services_of(module) == {}


class Paced(Plain):
    """Its loss is weighed by a number and an array that it shares with the workers of its data, and counts up."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.pace, self.paces = multiprocessing.Value("i", 0), multiprocessing.Array("d", 2)
        self.busy = multiprocessing.Event()
        if not copied:
            self.blocks = Blocks()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.pace.get_lock():
            self.pace.value += 1
        self.paces[0] += 0.5
        return super().training_step(batch, batch_idx) * (1 + 0.01 * (self.pace.value + self.paces[0]))


@pytest.mark.parametrize("copied", [True, False], ids=["a copy", "in place"])
def test_a_number_that_processes_share_is_moved_on_by_training_alone(copied: bool, tmp_path: Path) -> None:
    monitor = tiny_monitor()
    trace = Scenario(lambda: Paced(copied), loaders).assert_undisturbed(tmp_path, monitor)
    assert len(monitor.estimates) == 3
    assert (trace.module.pace.value, trace.module.paces[:]) == (12, [6.0, 0.0])


# ------------------------------------------------------------------------------------------------------ self.log, kept


class KeepsLog(Plain):
    """Hands its ``log`` on, before there is a trainer."""

    def __init__(self, copied: bool = True) -> None:
        super().__init__()
        self.report, self.partly, self.together = self.log, functools.partial(self.log, on_step=True), self.log_dict
        if not copied:
            self.blocks = Blocks()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.report("a", loss, on_epoch=True, sync_dist=True)
        self.partly("b", loss)
        self.together({"c": loss})
        return loss


@pytest.mark.parametrize("copied", [True, False], ids=["a copy", "in place"])
@pytest.mark.parametrize("method", ["sequential", "batched"])
def test_a_log_that_the_module_has_kept_is_silent_too(method: str, copied: bool, tmp_path: Path) -> None:
    """Also before training and at the end of an epoch, where other rules hold for ``self.log``."""
    if method == "batched" and not copied:
        method = "auto"
    monitor = tiny_monitor(at_steps=[0, 4], every_n_epochs=1, method=method)
    Scenario(lambda: KeepsLog(copied), loaders).assert_undisturbed(tmp_path, monitor)
    assert [e.step for e in monitor.estimates] == [0, 4, 6, 12]


def test_a_kept_log_is_silent_where_there_is_no_trainer() -> None:
    assert estimate_llc(KeepsLog(), tensors(), num_chains=2, num_draws=4, num_burnin_steps=2).num_chains == 2


def test_a_kept_log_is_silent_in_a_worker() -> None:
    module = KeepsLog()
    prepare(module, StillTrainer({"training": True}, None, torch.device("cpu")))
    assert torch.isfinite(module.training_step(next(iter(loaders()["train_dataloaders"])), 0))


class Kept:
    """A helper that counts, beside a service."""

    def __init__(self, service: Any) -> None:
        self.service, self.count = service, 0


def loss_with(use: Callable[[Any], float]) -> Callable[[Any, Any], Tensor]:
    """A loss that grows with what a helper of the module says when it is asked."""

    def loss(module: Any, batch: Any) -> Tensor:
        return module.weight.square().sum() * 50.0 * use(module.kept)

    return loss


def counted(kept: Any) -> float:
    kept.count += 1
    return float(kept.count)


def counted_with_others(kept: Any) -> float:
    number = kept.service.get_obj() if hasattr(kept.service, "get_obj") else kept.service
    number.value += 1
    return float(number.value)


def through_a_queue(kept: Any) -> float:
    assert kept.service.qsize() < kept.service.maxsize
    kept.service.put(1.0)
    return float(kept.service.get())


@pytest.mark.parametrize(
    ("service", "use"),
    [
        (lambda: multiprocessing.Value("i", 0), counted),
        (multiprocessing.Lock, counted),
        (lambda: queue.Queue(3), counted),
        (lambda: multiprocessing.Value("i", 0), counted_with_others),
        (lambda: multiprocessing.RawValue("i", 0), counted_with_others),
        (lambda: queue.Queue(3), through_a_queue),
    ],
    ids=["beside a number", "beside a lock", "beside a queue", "a shared number", "a raw number", "a queue of its own"],
)
def test_a_step_that_counts_beside_a_service_or_in_it_has_one_loss(
    service: Callable[[], Any], use: Callable[[Any], float]
) -> None:
    """The same number at every call, that of the first, so that the coefficient is that of ``50 |w|²``; and the
    module's own is left alone. One of them was refused, others read up to three times as much."""
    torch.manual_seed(0)
    module: Any = torch.nn.Linear(2, 1, bias=False)
    module.weight.data.zero_()
    data = torch.utils.data.TensorDataset(torch.zeros(64, 1))
    settings: dict[str, Any] = {"sampler": SGLD(lr=1e-4), "num_chains": 2, "num_draws": 40, "num_burnin_steps": 10}
    plain = estimate_llc(module, data, lambda m, batch: m.weight.square().sum() * 50.0, seed=0, **settings)
    module.kept = Kept(service())
    found = estimate_llc(module, data, loss_with(use), seed=0, **settings)
    assert found.mean == pytest.approx(plain.mean, rel=1e-5)
    assert module.kept.count == 0
    if use is counted_with_others:
        assert module.kept.service.value == 0


def test_a_step_that_takes_what_training_has_put_in_is_told() -> None:
    module: Any = torch.nn.Linear(2, 1)
    module.waiting = queue.Queue()
    module.waiting.put(1.0)
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1))
    with pytest.raises(ValueError, match=r"takes from the queue Linear.waiting"):
        estimate_llc(module, data, lambda m, batch: m.weight.sum() * m.waiting.get(), num_chains=1, num_draws=10)
    assert module.waiting.qsize() == 1
