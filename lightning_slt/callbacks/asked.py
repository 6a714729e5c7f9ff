"""What a monitor was asked for: checked when it is made, and the same for as long as it lives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional

from lightning_slt.callbacks.arguments import check_dirpath, check_name, listed
from lightning_slt.callbacks.schedule import Schedule
from lightning_slt.callbacks.susceptibilities import Measures
from lightning_slt.estimate import ChainSettings
from lightning_slt.kinds import check_count
from lightning_slt.publish.run import CALIBRATED
from lightning_slt.sampling.restriction import Restriction
from lightning_slt.sampling.steps import LossFn, check_loss_fn

WARN, RAISE = "warn", "raise"


@dataclass(frozen=True, eq=False)
class Asked:
    """The arguments of an :class:`~lightning_slt.SLTMonitor` that its parts share.

    Args:
        schedule: when to measure.
        settings: what is asked of the chains of a full firing.
        measures: what is measured.
        restrict, loss_fn, batch_size, num_samples, on_failure, name, dirpath: as of the monitor.

    Raises:
        ValueError: for an argument out of range.
        TypeError: for one of another kind.
    """

    schedule: Schedule
    settings: ChainSettings
    measures: Measures
    restrict: Restriction = None
    loss_fn: Optional[LossFn] = None
    batch_size: Optional[int] = None
    num_samples: Optional[int] = None
    on_failure: str = WARN
    name: Optional[str] = None
    dirpath: Optional[str] = None

    def __post_init__(self) -> None:
        if self.on_failure not in (WARN, RAISE):
            raise ValueError(f"on_failure={self.on_failure!r}: must be 'warn' or 'raise'.")
        check_count("batch_size", self.batch_size, otherwise=", or None for that of the training loader")
        check_count("num_samples", self.num_samples, 2, ", or None to take it from the data")
        if self.loss_fn is not None:
            check_loss_fn(self.loss_fn)
        check_name(self.name)
        check_dirpath(self.dirpath)

    @property
    def raises(self) -> bool:
        """Whether a failure ends the run."""
        return self.on_failure == RAISE

    @property
    def step_given(self) -> bool:
        """Whether ``lr`` or ``num_burnin_steps`` was, beside which calibration does not search for the step."""
        sampler = self.settings.sampler
        return self.settings.num_burnin_steps is not None or (sampler is not None and sampler.lr is not None)

    @property
    def moving(self) -> list[str]:
        """The entries of ``restrict`` as text, submodules by their class; empty where all weights move."""
        return [entry if isinstance(entry, str) else type(entry).__name__ for entry in listed(self.restrict)]

    def key(self) -> dict[str, Any]:
        """What tells monitors without names apart in a checkpoint.

        By what was asked for: a setting that a later version adds keeps the keys of the checkpoints of this one.
        """
        given = ((f.name, getattr(self.settings, f.name), f.default) for f in dataclasses.fields(self.settings))
        asked = {name: value for name, value, default in given if name != "sampler" and value != default}
        restrict = self.restrict if self.restrict is None or isinstance(self.restrict, str) else self.moving
        return {"schedule": repr(self.schedule), "settings": repr(asked), "restrict": restrict}

    def describe(self) -> dict[str, Any]:
        """For the run's settings."""
        settings, schedule = self.settings, self.schedule
        return {
            "every_n_train_steps": schedule.every_n_train_steps,
            "every_n_epochs": schedule.every_n_epochs,
            "at_steps": list(schedule.at_steps) if schedule.at_steps is not None else None,
            "log_spaced": schedule.log_spaced,
            "sampler": repr(settings.sampler) if settings.sampler is not None else CALIBRATED,
            "num_chains": settings.num_chains,
            "num_draws": settings.num_draws,
            "num_burnin_steps": settings.num_burnin_steps,
            "num_steps_bw_draws": settings.num_steps_bw_draws,
            "batch_size": self.batch_size,
            "measures": self.measures.describe(),
            "nbeta": settings.nbeta,
            "restrict": self.moving or None,
            "seed": settings.seed,
        }


__all__ = ["Asked"]
