"""What a background worker does with a snapshot: the same as a firing inside training, by the same function."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional, cast

import torch
import torch.distributed as dist
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_slt.callbacks.background.data_files import RunData
from lightning_slt.callbacks.background.devices import WorkerDevice
from lightning_slt.callbacks.background.travel import Kit, Snapshot, StillTrainer, read_pickled
from lightning_slt.callbacks.background.worker import (
    TELL_EVERY,
    Mail,
    Orders,
    data_path,
    kit_path,
    probes_path,
    result_path,
    snapshot_path,
    take_over,
)
from lightning_slt.callbacks.data.structure import explained
from lightning_slt.callbacks.data.training import BatchTransfer, SeenBatches
from lightning_slt.callbacks.distribution import Ranks
from lightning_slt.durable import save_tensors, write_durably
from lightning_slt.firing import Course
from lightning_slt.influence import ProbeSet
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.record import Estimate
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.collective import Alone, Collective, RankLostError
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import preserve_rng

log = logging.getLogger(__name__)


class Bench:
    """A worker's data, devices and course, from one firing to the next.

    Args:
        orders: what the worker was started with.
    """

    def __init__(self, orders: Orders) -> None:
        self._folder = Path(orders.folder)
        self._rank = orders.rank
        take_over(orders.torch_flags)
        self._device = WorkerDevice(orders.device, orders.cores).enter(orders.threads)
        kit = cast(Kit, read_pickled(kit_path(self._folder), self._device))
        self._kit = dataclasses.replace(kit, plugin=plugin_on(kit.plugin, self._device))
        self._course = Course(warm_start=orders.warm_start)
        self._course.load_state_dict(read_pickled(Path(orders.course)))
        self._collective: Collective = Alone()
        if orders.world_size > 1:
            dist.init_process_group(
                "gloo",
                init_method=Path(orders.rendezvous).as_uri(),
                rank=orders.rank,
                world_size=orders.world_size,
                timeout=timedelta(minutes=30),
            )
            self._collective = Ranks()
        self._data = RunData(None, None)
        self._number = -1
        self._source: Optional[MinibatchSource] = None
        self._probes: Optional[ProbeSet] = None
        self._owner: Optional[nn.Module] = None
        self._said: set[str] = set()

    def measure(self, step: int, mail: Mail) -> None:
        """Measure the snapshot of a step and write what came of it; an error is a result as well."""
        told, done = time.monotonic(), 0

        def progress(steps: int) -> None:
            nonlocal told, done
            done += steps
            if mail.watched and self._rank == 0 and time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                mail.tell(steps=done)
                done = 0

        result: dict[str, Any]
        try:
            with preserve_rng():
                estimate, influence, problem = self._measure(step, progress)
            result = {"estimate": estimate, "influence": influence, "error": None, "influence_error": problem}
        except Exception as error:
            traceback.print_exc()
            result = {"estimate": None, "influence": None, "error": f"{type(error).__name__}: {error}"}
        finally:
            self._owner = None
        if self._rank == 0:
            result["course"] = self._course.state_dict()
            write_durably(result_path(self._folder, step), lambda temporary: save_tensors(result, temporary))

    def _measure(
        self, step: int, progress: Callable[[int], None]
    ) -> tuple[Estimate, Optional[InfluenceEstimate], Optional[str]]:
        """The estimate, the influence where there are samples, and why there is none where they failed."""
        start = time.perf_counter()
        objective, source, snapshot = self._open(step)
        if self._course.localization is None:
            # that of the first weights that were sent, also where their own firing was given up
            self._course.localization = snapshot.settings.localization
        measured: Optional[tuple[Estimate, Optional[InfluenceEstimate]]] = None
        problem: Optional[str] = None
        if snapshot.probed:
            try:
                measured = self._course.measure(
                    objective, source, snapshot.settings, self._probes, self._collective, progress
                )
            except RankLostError:
                raise
            except Exception as error:
                # as inside training: the learning coefficient does not depend on the samples
                named = explained(error, self._probes, source)
                problem = f"{type(named).__name__}: {named}"
                self._source = None
                objective, source, snapshot = self._open(step)
        if measured is None:
            measured = self._course.measure(objective, source, snapshot.settings, None, self._collective, progress)
        estimate, influence = measured
        seconds = time.perf_counter() - start
        if influence is not None:
            influence = influence.replace(seconds=seconds)
        return estimate.replace(seconds=seconds), influence, problem

    def _open(self, step: int) -> tuple[Objective, MinibatchSource, Snapshot]:
        kit = self._kit
        built: list[tuple[Objective, MinibatchSource, Snapshot]] = []

        def build() -> None:
            snapshot = cast(Snapshot, read_pickled(snapshot_path(self._folder, step), self._device))
            if snapshot.data != self._number:
                self._source = None  # two sets of data are never held at once
                self._data = cast(RunData, read_pickled(data_path(self._folder, snapshot.data), self._device))
                self._number = snapshot.data
            view = StillTrainer(snapshot.trainer, self._data.datamodule, self._device)
            context: Optional[Callable[[], AbstractContextManager[Any]]] = None
            if kit.under_plugin:
                context = kit.plugin.train_step_context
            objective = Objective(
                snapshot.module,
                kit.loss_fn,
                snapshot.restrict,
                self._device,
                trainer=view,
                context=context,
                say=self._say_once,
            )
            self._owner = objective.module
            if snapshot.batches is not None:
                source = replayed_on(snapshot.batches, self._device)
            elif self._source is None:
                assert self._data.plan is not None
                source = self._source = self._data.plan.build(self._transfer)
            else:
                source = self._source
                source.forget()
            if snapshot.probed and self._probes is None:
                self._probes = probes_on(cast(ProbeSet, read_pickled(probes_path(self._folder))), self._device)
            built.append((objective, source, snapshot))

        self._collective.exchange(build)
        return built[0]

    def _say_once(self, topic: str, sentence: str) -> None:
        """What is so at every firing, once a worker."""
        if topic not in self._said:
            self._said.add(topic)
            log.warning(sentence)

    def _transfer(self, batch: Any) -> Any:
        """With the hooks of the private copy there is when it is read."""
        owner = cast(LightningModule, self._owner)
        return BatchTransfer(self._kit.plugin, self._data.datamodule, owner, self._device)(batch)


def plugin_on(plugin: Any, device: torch.device) -> Any:
    """The precision plugin of training for a worker on another kind of device: autocast is for one kind only, and
    would be off there."""
    if isinstance(plugin, MixedPrecision) and plugin.device != device.type:
        plugin = copy.copy(plugin)
        plugin.device = device.type
    return plugin


def replayed_on(seen: SeenBatches, device: torch.device) -> MinibatchSource:
    """Batches that come with a snapshot, as a source on this device."""
    return dataclasses.replace(seen, batches=[move_data_to_device(batch, device) for batch in seen.batches]).build()


def probes_on(probes: ProbeSet, device: torch.device) -> ProbeSet:
    """The same samples on another device."""
    for samples in (probes.train, probes.query):
        if samples is not None:
            samples.batches = [move_data_to_device(batch, device) for batch in samples.batches]
    return probes


__all__ = ["Bench"]
