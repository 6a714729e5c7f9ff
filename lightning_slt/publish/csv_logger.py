"""``CSVLogger``: one row an estimate in ``metrics.csv``; pictures and tables in files beside it.

Only numbers may go into the row: the writer would put ``<object ...>`` for anything else. Every call makes a row of its
own, also where a training row has the same step, so neither overwrites the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from matplotlib.figure import Figure

from lightning_slt.publish.files import FilesSink
from lightning_slt.publish.keys import metrics_of
from lightning_slt.publish.sink import Alert, Page, plain_config
from lightning_slt.record import Estimate


class CSVSink:
    """Publishes to a ``CSVLogger``.

    Args:
        logger: The logger.
        prefix: The group in front of every column.
        sidecar: Whether to write pictures and tables to ``{logger.log_dir}/{prefix}_media``; not needed where the run
            has a folder of its own.
    """

    def __init__(self, logger: Any, prefix: str = "slt", sidecar: bool = True) -> None:
        self.logger = logger
        self.prefix = prefix
        self._sidecar = sidecar
        self._files: Optional[FilesSink] = None

    def start(self, config: Mapping[str, Any]) -> None:
        # The writer must exist before the sidecar: it empties a log_dir that is not empty when it opens it.
        _ = self.logger.experiment
        self.logger.log_hyperparams({self.prefix: plain_config(config)})
        if self._sidecar:
            self._files = FilesSink(Path(self.logger.log_dir) / f"{self.prefix}_media")
            self._files.start(config)

    def estimate(self, estimate: Estimate, figure: Optional[Figure], step: int) -> None:
        self.logger.log_metrics(metrics_of(estimate, self.prefix), step=step)
        if self._files is not None:
            self._files.estimate(estimate, figure, step)

    def page(self, page: Page, step: int) -> None:
        if page.scalars:
            self.logger.log_metrics(dict(page.scalars), step=step)
        if self._files is not None:
            self._files.page(page, step)

    def alert(self, alert: Alert, step: int) -> None:
        """A CSV file calls nobody."""

    def finish(self, estimates: Sequence[Estimate], status: str, figure: Optional[Figure]) -> None:
        # rows wait in memory for up to flush_logs_every_n_steps steps
        self.logger.save()
        if self._files is not None:
            self._files.finish(estimates, status, figure)
