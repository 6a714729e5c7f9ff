"""Two firings and a step of training at one set of weights, as a monitor would have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_slt.calibrate.result import Calibration
from lightning_slt.calibrate.training_step import training_step_seconds
from lightning_slt.firing import Course
from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.record import Estimate
from lightning_slt.sampling.anchor import open_window
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.device_clock import seconds_on
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.paths import chunk_width, observe
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.samplers import SGLD
from lightning_slt.sampling.shadow import CopyError
from lightning_slt.sampling.step_size import first_step, unstable_step
from lightning_slt.sampling.steps import NoLossError
from lightning_slt.sweep.checkpoint import STATE, Checkpoint, read_state
from lightning_slt.sweep.executors import named_devices
from lightning_slt.sweep.point import OpenedPoint, make_module, make_objective, make_source, open_point
from lightning_slt.sweep.settings import SweepConfig

INITIAL = "the module as it is initialised"


def calibrate(
    config: SweepConfig, checkpoint: Optional[Path] = None, say: Callable[[str], None] = lambda line: None
) -> Calibration:
    """What a monitor of these settings would do with a model, and what it would cost, on the first of the devices.

    The first firing is the point that a sweep would measure; the second starts from its chains, as a monitor's do.
    Nothing is written.

    Args:
        config: module, data and settings of the chains, as for a sweep.
        checkpoint: whose weights are measured; None for the module as it is initialised.
        say: told what goes on, a line at a time.

    Raises:
        FileNotFoundError: for a checkpoint that is not there.
        ValueError: for a setting out of range, a module, data or weights that cannot be had or do not fit, a module
            without a usable loss, a loss that is not finite.
        Exception: what the user's step raises.
    """
    config.check()
    device = torch.device(named_devices(config.devices)[0].device)
    try:
        with preserve_rng(config.seed):
            return _calibrate(config, checkpoint, device, say)
    except (CopyError, MisconfigurationException, NoLossError) as error:
        raise ValueError(str(error)) from error


def _calibrate(
    config: SweepConfig, path: Optional[Path], device: torch.device, say: Callable[[str], None]
) -> Calibration:
    if path is not None:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder. Give one checkpoint, a file.")
        stored = Checkpoint.of(path)
        state, of, step, epoch = read_state(path), f"{path} (step {stored.step:,})", stored.step, stored.epoch
    else:
        path, of, step, epoch = Path(INITIAL), INITIAL, 0, None
        state = {STATE: make_module(config, path, {}).state_dict()}

    def objective_of(asked: SweepConfig) -> Objective:
        return make_objective(state, asked, device, path, step)[0]

    opened = open_point(state, config, device, path, step)
    course = Course(config.localization, config.method)
    say(f"a first firing at {of} ...")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    first, first_seconds = _fire(course, lambda: opened.objective, opened, config)
    peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
    warm = course.memory.displacements is not None

    opened.source.forget()
    say(f"took {first_seconds:.2g} s; a second one ...")
    later, later_seconds = _fire(course, lambda: objective_of(config), opened, config)

    say(f"took {later_seconds:.2g} s; steps of training ...")
    chunk, limit = _look(objective_of(config), opened.source, first, config)
    source = _of_training(opened, config)
    training_seconds = training_step_seconds(objective_of(dataclasses.replace(config, restrict=None)), source)
    placed = {"step": step, "x": step, "epoch": epoch}
    return Calibration(
        of,
        config,
        first.replace(**placed),
        later.replace(**placed),
        warm,
        first_seconds,
        later_seconds,
        training_seconds,
        source.batch_size,
        chunk,
        limit,
        peak,
    )


def _fire(
    course: Course, make: Callable[[], Objective], opened: OpenedPoint, config: SweepConfig
) -> tuple[Estimate, float]:
    """One firing of a run, and its seconds, those of making its copy of the module with them."""
    device = opened.objective.device
    start = seconds_on(device)
    estimate, _ = course.measure(make(), opened.source, config.settings(), opened.probes)
    return estimate, seconds_on(device) - start


def _look(
    objective: Objective, source: MinibatchSource, estimate: Estimate, config: SweepConfig
) -> tuple[int, Optional[float]]:
    """How many chains are computed at a time, and the step size at which they no longer hold."""
    settings = config.settings()
    posterior = LocalPosterior(estimate.nbeta, estimate.localization)
    open_window(objective, source)
    with objective.active():
        window = source.window(0)
        chunk = 1
        if estimate.method == "batched":
            saved = observe(objective, window[next(iter(window.anchor_loss))]).saved_bytes
            chunk = chunk_width(objective, saved, settings.num_chains, 2 if settings.method == "batched" else 1)
        safe = first_step(objective, window, posterior, settings.seed)
    return chunk, unstable_step(settings.sampler or SGLD(), safe)


def _of_training(opened: OpenedPoint, config: SweepConfig) -> MinibatchSource:
    """Minibatches of the size that training has: that of its loader, where there is one; else the chains'."""
    opened.source.forget()
    if config.batch_size is None or not isinstance(opened.loader, DataLoader):
        return opened.source
    return make_source(opened.loader, dataclasses.replace(config, batch_size=None), opened.transfer)


__all__ = ["calibrate"]
