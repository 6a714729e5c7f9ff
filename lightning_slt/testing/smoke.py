"""One batch and one minimal chain: whether a module can be measured, and what is in the way where it cannot."""

from __future__ import annotations

import logging
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_slt.callbacks import SLTMonitor
from lightning_slt.estimate import NonFiniteLossError
from lightning_slt.record import Estimate
from lightning_slt.sampling.probe import CoupledLossError
from lightning_slt.sampling.restriction import Restriction
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.shadow import CopyError, shadow_copy
from lightning_slt.sampling.steps import LossFn, NoLossError, loss_function

NUM_PROBED = 8
"""Samples whose losses are asked for: enough to see that a loss couples them."""


class SmokeTestFailed(AssertionError):
    """The module cannot be measured as it is.

    Attributes:
        problem: what is in the way, with the remedy.
    """

    def __init__(self, module: Any, problem: str) -> None:
        self.problem = problem
        super().__init__(f"SLTMonitor cannot measure {type(module).__name__}: {problem}")


@dataclass(frozen=True)
class SmokeReport:
    """What a passed smoke test has seen.

    Attributes:
        estimate: of one chain of four draws: its number means nothing, its settings (``num_weights``, ``num_samples``,
            ``nbeta``, ``method``, ``method_reason``) are those that a real run would have.
        notes: what works, but slower or with less: a module that cannot be copied, a loss that couples the samples of a
            batch, data that cannot be asked for a sample by number.
        seconds: what it took.
    """

    estimate: Estimate
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        e = self.estimate
        nbeta = f"{e.nbeta:,.0f}" if e.nbeta >= 10 else f"{e.nbeta:.2g}"
        n = f"{e.num_samples:,}" if e.num_samples is not None else "not known"
        seen = f"{e.num_weights:,} weights, n = {n}, nbeta = {nbeta}, {e.method} chains"
        notes = "".join(f"\n- {note}" for note in self.notes) or " none."
        return f"OK in {self.seconds:.1f} s: {seen}. Notes:{notes}"


def smoke_test(
    module: LightningModule,
    datamodule: Any = None,
    *,
    loss_fn: Optional[LossFn] = None,
    restrict: Restriction = None,
    num_samples: Optional[int] = None,
    nbeta: Optional[float] = None,
    probe: bool = False,
    **trainer_arguments: Any,
) -> SmokeReport:
    """Train on one batch under ``fast_dev_run`` and run one minimal chain; no files, no loggers, no progress bar.

    The module is trained by that one batch (by two, where influence cannot be had); global random states are put back.
    A few seconds on a CPU.

    Args:
        module: the LightningModule.
        datamodule: its data: a LightningDataModule, a DataLoader, or None where the module has its own.
        loss_fn: as in :class:`~lightning_slt.SLTMonitor`, like the next three.
        restrict: which weights move.
        num_samples: n, where the data cannot tell.
        nbeta: the inverse temperature times n, where it is not ``n / log n``.
        probe: whether the influence of single samples is needed: what stands against it is then a failure, not a note.
        trainer_arguments: of the Trainer, such as ``precision="bf16-mixed"``; on the CPU if it does not say where.

    Returns:
        What was seen; look at ``notes``. Printed, it is one line and the notes.

    Raises:
        SmokeTestFailed: naming what about the module or its data is in the way, and the remedy.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> report = smoke_test(BoringModel())
        >>> report.estimate.num_weights, report.notes
        (66, ())
    """
    start = time.perf_counter()
    settings: dict[str, Any] = {
        "loss_fn": loss_fn,
        "restrict": restrict,
        "num_samples": num_samples,
        "nbeta": nbeta,
        "on_failure": "raise",
    }
    try:
        loss_function(module, loss_fn)
        probing = SLTMonitor(**settings, probe=NUM_PROBED)
        plain = SLTMonitor(**settings)
    except ValueError as error:
        raise SmokeTestFailed(module, str(error)) from error
    notes: list[str] = []
    try:
        monitor = _run(module, datamodule, probing, trainer_arguments)
    except Exception as error:
        if probe:
            raise SmokeTestFailed(module, _told(error)) from error
        try:
            monitor = _run(module, datamodule, plain, trainer_arguments)
        except Exception as again:
            raise SmokeTestFailed(module, _told(again)) from again
        notes.append(f"The influence of single samples (probe=) cannot be had: {_told(error)}")
    if not monitor.estimates:
        raise SmokeTestFailed(module, "no batch was trained on: the training data is empty, or no optimiser stepped.")
    try:
        shadow_copy(module)  # now, when the attributes that a step sets are there
    except CopyError as error:
        notes.append(f"{error} Until then chains call the module in place, one after another, and put it back after.")
    return SmokeReport(monitor.estimates[-1], tuple(notes), time.perf_counter() - start)


def _run(module: LightningModule, data: Any, monitor: SLTMonitor, arguments: dict[str, Any]) -> SLTMonitor:
    with tempfile.TemporaryDirectory() as folder, preserve_rng(), _quiet():
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            **arguments,
        }
        trainer = Trainer(fast_dev_run=True, callbacks=[monitor], **settings)
        trainer.fit(module, data)  # a DataModule or loaders
    return monitor


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines on hardware and on what ``fast_dev_run`` leaves out."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _told(error: Exception) -> str:
    """What is in the way, and the remedy."""
    if isinstance(error, NonFiniteLossError):
        return (
            f"{error} It was computed on the copy that chains use, in eval mode, after one step of the optimiser: look "
            "at the data's first batches, at the size of that step, and at what differs in eval mode."
        )
    if isinstance(error, NoLossError):
        return str(error)
    if isinstance(error, (MisconfigurationException, CoupledLossError)) or _in_a_firing(error):
        text = str(error).removeprefix("SLTMonitor: ")
        return text if isinstance(error, (ValueError, MisconfigurationException)) else f"{type(error).__name__}: {text}"
    return f"training itself fails, before anything is measured: {type(error).__name__}: {error}"


def _in_a_firing(error: Exception) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").startswith("lightning_slt.callbacks") for frame in frames)
