"""One firing of a run, and what it leaves to the next: the same for chains inside training, beside it and after it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from torch import Tensor

from lightning_slt.estimate import ChainSettings, default_localization, measure_llc
from lightning_slt.influence import ProbeSet, measure_both
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.reasons import Kind
from lightning_slt.record import Estimate
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.chains import Progress
from lightning_slt.sampling.collective import Collective
from lightning_slt.sampling.layout import Layout
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.objective import Objective


def firing_settings(**chosen: Any) -> ChainSettings:
    """What is asked of the chains of a firing: shorter than a call of its own, since a curve has many points.

    Args:
        chosen: fields of :class:`~lightning_slt.estimate.ChainSettings`.

    Raises:
        ValueError: for one out of range.

    Example:
        >>> firing_settings(num_chains=4).tolerance
        0.05
    """
    return ChainSettings(tolerance=0.05, max_steps_bw_draws=4, **chosen)


@dataclass
class Course:
    """What the firings of one run have in common, and hand on from one to the next.

    Attributes:
        localization: gamma of the run; None until the first firing has chosen it.
        method: how chains are computed; ``"sequential"`` from the first firing on that had to be.
        warm_start: chains start from the displacements of an earlier firing.
        memory: those displacements, and the step size.
        coupled: whether the loss depends on which samples are together in a batch, as far as it is known: the points of
            a curve have minibatches of one kind.
        method_reason: why chains go one after another from some firing on, where nobody asked for it.
    """

    localization: Optional[float] = None
    method: str = "auto"
    warm_start: bool = True
    memory: ChainMemory = field(default_factory=ChainMemory)
    method_reason: str = ""
    coupled: Optional[bool] = None

    def measure(
        self,
        objective: Objective,
        source: MinibatchSource,
        settings: ChainSettings,
        probes: Optional[ProbeSet] = None,
        collective: Optional[Collective] = None,
        progress: Optional[Progress] = None,
        smoke_test: bool = False,
    ) -> tuple[Estimate, Optional[InfluenceEstimate]]:
        """Measure once: the one function behind every road to a point of a run's curve.

        Args:
            objective, source, collective, progress: see :func:`~lightning_slt.estimate.measure_llc`.
            settings: what is asked of the chains; its ``localization`` and ``method`` are those of the run.
            probes: samples whose influence is read from the same chains; None for none.
            smoke_test: the next firing is none of this run's: it gets nothing from this one.

        Returns:
            The estimate, and the influence where there are probes.

        Raises:
            NonFiniteLossError, NoLossError, ValueError: as :func:`~lightning_slt.estimate.measure_llc`.
        """
        self.settle(objective.anchor, objective.layout)
        if source.coupled is None:
            source.coupled = self.coupled
        settings = dataclasses.replace(settings, localization=self.localization, method=self.method)
        memory = None if smoke_test else self.memory
        influence: Optional[InfluenceEstimate] = None
        if probes is not None:
            estimate, influence = measure_both(objective, source, settings, probes, collective, progress, memory)
        else:
            estimate = measure_llc(objective, source, settings, collective, progress, memory)
        if not smoke_test:
            self.coupled = source.coupled
        if memory is not None and not {Kind.GRADIENT.name, Kind.OSCILLATES.name}.isdisjoint(estimate.kinds):
            memory.forget()  # lines are looked along where chains begin anew
        if not self.warm_start:
            self.memory = ChainMemory(lr=self.memory.lr)
        if estimate.method == "sequential":
            # it always works, so it stays: another path rounds otherwise, and points would not share their noise
            if self.method != "sequential":
                self.method, self.method_reason = "sequential", estimate.method_reason
            elif self.method_reason:
                estimate = estimate.replace(method_reason=self.method_reason)
        return estimate, influence

    def settle(self, anchor: Tensor, layout: Optional[Layout] = None) -> None:
        """Choose gamma at the first weights that are finite, and keep it: points of one curve are of one posterior.

        Args:
            anchor: ``[d]``, the weights that move.
            layout: which of them ``anchor`` has; None for all.
        """
        if self.localization is None and (layout or Layout(anchor.numel())).all_finite(anchor):
            self.localization = default_localization(anchor, layout)

    def go_on_from(self, estimates: Sequence[Estimate]) -> None:
        """Points of this run that were measured before: the curve stays in the region of the first with a loss."""
        if self.localization is None:
            found = (estimate.localization for estimate in estimates if math.isfinite(estimate.init_loss))
            self.localization = next(found, None)

    def forget(self, localization: Optional[float], method: str) -> None:
        """Another run, which hands on nothing yet; with what is asked for it."""
        self.localization, self.method, self.method_reason = localization, method, ""
        self.memory, self.coupled = ChainMemory(), None

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors; displacements only where they are small."""
        return {
            "localization": self.localization,
            "method": self.method,
            "method_reason": self.method_reason,
            "coupled": self.coupled,
            "memory": self.memory.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. One of before it was asked has minibatches that come back, and keeps them."""
        self.localization = state["localization"]
        self.method = state.get("method", self.method)
        self.method_reason = state.get("method_reason", "")
        self.coupled = state.get("coupled", False)
        self.memory.load_state_dict(state["memory"])
