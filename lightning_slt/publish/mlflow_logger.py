"""MLflow: metrics, settings as parameters, pictures and the history as artifacts, the status as a tag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from matplotlib.figure import Figure

from lightning_slt.publish.keys import metrics_of
from lightning_slt.publish.sink import Alert, Page, plain_config
from lightning_slt.publish.tables import history_csv, to_csv
from lightning_slt.record import Estimate


class MLflowSink:
    """Publishes to an ``MLFlowLogger``.

    Args:
        logger: The logger; its ``experiment`` is an ``MlflowClient``.
        prefix: The group in front of every key, and the artifact folder.
    """

    def __init__(self, logger: Any, prefix: str = "slt") -> None:
        self.logger = logger
        self.prefix = prefix

    def start(self, config: Mapping[str, Any]) -> None:
        self._tag("running")
        # last, since MLflow refuses a parameter that a resumed run gives another value
        self.logger.log_hyperparams({self.prefix: plain_config(config)})

    def estimate(self, estimate: Estimate, figure: Optional[Figure], step: int) -> None:
        self.logger.log_metrics(metrics_of(estimate, self.prefix), step=step)
        if figure is not None:
            path = f"{self.prefix}/media/chains_step_{step:09d}.png"
            self.logger.experiment.log_figure(self.logger.run_id, figure, path)

    def page(self, page: Page, step: int) -> None:
        if page.scalars:
            self.logger.log_metrics(dict(page.scalars), step=step)
        client, run = self.logger.experiment, self.logger.run_id
        for name, figure in page.pictures.items():
            client.log_figure(run, figure, f"{self.prefix}/media/{name}_step_{step:09d}.png")
        for name, sample in page.samples.items():
            path = f"{self.prefix}/media/samples/{name}"
            if sample.image is not None:
                client.log_image(run, sample.picture(), f"{path}.png")
            else:
                client.log_text(run, sample.text, f"{path}.txt")
        for name, table in page.tables.items():
            client.log_text(run, to_csv(table.columns, table.rows), f"{self.prefix}/tables/{name}_step_{step:09d}.csv")

    def alert(self, alert: Alert, step: int) -> None:
        # a tag is what MLflow's list of runs can be filtered by
        self.logger.experiment.set_tag(
            self.logger.run_id, f"{self.prefix}/{alert.name}", f"{alert.title}: {alert.text}"
        )

    def finish(self, estimates: Sequence[Estimate], status: str, figure: Optional[Figure]) -> None:
        self._tag(status)
        if estimates:
            # As CSV, which MLflow's page shows as a table: log_table needs pandas, and appends to what a run that was
            # resumed had logged before.
            path = f"{self.prefix}/tables/history.csv"
            self.logger.experiment.log_text(self.logger.run_id, history_csv(estimates), path)
        if figure is not None:
            path = f"{self.prefix}/media/history.png"
            self.logger.experiment.log_figure(self.logger.run_id, figure, path)

    def _tag(self, status: str) -> None:
        self.logger.experiment.set_tag(self.logger.run_id, f"{self.prefix}/status", status)
