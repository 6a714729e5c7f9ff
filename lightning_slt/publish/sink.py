"""What a place that results are sent to must be able to do, and how a sink is chosen for a logger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol, runtime_checkable

from matplotlib.figure import Figure

from lightning_slt.publish.render import Rendered
from lightning_slt.record import Estimate


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of plain values under named columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Page:
    """Anything else that is published at a step: numbers, pictures, tables, and samples that tables refer to.

    Attributes:
        scalars: by full key, the prefix included.
        pictures, tables: by name; the sink puts them where its logger keeps such things.
        step: the optimiser step that files are named by; None for the logger's.
        samples: by the id that tables have in their column ``media``; those not published before.
        summary: what is true of the whole run so far, by full key; where a logger has no such place it is left out.
    """

    scalars: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, Figure] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    samples: Mapping[str, Rendered] = field(default_factory=dict)
    step: Optional[int] = None
    summary: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Alert:
    """Something that a person should hear of at once.

    Attributes:
        name: ``[a-z0-9_]``, the same for all alerts about one thing.
        title: short, and of its own for every alert: wandb holds back those of the same title.
        text: a sentence or two.
    """

    name: str
    title: str
    text: str


@dataclass(frozen=True)
class RunCost:
    """What measuring has cost a run that is over, by the clock of one monitor.

    Attributes:
        seconds: of measuring, waiting for workers too.
        run_seconds: of the whole run, these included.
    """

    seconds: float
    run_seconds: float

    @property
    def share(self) -> float:
        """Of the run's wall-clock."""
        return self.seconds / max(self.run_seconds, 1e-9)


@runtime_checkable
class Sink(Protocol):
    """One place that results go to. A method may raise; :class:`~lightning_slt.publish.RunPublisher` guards it."""

    def start(self, config: Mapping[str, Any]) -> None:
        """The run begins with these settings; the status becomes ``"running"``."""

    def estimate(self, estimate: Estimate, figure: Optional[Figure], step: int) -> None:
        """One result at logger step ``step``; ``figure`` is None where the limit on pictures has been reached."""

    def page(self, page: Page, step: int) -> None:
        """Numbers, pictures and tables at logger step ``step``."""

    def alert(self, alert: Alert, step: int) -> None:
        """Tell a person, in the way that this place has for it; where it has none, nothing happens."""

    def finish(self, estimates: Sequence[Estimate], status: str, figure: Optional[Figure]) -> None:
        """All results, the final status, and the history figure (None where nothing was measured)."""


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON types: YAML and protobuf writers fail on anything else.

    What JSON does not know becomes text (a path, a dtype); NaN and infinity become None.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(config), default=str), parse_constant=lambda _: None)
    return plain
