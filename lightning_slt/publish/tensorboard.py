"""TensorBoard: scalars, pictures in IMAGES, the history and the settings as Markdown in TEXT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from matplotlib.figure import Figure

from lightning_slt.publish.charts import pixels
from lightning_slt.publish.keys import metrics_of, x_of
from lightning_slt.publish.sink import Alert, Page, plain_config
from lightning_slt.publish.tables import history_markdown, to_markdown
from lightning_slt.record import Estimate
from lightning_slt.warned import warn


class TensorBoardSink:
    """Publishes to a ``TensorBoardLogger``.

    Args:
        logger: The logger; its ``experiment`` is a ``SummaryWriter``.
        prefix: The group in front of every tag.
    """

    def __init__(self, logger: Any, prefix: str = "slt") -> None:
        self.logger = logger
        self.prefix = prefix

    def start(self, config: Mapping[str, Any]) -> None:
        # As text: log_hyperparams would add an "hp_metric" and a second hparams session to the user's own.
        table = to_markdown(("setting", "value"), [[k, str(v)] for k, v in plain_config(config).items()])
        self.logger.experiment.add_text(f"{self.prefix}/config", table, 0)
        self.logger.experiment.add_text(f"{self.prefix}/status", "running", 0)

    def estimate(self, estimate: Estimate, figure: Optional[Figure], step: int) -> None:
        self.logger.log_metrics(metrics_of(estimate, self.prefix), step=step)
        if figure is not None:
            self._add_figure("media/chains", figure, step)

    def page(self, page: Page, step: int) -> None:
        if page.scalars:
            self.logger.log_metrics(dict(page.scalars), step=step)
        for name, figure in page.pictures.items():
            self._add_figure(f"media/{name}", figure, step)
        for name, sample in page.samples.items():
            if sample.image is not None:
                form = "HW" if sample.image.ndim == 2 else "HWC"
                tag = f"{self.prefix}/media/samples/{name}"
                self.logger.experiment.add_image(tag, sample.image, step, dataformats=form)
        texts = [(name, sample.text) for name, sample in page.samples.items() if sample.image is None]
        if texts:
            self.logger.experiment.add_text(
                f"{self.prefix}/tables/samples", to_markdown(("media", "text"), texts), step
            )
        for name, table in page.tables.items():
            self.logger.experiment.add_text(
                f"{self.prefix}/tables/{name}", to_markdown(table.columns, table.rows), step
            )

    def alert(self, alert: Alert, step: int) -> None:
        # TensorBoard calls nobody: the console does
        self.logger.experiment.add_text(f"{self.prefix}/alerts/{alert.name}", f"**{alert.title}** {alert.text}", step)
        warn(f"{alert.title}: {alert.text}")

    def finish(self, estimates: Sequence[Estimate], status: str, figure: Optional[Figure]) -> None:
        step = x_of(estimates[-1]) if estimates else 0
        self.logger.experiment.add_text(f"{self.prefix}/status", status, step)
        if estimates:
            self.logger.experiment.add_text(f"{self.prefix}/tables/history", history_markdown(estimates), step)
        if figure is not None:
            self._add_figure("media/history", figure, step)
        # the writer flushes every 120 s: a process that is killed after the failure would lose these
        self.logger.experiment.flush()

    def _add_figure(self, name: str, figure: Figure, step: Optional[int]) -> None:
        # add_figure is add_image behind an import of pyplot, and pyplot's state belongs to the user
        self.logger.experiment.add_image(f"{self.prefix}/{name}", pixels(figure)[..., :3], step, dataformats="HWC")
