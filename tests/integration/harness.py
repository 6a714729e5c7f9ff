"""Train with and without a callback, and compare everything that training is made of, bit by bit.

:func:`run` trains from fixed seeds and keeps what ``lightning_slt.testing`` sees; :func:`assert_same` compares two such
traces and names the first difference.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from lightning import Callback, Trainer

from lightning_slt import SGLD, SLTMonitor
from lightning_slt.testing import Fingerprint, RecordingLogger, TrainingTrace, first_difference
from lightning_slt.testing.trace import flatten, rng_state

__all__ = ["SGLD", "RecordingLogger", "SLTMonitor", "TrainingTrace", "flatten", "rng_state"]

SEED = 7

FIGURES = (
    "chains_figure",
    "history_figure",
    "influence_figure",
    "suspects_figure",
    "trajectories_figure",
    "free_energy_figure",
)
"""What a publisher draws: ten times the work of the smallest chains."""


def assert_same(a: TrainingTrace, b: TrainingTrace) -> None:
    """Bitwise the same training.

    Raises:
        AssertionError: naming the moment and the piece of state that differ first, and by how much.
    """
    difference = first_difference(a, b)
    assert difference is None, str(difference)


def quiet_trainer(folder: Path, **kwargs: Any) -> Trainer:
    """A CPU trainer for tests: nothing on the screen, nothing on disk unless asked for."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(folder),
        **kwargs,
    }
    if settings.get("barebones"):  # switches these off itself, and refuses to be told
        for name in ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"):
            settings.pop(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(**settings)


@contextmanager
def nothing_said_of(pattern: str) -> Iterator[None]:
    """No warning from its beginning on is like this."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [str(w.message) for w in caught if re.match(pattern, str(w.message))] == []


def seed_everything(seed: int = SEED) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that user code draws from
    random.seed(seed)


class BatchesOnly(Fingerprint):
    """The losses of the batches, and no copy of any other state: for long runs that are compared with nothing."""

    def on_train_batch_start(self, *_: Any) -> None:
        pass

    def on_before_optimizer_step(self, *_: Any) -> None:
        pass

    def _training_state(self, *_: Any) -> dict[str, Any]:
        return {}


def run(
    make_trainer_kwargs: Callable[[], dict[str, Any]],
    make_module: Callable[[], Any],
    make_data: Callable[[], dict[str, Any]],
    callbacks: Sequence[Callback],
    folder: Path,
    ckpt_path: Optional[str] = None,
    watched: bool = True,
) -> TrainingTrace:
    """Train once from fixed seeds and keep what was seen.

    Args:
        make_trainer_kwargs: gives the arguments of the trainer, made anew for each run; its ``callbacks`` come first.
        make_module: gives the module.
        make_data: gives the data arguments of ``Trainer.fit``.
        callbacks: those under test; they stand after those of ``make_trainer_kwargs``.
        folder: ``default_root_dir``.
        ckpt_path: resume from there.
        watched: whether the state of training is copied at every batch.
    """
    fingerprint, logger = Fingerprint() if watched else BatchesOnly(), RecordingLogger()
    seed_everything()
    kwargs = make_trainer_kwargs()
    others = kwargs.pop("callbacks", [])
    kwargs.setdefault("logger", logger)
    trainer = quiet_trainer(folder, callbacks=[*others, *callbacks, fingerprint], **kwargs)
    module = make_module()
    trainer.fit(module, ckpt_path=ckpt_path, **make_data())
    trace = fingerprint.trace
    trace.rows, trace.trainer, trace.module = logger.of_training(), trainer, module
    return trace


@dataclass(frozen=True)
class Scenario:
    """A training run that the callback must leave as it is.

    Attributes:
        module: makes the module (or a compiled one).
        data: makes the data arguments of ``Trainer.fit``.
        trainer: makes the arguments of the trainer.
        watched: whether the state of training is copied at every batch, to be compared.
    """

    module: Callable[[], Any]
    data: Callable[[], dict[str, Any]]
    trainer: Callable[[], dict[str, Any]] = dict
    watched: bool = True

    def run(self, folder: Path, *callbacks: Callback, **kwargs: Any) -> TrainingTrace:
        return run(self.trainer, self.module, self.data, callbacks, folder, **{"watched": self.watched, **kwargs})

    def assert_undisturbed(self, folder: Path, *callbacks: Callback) -> TrainingTrace:
        """Train without and with ``callbacks``; everything must be the same. Gives the trace with them."""
        assert self.watched
        without = self.run(folder / "without")
        with_monitor = self.run(folder / "with", *callbacks)
        assert without.num_batches > 0
        assert_same(without, with_monitor)
        return with_monitor


TINY: dict[str, Any] = {
    "num_chains": 2,
    "num_draws": 4,
    "num_burnin_steps": 2,
    "num_steps_bw_draws": 1,
    "method": "sequential",
}


def tiny_monitor(**changes: Any) -> SLTMonitor:
    """A monitor with the smallest chains, a fixed step size, and failures that are failures."""
    settings: dict[str, Any] = {"sampler": SGLD(lr=1e-4), "on_failure": "raise", **TINY, **changes}
    if not {"every_n_train_steps", "every_n_epochs", "at_steps", "log_spaced"} & set(settings):
        settings["every_n_train_steps"] = 4
    return SLTMonitor(**settings)


def steps_of(monitor: SLTMonitor) -> list[Optional[int]]:
    """The optimiser steps at which ``monitor`` fired."""
    return [e.step for e in monitor.estimates]
