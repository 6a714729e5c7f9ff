"""What a callback must have to be told of the estimates of an SLTMonitor, wherever it stands among the callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional, Protocol

from lightning.pytorch import LightningModule, Trainer

from lightning_slt.publish import RunPublisher
from lightning_slt.record import Estimate
from lightning_slt.transitions import Transition

if TYPE_CHECKING:
    from lightning_slt.callbacks.monitor import SLTMonitor


class EstimateListener(Protocol):
    """Told by :meth:`SLTMonitor.add_listener`, on every rank."""

    def on_estimate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        monitor: SLTMonitor,
        estimate: Estimate,
        publisher: Optional[RunPublisher],
    ) -> None:
        """A firing is done, in the middle of whatever hook it happened in; ``estimate`` is published already."""

    def on_snapshot(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """The weights of a step are set aside: their estimate comes later, when training has left them."""

    def on_monitor_end(self, trainer: Trainer, monitor: SLTMonitor, publisher: RunPublisher) -> Sequence[Transition]:
        """The run is over, finished or failed; what the picture of the history is to mark."""
