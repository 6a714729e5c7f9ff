"""Weights & Biases. Scalars and the picture of an estimate are one row, at an exact x, that may arrive late.

The row goes through ``WandbLogger.log_metrics``: it carries ``trainer/global_step`` itself and leaves wandb's own step
to wandb. ``run.log(step=N)`` would move that step, and every later training row with a smaller one would be dropped.

wandb keeps a table as an artifact, and asks its server before it does: rows with tables are logged beside training.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, Optional

from matplotlib.figure import Figure
from PIL.PngImagePlugin import PngImageFile

from lightning_slt.publish.charts import png
from lightning_slt.publish.keys import ALL_METRIC_NAMES, metrics_of, x_of
from lightning_slt.publish.later import Later
from lightning_slt.publish.sink import Alert, Page, Table, plain_config
from lightning_slt.publish.tables import (
    CHAIN_COLUMNS,
    HISTORY_COLUMNS,
    MAX_WANDB_ROWS,
    chain_rows,
    history_row,
    thinned,
)
from lightning_slt.record import Estimate
from lightning_slt.warned import warn

LAST_ROWS_SECONDS = 60.0
"""How long the end of a run waits for tables whose server does not answer."""


class _Packed(PngImageFile):
    """A picture whose PNG file is known already: wandb would pack it anew, at three times the cost of drawing it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        super().__init__(io.BytesIO(data))

    def save(self, fp: Any, format: Optional[str] = None, **params: Any) -> None:
        if isinstance(fp, (str, os.PathLike)) and os.fspath(fp).endswith(".png"):
            Path(fp).write_bytes(self._data)
        else:
            super().save(fp, format, **params)


def _image(figure: Figure) -> Any:
    import wandb

    return wandb.Image(_Packed(png(figure)))


def _has_names_of(held: Any, settings: Mapping[str, Any]) -> bool:
    return isinstance(held, Mapping) and set(held) == set(settings)


