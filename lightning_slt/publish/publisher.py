"""One place to hand results to: draws once, writes the local record first, and lets no logger stop the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Optional

from lightning.fabric.utilities.rank_zero import rank_zero_only
from matplotlib.figure import Figure

from lightning_slt.influence_record import InfluenceEstimate, InfluenceRecord
from lightning_slt.publish.chart_rows import CURVE_COLUMNS, curve_rows
from lightning_slt.publish.charts import chains_figure, history_figure, pixels
from lightning_slt.publish.csv_logger import CSVSink
from lightning_slt.publish.files import FilesSink
from lightning_slt.publish.generic import GenericSink
from lightning_slt.publish.influence_charts import influence_figure
from lightning_slt.publish.influence_tables import PAIR_COLUMNS, SUSPECT_COLUMNS, media_id, pair_rows, suspect_rows
from lightning_slt.publish.keys import STATUSES, influence_metrics_of, transition_metrics_of, x_of
from lightning_slt.publish.mlflow_logger import MLflowSink
from lightning_slt.publish.render import Rendered
from lightning_slt.publish.sink import Alert, Page, RunCost, Sink, Table
from lightning_slt.publish.suspect_charts import suspects_figure
from lightning_slt.publish.tables import MAX_WANDB_ROWS, thinned
from lightning_slt.publish.tensorboard import TensorBoardSink
from lightning_slt.publish.trajectory_charts import trajectories_figure
from lightning_slt.publish.transition_charts import free_energy_figure
from lightning_slt.publish.transition_tables import TRANSITION_COLUMNS, transition_rows
from lightning_slt.publish.wandb_logger import WandbSink
from lightning_slt.record import RECORD_FILE, Estimate, RunRecord
from lightning_slt.transition_record import TransitionLog, TransitionReport
from lightning_slt.transitions import Transition
from lightning_slt.warned import speaker, warn


def _is_rank_zero() -> bool:
    # the attribute is set by Lightning's strategies, and on import from the environment
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def _drawn(draw: Callable[..., Optional[Figure]], *args: Any) -> Optional[Figure]:
    """A figure that is known to draw: where it does not, that is no failure of a logger."""
    figure = draw(*args)
    if figure is not None:
        pixels(figure)
    return figure


def is_online(sink: Sink) -> bool:
    """Whether results are seen on a wandb server as they come; any other place is read on this machine."""
    if not isinstance(sink, WandbSink):
        return False
    try:
        return sink.online
    except Exception:  # a logger that cannot say is none to rely on
        return False


def _write_report(folder: Path) -> Path:
    # late: its parts are read from disk, and a run that is watched on a server never needs them
    from lightning_slt.publish.html import write_report

    return write_report(folder)


def sink_for(logger: Any, prefix: str = "slt", has_folder: bool = False) -> Sink:
    """The sink of a Lightning logger.

    Chosen by the names of its classes: no logger's package is imported to find out, and the loggers of ``lightning``,
    of ``pytorch_lightning`` and those derived from them are all known.
    """
    names = {cls.__name__ for cls in type(logger).__mro__}
    if "WandbLogger" in names:
        return WandbSink(logger, prefix)
    if "TensorBoardLogger" in names:
        return TensorBoardSink(logger, prefix)
    if "CSVLogger" in names:
        return CSVSink(logger, prefix, sidecar=not has_folder)
    if "MLFlowLogger" in names:
        return MLflowSink(logger, prefix)
    return GenericSink(logger, prefix)


class RunPublisher:
    """Publishes the estimates of one run to its loggers and to its folder.

    Nothing here raises: what fails is warned about once for each place, and the others go on. On ranks other than zero
    every method does nothing.

    Args:
        loggers: The trainer's loggers.
        folder: The run's own folder for the record and the local files; None writes no files.
        prefix: The group in front of every key.
        media_limit: Pictures of chains in a run. Later estimates are published without one (their traces are in
            the record).

    Attributes:
        report: what :meth:`finish` wrote of the run as one page; None before, and where it wrote none.

    Example:
        >>> publisher = RunPublisher(loggers=[], folder=None)
        >>> publisher.start({"num_chains": 4})
        >>> publisher.finish([], "finished")
    """

    def __init__(
        self, loggers: Sequence[Any], folder: Optional[Path], prefix: str = "slt", media_limit: int = 50
    ) -> None:
        self.prefix = prefix
        self.media_limit = media_limit
        self.report: Optional[Path] = None
        self.record = RunRecord(folder) if folder is not None else None
        # the folder first: a logger may hang on its server until the job is killed
        self._sinks: list[tuple[str, Sink]] = []
        if folder is not None:
            self._sinks.append(("the local files", FilesSink(Path(folder))))
        for logger in loggers:
            self._sinks.append((type(logger).__name__, sink_for(logger, prefix, has_folder=folder is not None)))
        self._num_estimates = 0
        self._num_media = 0
        self.influence_record = InfluenceRecord(folder) if folder is not None else None
        self._num_influences = 0
        self._shown: set[int] = set()
        self._told: Optional[set[tuple[float, bool]]] = None  # alerts sent, by step of the flag and retracted or not
        self._warned: set[int] = set()

    def start(self, config: Mapping[str, Any]) -> None:
        """The run begins.

        Args:
            config: The settings; published under ``prefix``.
        """
        if not _is_rank_zero():
            return
        for i, (name, sink) in enumerate(self._sinks):
            self._guard(i, name, partial(sink.start, config))

    def estimate(self, estimate: Estimate) -> None:
        """Publish one estimate at ``estimate.x`` (else its step, else its number in the order of arrival).

        May be called late and out of order.
        """
        if not _is_rank_zero():
            return
        x = x_of(estimate)
        step = x if x is not None else self._num_estimates
        self._num_estimates += 1
        if self.record is not None:
            self._guard(-1, "the local record", partial(self.record.append, estimate))
        figure: Optional[Figure] = None
        if self._sinks and self._num_media < self.media_limit:
            self._num_media += 1
            figure = self._guard(-2, "the picture of the chains", partial(chains_figure, estimate))
        for i, (name, sink) in enumerate(self._sinks):
            self._guard(i, name, partial(sink.estimate, estimate, figure, step))

    def influence(
        self, estimate: InfluenceEstimate, rendered: Optional[Mapping[int, Rendered]] = None, pairs: bool = False
    ) -> None:
        """Publish one influence estimate at its ``x``.

        Args:
            estimate: what was measured.
            rendered: how the suspects look, by index in the training data.
            pairs: whether single pairs are shown, those above 3 standard errors.
        """
        if not _is_rank_zero():
            return
        x = estimate.x if estimate.x is not None else estimate.step
        step = x if x is not None else self._num_influences
        self._num_influences += 1
        if self.influence_record is not None:
            # of a small budget single pairs do not repeat: not worth tens of MB a firing
            kept = estimate if pairs else estimate.without_pairs()
            self._guard(-4, "the local record of influence", partial(self.influence_record.save, kept))
        page = self._guard(-5, "the tables of influence", partial(self._page, estimate, rendered or {}, pairs))
        if page is not None:
            self.page(page, step)

    def _page(self, estimate: InfluenceEstimate, rendered: Mapping[int, Rendered], pairs: bool) -> Page:
        pictures: dict[str, Figure] = {}
        if self._sinks and self._num_influences <= self.media_limit:
            # each by itself: a sample that cannot be drawn must not take the numbers and the tables with it
            found = {
                "influence": self._guard(-8, "the picture of influence", partial(_drawn, influence_figure, estimate)),
                "suspects": self._guard(-9, "the suspects", partial(_drawn, suspects_figure, estimate, rendered)),
            }
            pictures = {name: figure for name, figure in found.items() if figure is not None}
        tables = {"influence_top": Table(SUSPECT_COLUMNS, suspect_rows(estimate))} if len(estimate.train_index) else {}
        if pairs:
            tables |= self._pairs(estimate)
        fresh = {media_id(i): sample for i, sample in rendered.items() if i not in self._shown}
        self._shown |= set(rendered)
        return Page(influence_metrics_of(estimate, self.prefix), pictures, tables, fresh, estimate.step)

    @staticmethod
    def _pairs(estimate: InfluenceEstimate) -> dict[str, Table]:
        """The pairs that stand out of their errors; no table where none does."""
        rows = pair_rows(estimate)
        return {"influence_pairs": Table(PAIR_COLUMNS, rows)} if rows else {}

    def finish_influence(self, history: Sequence[InfluenceEstimate]) -> None:
        """The run is over: trajectories of the samples that changed most, and the pairs of the last estimate."""
        if not _is_rank_zero() or not history:
            return
        if self.influence_record is not None and history[-1].matrix.numel():
            self._guard(-4, "the local record of influence", partial(self.influence_record.save, history[-1]))
        if not self._sinks:
            return
        figure = self._guard(-6, "the trajectories", partial(_drawn, trajectories_figure, history))
        last = history[-1]
        tables = self._guard(-7, "the pairs", partial(self._pairs, last)) or {}
        x = last.x if last.x is not None else last.step
        page = Page({}, {"trajectories": figure} if figure is not None else {}, tables, step=last.step)
        if page.pictures or page.tables:
            self.page(page, x if x is not None else self._num_influences)

    def transition_point(
        self,
        score: float,
        log: TransitionLog,
        flag: bool,
        x: int,
        step: int,
        changed: Sequence[TransitionReport] = (),
        alert: bool = True,
    ) -> None:
        """Publish what one point of the curve has made known: its score, and new or newly judged transitions.

        Args:
            score: of the detector.
            log: all transitions so far, those of this point included.
            flag: whether a transition became known.
            x: the logger's step.
            step: the optimiser step.
            changed: transitions that are new, confirmed or retracted.
            alert: whether a person is told of new and of retracted ones.
        """
        if not _is_rank_zero():
            return
        standing = log.standing
        odds = next((r.tempered for r in reversed(log.reports) if r.transition.state != "retracted"), None)
        scalars = transition_metrics_of(
            score, log.threshold, flag, len(standing), odds.log_odds if odds is not None else None, self.prefix
        )
        if not changed:
            self.page(Page(scalars, step=step), x)
            return
        told = self._alerts_sent()  # before the record is written anew
        self.page(self._transition_page(scalars, log, changed, step), x)
        for report in changed:
            t = report.transition
            key = (t.known_at, t.state == "retracted")
            if t.state != "confirmed" and key not in told:
                told.add(key)
                if alert:
                    self._alert(report, x)

    def _alerts_sent(self) -> set[tuple[float, bool]]:
        """What a person has been told of already. A run that crashed after a flag and is resumed from a checkpoint
        before it finds the flag again; the record in its folder knows of it."""
        if self._told is None:
            self._told = set()
            log = None  # none there, or one that cannot be read: rather told twice than not at all
            if self.record is not None:
                with suppress(OSError, ValueError, KeyError, TypeError):
                    log = TransitionLog.read(self.record.folder)
            for t in (report.transition for report in log.reports) if log is not None else ():
                self._told |= {(t.known_at, False)} | ({(t.known_at, True)} if t.state == "retracted" else set())
        return self._told

    def _transition_page(
        self, scalars: Mapping[str, float], log: TransitionLog, changed: Sequence[TransitionReport], step: int
    ) -> Page:
        if self.record is not None:
            self._guard(-10, "the local record of transitions", partial(log.write, self.record.folder))
        pictures: dict[str, Figure] = {}
        for report in changed if self._sinks else ():
            if report.transition.state != "retracted":
                figure = self._guard(-11, "the free energies", partial(_drawn, free_energy_figure, report))
                pictures |= {"free_energy": figure} if figure is not None else {}
        standing = log.standing
        summary = {
            f"{self.prefix}/transition/count": float(len(standing)),
            # a run's summary cannot be taken back: -1 stands for none, after a retraction
            f"{self.prefix}/transition/last_step": float(standing[-1].step) if standing else -1.0,
        }
        table = Table(TRANSITION_COLUMNS, transition_rows(log))
        return Page(scalars, pictures, {"transitions": table} if table.rows else {}, step=step, summary=summary)

    def _alert(self, report: TransitionReport, x: int) -> None:
        t = report.transition
        what = "retracted" if t.state == "retracted" else f"kind {t.kind}"
        title = f"{self.prefix}: transition {t.id} at step {t.step:.0f}, {what}"
        alert = Alert(f"transition_{t.id}", title, report.sentence())
        for i, (name, sink) in enumerate(self._sinks):
            self._guard(i, name, partial(sink.alert, alert, x))

    def finish_transitions(self, log: TransitionLog, x: int, step: int) -> None:
        """The run is over: all transitions once more, beside those of the whole curve.

        Call before :meth:`finish`, whose picture of the history marks them.
        """
        if not _is_rank_zero():
            return
        last = [report for report in log.reports if report.transition.state != "retracted"][-1:]
        self.page(self._transition_page({}, log, last, step), x)

    def page(self, page: Page, step: int) -> None:
        """What else there is to show at ``step``, to every sink; one that fails is warned about once."""
        for i, (name, sink) in enumerate(self._sinks):
            self._guard(i, name, partial(sink.page, page, step))

    @contextmanager
    def one_row(self, joins: Optional[int] = None) -> Iterator[None]:
        """What is published inside at one x is one row of a wandb run; other loggers have it as it comes.

        Args:
            joins: the x of a row that training logs right after, which what has that x here becomes a part of. Call
                :meth:`settle` when training has gone on.
        """
        sinks = [(i, name, sink) for i, (name, sink) in enumerate(self._sinks) if isinstance(sink, WandbSink)]
        sinks = sinks if _is_rank_zero() else []
        for _, _, sink in sinks:
            sink.gather()
        try:
            yield
        finally:
            for i, name, sink in sinks:
                self._guard(i, name, partial(sink.write, joins))

    def settle(self) -> None:
        """Training has gone on: what was to be a part of a row that never came is a row by itself."""
        for i, (name, sink) in enumerate(self._sinks):
            if isinstance(sink, WandbSink):
                self._guard(i, name, sink.settle)

    def finish(
        self,
        estimates: Sequence[Estimate],
        status: str,
        transitions: Sequence[Transition] = (),
        cost: Optional[RunCost] = None,
    ) -> None:
        """The run is over: the history as one table and one picture, and the status.

        Args:
            estimates: Everything that was measured, those before a resume included.
            status: ``"finished"`` or ``"failed"``.
            transitions: What the picture of the history marks.
            cost: What measuring cost, which the local files keep; None where that is not known.

        Raises:
            ValueError: if ``status`` is not one of :data:`~lightning_slt.publish.keys.STATUSES`.
        """
        if status not in STATUSES:
            raise ValueError(f"status is {status!r}; it must be one of {', '.join(STATUSES)}")
        if not _is_rank_zero():
            return
        figure: Optional[Figure] = None
        if self._sinks and estimates:
            figure = self._guard(-3, "the picture of the history", partial(history_figure, estimates, transitions))
            self._curve(estimates, transitions)
        for i, (name, sink) in enumerate(self._sinks):
            if isinstance(sink, FilesSink):
                sink.cost = cost
            self._guard(i, name, partial(sink.finish, estimates, status, figure))
        if self.record is None or not (self.record.folder / RECORD_FILE).exists():
            return  # no folder, or one that could not be written, as has been said
        if not any(is_online(sink) for _, sink in self._sinks):
            self.report = self._guard(-13, "the report", partial(_write_report, self.record.folder))

    def _curve(self, estimates: Sequence[Estimate], transitions: Sequence[Transition]) -> None:
        """The curve with its transitions as rows: what wandb's custom chart of it draws."""
        sinks = [(i, name, sink) for i, (name, sink) in enumerate(self._sinks) if isinstance(sink, WandbSink)]
        if not sinks:
            return
        shown = thinned(estimates, MAX_WANDB_ROWS - len(transitions))
        rows = self._guard(-12, "the rows of the curve", partial(curve_rows, shown, transitions))
        x = x_of(estimates[-1])
        for i, name, sink in sinks if rows else ():
            page = Page(tables={"curve": Table(CURVE_COLUMNS, rows)}, step=estimates[-1].step)
            self._guard(i, name, partial(sink.page, page, x if x is not None else self._num_estimates))

    def _guard(self, place: int, name: str, call: Callable[[], Any]) -> Any:
        """Call it; warn at the first failure of this place and return None."""
        try:
            return call()
        except Exception as error:
            if place not in self._warned:
                self._warned.add(place)
                said = f"{type(error).__name__}: {error}".rstrip(".")
                if self.record is not None and name.startswith("the local") and isinstance(error, OSError):
                    said += f". {self.record.folder} could not be written: name another folder with dirpath="
                # whose it is, where several monitors publish to the same place
                warn(
                    f"{speaker(self.prefix, kind='lightning_slt')} could not publish to {name}: {said}. Training and "
                    "the other loggers go on; further failures there are not reported."
                )
            return None
