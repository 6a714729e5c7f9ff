"""Training with the callbacks must be training without them: both are run, and everything is compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from lightning.pytorch import LightningModule, Trainer

from lightning_slt.callbacks import SLTMonitor, TransitionMonitor
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.samplers import SGLD
from lightning_slt.testing.trace import Difference, Fingerprint, RecordingLogger, TrainingTrace, first_difference

_OURS = (SLTMonitor, TransitionMonitor)

_SHARED = (
    "the step writes to something that copies of the module share with it (a global, a class attribute, a closure)"
)

LIKELY: dict[str, str] = {
    "batch": "reading the data changes the data: a dataset that counts, or augments with a generator of its own",
    "datasets": "the dataset keeps state that reading a sample changes",
    "loader_rng": "something drew from the generator of the training loader",
    "rng": "a hook, a property or a dataset that is called while measuring draws from a global generator",
    "loss": _SHARED,
    "grad": f"{_SHARED}, so that the next loss is another one; or a gradient of a chain reached the live module",
    "attributes": _SHARED,
    "buffers": f"{_SHARED}, here a buffer of the live module",
    "metrics": f"{_SHARED}, here a torchmetric",
    "weights": f"{_SHARED}, here a weight of the live module",
    "storage": "a weight of the live module was moved to other memory",
    "requires_grad": "a parameter of the live module was frozen or thawed",
    "flags": "the training mode or the hooks of the live module were changed",
    "torch": "a global switch of torch was left changed by the step or a hook that chains call",
}
"""Pieces of state, and what about a module or its data most often moves them."""


class TrainingDisturbed(AssertionError):
    """Training with the callbacks was not the training without them.

    Attributes:
        difference: what differed first.
    """

    def __init__(self, message: str, difference: Difference) -> None:
        super().__init__(message)
        self.difference = difference


def assert_training_undisturbed(
    make_trainer: Callable[[], Trainer],
    make_module: Callable[[], LightningModule],
    make_data: Optional[Callable[[], Any]] = None,
    *,
    seed: int = 0,
) -> TrainingTrace:
    """Train without and with the callbacks of this package, and compare everything, bit for bit.

    Compared at every batch: its loss, weights, buffers, gradients, optimiser and scheduler state, logged values,
    training modes and hooks, the state of the data and of all random generators. Three or four batches are enough:
    ``Trainer(max_epochs=1, limit_train_batches=4)``. Nothing is sent to the trainer's loggers, and what callbacks
    write by the logger's folder goes to a temporary one.

    Args:
        make_trainer: makes the trainer, anew at each call. Where it has an ``SLTMonitor`` or a ``TransitionMonitor``
            these are what is tested, and they are taken off for the run without; where it has none, a monitor with the
            smallest chains is added that measures after the steps 1, 3 and 6.
        make_module: makes the module, anew at each call.
        make_data: makes what is trained on, anew at each call: a LightningDataModule, loaders, or a dict of data
            arguments of ``Trainer.fit``. None where the module has its own.
        seed: of the global generators, before each run; they are put back at the end.

    Returns:
        What was seen of the run with the callbacks.

    Raises:
        TrainingDisturbed: where the two differ. The message says what differed first, and what is likely to be in the
            way; or that training is not reproducible by itself, which is tried by running it once more without.
        AssertionError: where there is nothing to compare: no batch was trained on, or nothing was measured.
        ValueError: where ``make_trainer`` or ``make_module`` gives the same object twice, or the module itself brings a
            monitor (``configure_callbacks``).

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> def make_trainer():
        ...     return Trainer(max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                    enable_progress_bar=False, enable_model_summary=False)
        >>> assert_training_undisturbed(make_trainer, BoringModel).num_batches
        4
    """
    makers = make_trainer, make_module, make_data
    with preserve_rng():
        without, _ = _train(*makers, seed, with_callbacks=False)
        trace, monitors = _train(*makers, seed, with_callbacks=True)
        for name, one, other in (
            ("make_trainer", without.trainer, trace.trainer),
            ("make_module", without.module, trace.module),
        ):
            if one is other:
                raise ValueError(f"{name} gave the same object twice: it must make a new one at each call.")
        difference = first_difference(without, trace)
        if difference is not None:
            by_itself = first_difference(without, _train(*makers, seed, with_callbacks=False)[0])
            raise TrainingDisturbed(_message(difference, by_itself), difference)
    if not trace.num_batches:
        raise AssertionError(
            "no batch was trained on, so there is nothing to compare: give the trainer data and steps."
        )
    if not any(monitor.estimates for monitor in monitors):
        raise AssertionError(
            f"nothing was measured in {trace.num_batches} batches, so nothing is shown: give SLTMonitor a cadence that "
            "fires within them (at_steps=[1, 3]), and on_failure='raise' to see what failed."
        )
    return trace


def _train(
    make_trainer: Callable[[], Trainer],
    make_module: Callable[[], LightningModule],
    make_data: Optional[Callable[[], Any]],
    seed: int,
    with_callbacks: bool,
) -> tuple[TrainingTrace, list[SLTMonitor]]:
    with tempfile.TemporaryDirectory() as folder, preserve_rng(seed):
        fingerprint, logger = Fingerprint(), RecordingLogger(save_dir=folder)
        trainer = make_trainer()
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [c for c in callbacks if isinstance(c, SLTMonitor)]
        if not with_callbacks:
            callbacks[:] = [c for c in callbacks if not isinstance(c, _OURS)]
        elif not monitors:
            monitors = [_smallest()]
            callbacks += monitors
        callbacks.append(fingerprint)
        trainer.loggers = [logger]
        module = make_module()
        own = (
            list(pl_callbacks) if isinstance(pl_callbacks := module.configure_callbacks(), Sequence) else [pl_callbacks]
        )
        if any(isinstance(c, _OURS) for c in own):
            raise ValueError(
                "configure_callbacks() of the module gives an SLTMonitor or a TransitionMonitor, which cannot be taken "
                "off for the run without: let make_trainer give it to the trainer instead."
            )
        trainer.fit(module, **_fit_arguments(make_data() if make_data is not None else None))
        trace = fingerprint.trace
        trace.rows, trace.trainer, trace.module = logger.of_training(), trainer, module
        return trace, monitors


def _smallest() -> SLTMonitor:
    return SLTMonitor(
        at_steps=[1, 3, 6],
        sampler=SGLD(lr=1e-6),
        num_chains=2,
        num_draws=2,
        num_burnin_steps=1,
        num_steps_bw_draws=1,
        on_failure="raise",
    )


def _fit_arguments(data: Any) -> dict[str, Any]:
    """What ``Trainer.fit`` takes for a DataModule, loaders or a dict of arguments."""
    if data is None:
        return {}
    if isinstance(data, Mapping) and set(data) <= {"train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path"}:
        return dict(data)
    return {"train_dataloaders": data}  # fit takes a DataModule there as well


def _message(difference: Difference, by_itself: Optional[Difference]) -> str:
    if by_itself is not None:
        return (
            f"training is not reproducible by itself: two runs without the callbacks differ too ({by_itself}). Compare "
            "what is seeded: make the module, the data and their generators inside make_module and make_data, and use "
            "Trainer(deterministic=True) on a GPU."
        )
    likely = LIKELY.get(difference.name.split("/")[0])
    hint = f" Likely in the way: {likely}." if likely else ""
    return (
        f"training with the callbacks differs from training without them. {difference}.{hint} What cannot be "
        "covered is "
        "listed in docs/compatibility.md; SLTMonitor(loss_fn=...), with a loss that touches nothing but its module, is "
        "the way out of most of it."
    )
