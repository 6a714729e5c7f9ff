"""Local files, complete without any server and readable while the run is alive.

==============================  =======================================================================================
``summary.json``                status, settings, number of estimates, and the last one; at the end what measuring cost
``history.csv``                 one row an estimate
``figures/chains_step_*.png``   the chains of each estimate
``figures/history.png``         the learning coefficient over training, at the end
``figures/influence_step_*``    influence between groups; ``suspects_step_*`` the likeliest wrong labels
``tables/*_step_*.csv``         the same as rows; their column ``media`` names a sample
``figures/free_energy_step_*``  the free energies of the two phases of a transition, by the step it became known at
``tables/transitions_step_*``   all transitions so far, whenever something became known; ``transitions.json`` has more
``samples/*.png``, ``*.txt``    what those samples look like, each once
``report.html``                 all of it as one page, at the end of a run that no wandb server has
                                (:mod:`lightning_slt.publish.html`)
==============================  =======================================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from matplotlib.figure import Figure

from lightning_slt.durable import write_whole
from lightning_slt.publish.charts import png
from lightning_slt.publish.sink import Alert, Page, RunCost, plain_config
from lightning_slt.publish.tables import history_csv, to_csv
from lightning_slt.record import Estimate, RunRecord


def _write(path: Path, data: bytes) -> None:
    """In one step, so that a reader or a crash never meets half a file."""
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def encoded(text: str) -> bytes:
    """UTF-8, half characters (of a text cut in the middle, or a tokenizer's) as question marks."""
    return text.encode(errors="replace")


class FilesSink:
    """Publishes to a folder, which is made on the first write.

    Args:
        folder: The run's own folder.

    Attributes:
        cost: what measuring has cost the whole run; None until it is over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cost: Optional[RunCost] = None
        self._config: dict[str, Any] = {}
        self._count = 0
        self._of_run: dict[str, float] = {}
        self._last: Optional[Estimate] = None

    def start(self, config: Mapping[str, Any]) -> None:
        self._config = plain_config(config)
        # a run that is resumed has some already
        known = list(RunRecord(self.folder).read(traces=False))
        self._count = len(known)
        self._summary("running", known[-1] if known else None)

    def estimate(self, estimate: Estimate, figure: Optional[Figure], step: int) -> None:
        self._count += 1
        path = self.folder / "history.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = history_csv([estimate], header=not path.exists())
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(text)
        self._summary("running", estimate)
        if figure is not None:
            _write(
                self.folder / "figures" / f"chains_step_{step if estimate.step is None else estimate.step:09d}.png",
                png(figure),
            )

    def page(self, page: Page, step: int) -> None:
        """``figures/<name>_step_<n>.png``, ``tables/<name>_step_<n>.csv``, ``samples/<id>``; of the numbers only those
        of the whole run, in the summary."""
        step = step if page.step is None else page.step
        if page.summary:
            self._of_run |= page.summary
            self._summary("running", self._last)
        for name, figure in page.pictures.items():
            _write(self.folder / "figures" / f"{name}_step_{step:09d}.png", png(figure))
        for name, table in page.tables.items():
            text = to_csv(table.columns, table.rows)
            _write(self.folder / "tables" / f"{name}_step_{step:09d}.csv", encoded(text))
        for name, sample in page.samples.items():
            path = self.folder / "samples" / name
            if sample.image is not None:
                _write(path.with_suffix(".png"), sample.png())
            else:
                _write(path.with_suffix(".txt"), encoded(sample.text + "\n"))

    def alert(self, alert: Alert, step: int) -> None:
        """Files call nobody."""

    def finish(self, estimates: Sequence[Estimate], status: str, figure: Optional[Figure]) -> None:
        self._count = len(estimates)
        self._summary(status, estimates[-1] if estimates else None)
        # written anew: a resumed run has measured some steps a second time
        _write(self.folder / "history.csv", history_csv(estimates).encode())
        if figure is not None:
            _write(self.folder / "figures" / "history.png", png(figure))

    def _summary(self, status: str, last: Optional[Estimate]) -> None:
        self._last = last
        scalars = None
        if last is not None:
            # JSON has no NaN
            scalars = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in last.scalars().items()
                if k not in ("per_chain", "extra")
            }
        summary = {"status": status, "num_estimates": self._count, "last": scalars, **self._of_run}
        if self.cost is not None:
            summary["cost"] = {"seconds": self.cost.seconds, "run_seconds": self.cost.run_seconds}
        summary["config"] = self._config
        _write(self.folder / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
