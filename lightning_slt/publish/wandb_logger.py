"""Weights & Biases. Scalars and the picture of an estimate are one row, at an exact x, that may arrive late.

The row goes through ``WandbLogger.log_metrics``: it carries ``trainer/global_step`` itself and leaves wandb's own step
to wandb. ``run.log(step=N)`` would move that step, and every later training row with a smaller one would be dropped.

Each row moves it on by one, and a user who calls ``wandb.log(..., step=global_step)`` loses the rows that it is ahead
of. So what belongs to one firing is one row, and where training's own row of the same x comes next, a part of that.

wandb keeps a table as an artifact, and asks its server before it does: tables are logged beside training, and are part
of whatever row comes next.
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


def _samples(page: Page) -> list[Any]:
    """The samples of a page that have pictures."""
    import wandb

    return [
        wandb.Image(sample.picture(), caption=name) for name, sample in page.samples.items() if sample.image is not None
    ]


def _tables(page: Page) -> dict[str, Any]:
    """The tables of a page, and one of the samples that are texts."""
    import wandb

    tables = dict(page.tables)
    texts = [[name, sample.text] for name, sample in page.samples.items() if sample.image is None]
    if texts:
        tables["samples"] = Table(("media", "text"), texts)
    return {
        name: wandb.Table(
            columns=list(table.columns), data=[list(values) for values in table.rows], allow_mixed_types=True
        )
        for name, table in tables.items()
    }


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
        self._gathered: Optional[dict[int, dict[str, Any]]] = None
        self._pending: Optional[int] = None
        self._tables: tuple[int, set[str]] = 0, set()

    def gather(self) -> None:
        """What is published from here on is one row for each x, once :meth:`write` is called."""
        self._gathered = {}

    def write(self, joins: Optional[int] = None) -> None:
        """Log what was gathered.

        Args:
            joins: the x of a row that training logs next, which the row of that x here is to be a part of.
        """
        rows, self._gathered = self._gathered or {}, None
        joining = rows.pop(joins, None) if joins is not None and not self._disabled else None
        for x, row in rows.items():
            self.logger.log_metrics(row, step=x)
        if joining is not None:
            self._log_without_commit(joining, joins)
            self._pending = self.logger.experiment.step

    def settle(self) -> None:
        """Where training had no row of its own for what was to be a part of it, it is one by itself."""
        pending, self._pending = self._pending, None
        if pending is not None and self.logger.experiment.step == pending:
            self.logger.experiment.log({}, commit=True)

    def _log(self, row: Mapping[str, Any], x: Optional[int]) -> None:
        if self._gathered is not None and x is not None:
            self._gathered.setdefault(x, {}).update(row)
        else:
            self.logger.log_metrics(row, step=x)

    def _log_without_commit(self, row: Mapping[str, Any], x: Optional[int] = None) -> None:
        """As ``WandbLogger.log_metrics`` has it, but for the commit."""
        own = {f"{self._front}{key}": value for key, value in row.items()}
        if x is not None and not self._by_tensorboard:
            own["trainer/global_step"] = x
        self.logger.experiment.log(own, commit=False)

    def _log_tables(self, tables: Mapping[str, Any]) -> None:
        """As a part of the row that comes next; of one table twice before it comes, each has a row."""
        run, (at, names) = self.logger.experiment, self._tables
        if run.step == at and not names.isdisjoint(tables):
            run.log({}, commit=True)
        self._tables = run.step, (names if run.step == at else set()) | set(tables)
        self._log_without_commit(tables)

    @property
    def _disabled(self) -> bool:
        return bool(getattr(self.logger.experiment, "disabled", False))

    @property
    def _front(self) -> str:
        """What the logger puts in front of every key."""
        user_prefix = getattr(self.logger, "_prefix", "")
        return f"{user_prefix}{self.logger.LOGGER_JOIN_CHAR}" if user_prefix else ""

    @property
    def _by_tensorboard(self) -> bool:
        return bool(getattr(self.logger, "_wandb_init", {}).get("sync_tensorboard"))

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
        axis = "global_step" if self._by_tensorboard else "trainer/global_step"
        for key in keys:
            if key in self._defined:
                continue
            # Exact names: a glob would overlap with the logger's own "*", and wandb resolves that at random. The axis
            # is repeated since an exact definition replaces the one of "*".
            # A count's last value is its summary, under its own name.
            summary = None if key == f"{self.prefix}/transition/count" else "min,max,last"
            self.logger.experiment.define_metric(f"{self._front}{key}", step_metric=axis, summary=summary)
            self._defined.add(key)

    def estimate(self, estimate: Estimate, figure: Optional[Figure], step: int) -> None:
        row: dict[str, Any] = dict(metrics_of(estimate, self.prefix))
        if figure is not None and not self._disabled:
            row[f"{self.prefix}/media/chains"] = _image(figure)
        self._log(row, step)

    def page(self, page: Page, step: int) -> None:
        row: dict[str, Any] = dict(page.scalars)
        found: dict[str, Any] = {}
        if not self._disabled:
            if self._defined:  # the run has begun; names of components and groups are not known before this
                self._define(page.scalars)
            row |= {f"{self.prefix}/media/{name}": _image(figure) for name, figure in page.pictures.items()}
            images, found = _samples(page), _tables(page)
            if images:
                row[f"{self.prefix}/media/samples"] = images
            found = {f"{self.prefix}/tables/{name}": table for name, table in found.items()}
        if found and self.online:
            # in no row of its own, and without an x, which would be that of training's row that comes next
            self._later(lambda: self._log_tables(found))
        else:
            row |= found
        if row:
            self._log(row, step)
        if page.summary and not self._disabled:
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
        self.settle()
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
        if self.online:
            self._later(lambda: self.logger.log_metrics(row, step=x_of(last)))
        else:
            self.logger.log_metrics(row, step=x_of(last))
        if not self._later.wait(LAST_ROWS_SECONDS):
            raise TimeoutError(f"the server did not answer for {LAST_ROWS_SECONDS:g} s; tables may be missing in wandb")
        self._later.check()
