"""A monitor whose curve is written down: no chains run, everything else is as in any run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import numpy as np

from lightning_slt import SLTMonitor
from lightning_slt.callbacks.moment import Moment
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.record import Estimate
from tests.publish.helpers import make_estimate, make_influence

NOISE = np.random.default_rng(3).normal(size=400)


def jump(step: int, at: int = 30, height: float = 15.0) -> dict[str, Any]:
    """Structure is built at ``at``: the LLC jumps, the loss falls."""
    late = step > at
    return {
        "mean": 10.0 + height * late + 0.5 * NOISE[step],
        "init_loss": (1.0 if late else 1.5) + 0.01 * NOISE[200 + step],
    }


def flat(step: int) -> dict[str, Any]:
    """Nothing happens."""
    return jump(step, at=10_000)


class Scripted(SLTMonitor):
    """Fires as any monitor does; what it finds at a step is ``curve(step)``, fields of an estimate.

    Args:
        curve: fields by step.
        influence: of the samples, by step.
    """

    def __init__(
        self,
        curve: Callable[[int], dict[str, Any]] = jump,
        influence: Optional[Callable[[int], InfluenceEstimate]] = None,
        **settings: Any,
    ) -> None:
        if not {"every_n_epochs", "at_steps", "log_spaced"} & set(settings):
            settings.setdefault("every_n_train_steps", 1)
        super().__init__(**{"on_failure": "raise", **settings})
        self._attempts._inside.measure = self._found  # type: ignore[method-assign]
        self._voice.first("overhead")  # a curve costs nothing, and neither do these steps
        self._curve, self._scripted_influence = curve, influence

    def _forget(self) -> None:
        super()._forget()
        self._voice.first("overhead")

    def _found(self, moment: Moment, *_: Any) -> tuple[Estimate, Optional[InfluenceEstimate]]:
        step = moment.step
        influence = self._scripted_influence(step) if self._scripted_influence is not None else None
        fields = {"se": 0.3, "num_chains": 2, "num_draws": 2, "nbeta": 150.0, "num_samples": 1000, **self._curve(step)}
        return make_estimate(**fields), influence


def moved_influence(step: int, at: int = 30) -> InfluenceEstimate:
    """At the jump the samples 70, 30 and 120 change their posterior mean loss most, in this order."""
    estimate = make_influence(step=step)
    loss = estimate.mean_loss.clone()
    if step > at:
        loss += 0.01
        loss[7] += 3.0
        loss[3] -= 2.0
        loss[12] += 1.0
    return estimate.replace(mean_loss=loss)
