"""Any other Lightning logger: scalars, and what a Comet experiment can do where the logger has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from matplotlib.figure import Figure

from lightning_slt.publish.keys import metrics_of, x_of
from lightning_slt.publish.sink import Alert, Page, plain_config
from lightning_slt.publish.tables import HISTORY_COLUMNS, history_row
from lightning_slt.record import Estimate


class GenericSink:
    """Publishes to a logger of which only ``log_metrics`` is known.

    Args:
        logger: The logger. Where its ``experiment`` has Comet's ``log_figure``, ``log_table`` and ``log_other``, they
            are used; a logger without them gets scalars only, since media may raise there.
        prefix: The group in front of every key.
    """

    def __init__(self, logger: Any, prefix: str = "slt") -> None:
        self.logger = logger
        self.prefix = prefix

    def start(self, config: Mapping[str, Any]) -> None:
        self.logger.log_hyperparams({self.prefix: plain_config(config)})
        self._comet("log_other", f"{self.prefix}/status", "running")

    def estimate(self, estimate: Estimate, figure: Optional[Figure], step: int) -> None:
        self.logger.log_metrics(metrics_of(estimate, self.prefix), step=step)
        if figure is not None:
            self._comet("log_figure", figure_name=f"{self.prefix}/media/chains", figure=figure, step=step)

    def page(self, page: Page, step: int) -> None:
        if page.scalars:
            self.logger.log_metrics(dict(page.scalars), step=step)
        for name, figure in page.pictures.items():
            self._comet("log_figure", figure_name=f"{self.prefix}/media/{name}", figure=figure, step=step)
        for name, table in page.tables.items():
            rows = [list(row) for row in table.rows]
            file = f"{self.prefix}_{name}_step_{step:09d}.csv"
            self._comet("log_table", file, tabular_data=rows, headers=list(table.columns))

    def alert(self, alert: Alert, step: int) -> None:
        send = getattr(getattr(self.logger, "experiment", None), "send_notification", None)
        if callable(send):
            self._comet("send_notification", title=alert.title, additional_data={"text": alert.text, "step": step})

    def finish(self, estimates: Sequence[Estimate], status: str, figure: Optional[Figure]) -> None:
        self._comet("log_other", f"{self.prefix}/status", status)
        if estimates:
            rows = [history_row(e) for e in estimates]
            self._comet("log_table", f"{self.prefix}_history.csv", tabular_data=rows, headers=list(HISTORY_COLUMNS))
        if figure is not None:
            step = x_of(estimates[-1]) if estimates else None
            self._comet("log_figure", figure_name=f"{self.prefix}/media/history", figure=figure, step=step)

    def _comet(self, method: str, *args: Any, **kwargs: Any) -> None:
        # All three names, not one: another logger's experiment may have a log_figure that takes something else.
        experiment = getattr(self.logger, "experiment", None)
        if all(callable(getattr(experiment, name, None)) for name in ("log_other", "log_figure", "log_table")):
            getattr(experiment, method)(*args, **kwargs)