class WandbSink:
    """Publishes to a ``WandbLogger``.

    Args:
        logger: The logger. It brings wandb with it, which is imported nowhere else.
        prefix: The group in front of every key.
    """

    def __init__(self, logger: Any, prefix: str = "slt") -> None:
        self.logger = logger
        self.prefix = prefix
        self._later = Later()
        self._defined: set[str] = set()

    def _log_tables(self, row: Mapping[str, Any], step: Optional[int]) -> None:
        """Log a row that may have tables in it: an online run asks its server first, and must not ask it here."""
        if self.online:
            self._later(lambda: self.logger.log_metrics(row, step=step))
        else:
            self.logger.log_metrics(row, step=step)

    @property
    def online(self) -> bool:
        """Whether results are seen on a server as they come."""
        run = self.logger.experiment
        return not (getattr(run, "disabled", False) or getattr(run, "offline", False))

    def start(self, config: Mapping[str, Any]) -> None:
        run = self.logger.experiment
        if getattr(run, "disabled", False):
            return
        self._define(f"{self.prefix}/{name}" for name in ALL_METRIC_NAMES)
        settings = plain_config(config)
        run.config.update({self._config_key(settings): settings}, allow_val_change=True)
        run.summary[f"{self.prefix}/status"] = "running"

    def _config_key(self, settings: Mapping[str, Any]) -> str:
        """Where the settings are in the run's config: under the prefix, unless something of the user's is there."""
        held = self.logger.experiment.config
        keys = chain([self.prefix, f"{self.prefix}_settings"], (f"{self.prefix}_settings_{n}" for n in count(2)))
        # what has exactly our names is of an earlier fit of this run, or of a run that is resumed
        key = next(key for key in keys if key not in held or _has_names_of(held[key], settings))
        if key != self.prefix:
            warn(
                f"lightning_slt: {self.prefix!r} in the wandb run's config is not the monitor's and is kept; the "
                f"monitor's settings are under {key!r}."
            )
        return key

    def _define(self, keys: Iterable[str]) -> None:
        """How wandb is to sum up these scalars, of those that it has not been told of."""
        user_prefix = getattr(self.logger, "_prefix", "")
        front = f"{user_prefix}{self.logger.LOGGER_JOIN_CHAR}" if user_prefix else ""
        by_tensorboard = getattr(self.logger, "_wandb_init", {}).get("sync_tensorboard")
        axis = "global_step" if by_tensorboard else "trainer/global_step"
        for key in keys:
            if key in self._defined:
                continue
            # Exact names: a glob would overlap with the logger's own "*", and wandb resolves that at random. The axis
            # is repeated since an exact definition replaces the one of "*".
            # A count's last value is its summary, under its own name.
            summary = None if key == f"{self.prefix}/transition/count" else "min,max,last"
            self.logger.experiment.define_metric(f"{front}{key}", step_metric=axis, summary=summary)
            self._defined.add(key)

    def estimate(self, estimate: Estimate, figure: Optional[Figure], step: int) -> None:
        row: dict[str, Any] = dict(metrics_of(estimate, self.prefix))
        if figure is not None and not getattr(self.logger.experiment, "disabled", False):
            row[f"{self.prefix}/media/chains"] = _image(figure)
        self.logger.log_metrics(row, step=step)

    def page(self, page: Page, step: int) -> None:
        row: dict[str, Any] = dict(page.scalars)
        if not getattr(self.logger.experiment, "disabled", False):
            import wandb

            if self._defined:  # the run has begun; names of components and groups are not known before this
                self._define(page.scalars)
            row |= {f"{self.prefix}/media/{name}": _image(figure) for name, figure in page.pictures.items()}
            tables = dict(page.tables)
            texts = [[name, sample.text] for name, sample in page.samples.items() if sample.image is None]
            images = [
                wandb.Image(sample.picture(), caption=name)
                for name, sample in page.samples.items()
                if sample.image is not None
            ]
            if images:
                row[f"{self.prefix}/media/samples"] = images
            if texts:
                tables["samples"] = Table(("media", "text"), texts)
            for name, table in tables.items():
                data = [list(values) for values in table.rows]
                row[f"{self.prefix}/tables/{name}"] = wandb.Table(
                    columns=list(table.columns), data=data, allow_mixed_types=True
                )
        if row:
            self._log_tables(row, step)
        if page.summary and not getattr(self.logger.experiment, "disabled", False):
            for key, value in page.summary.items():
                self.logger.experiment.summary[key] = value
        # last: what an earlier row met is no reason to leave this one out
        self._later.check()

    def alert(self, alert: Alert, step: int) -> None:
        run = self.logger.experiment
        if getattr(run, "disabled", False):
            return
        # the server holds back alerts that come within a minute of each other, unless told to wait for less
        run.alert(title=alert.title, text=alert.text, level="WARN", wait_duration=1)

    def finish(self, estimates: Sequence[Estimate], status: str, figure: Optional[Figure]) -> None:
        run = self.logger.experiment
        if getattr(run, "disabled", False):
            return
        # first, so that a table that fails does not leave a run that says "running" for ever
        run.summary[f"{self.prefix}/status"] = status
        if not estimates:
            return
        import wandb

        last, shown = estimates[-1], thinned(estimates, MAX_WANDB_ROWS)
        row: dict[str, Any] = {
            f"{self.prefix}/tables/history": wandb.Table(
                columns=list(HISTORY_COLUMNS), data=[history_row(e) for e in shown], allow_mixed_types=True
            )
        }
        if last.trace.numel():
            row[f"{self.prefix}/tables/chains"] = wandb.Table(columns=list(CHAIN_COLUMNS), data=chain_rows(last))
        if figure is not None:
            row[f"{self.prefix}/media/history"] = _image(figure)
        self._log_tables(row, x_of(last))
        if not self._later.wait(LAST_ROWS_SECONDS):
            raise TimeoutError(f"the server did not answer for {LAST_ROWS_SECONDS:g} s; tables may be missing in wandb")
        self._later.check()
