"""Whole runs with the loggers that people have, each read by its own reader; and loggers that fail in every way."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Optional

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

from lightning_slt import SLTMonitor, TransitionMonitor
from lightning_slt.record import RunRecord
from tests.integration.harness import RecordingLogger, Scenario, TrainingTrace, assert_same, steps_of, tiny_monitor
from tests.integration.models import AsksItsLoggers, Net, Plain, loaders, with_validation

PROBED = 8
EXPECTED_X = [3, 7, 11]
"""Where values after the steps 4, 8 and 12 belong: above the loss of the batch that made the step."""


def train(folder: Path, *loggers: Any) -> tuple[SLTMonitor, TrainingTrace]:
    """A run with everything that is published: estimates, influence with its tables, transitions."""
    monitor = tiny_monitor(num_draws=20, probe=PROBED, query=4)
    trainer = {"logger": list(loggers) or False, "log_every_n_steps": 1, "callbacks": [TransitionMonitor()]}
    trace = Scenario(Net, with_validation, lambda: dict(trainer)).run(folder, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    return monitor, trace


def llc_of(monitor: SLTMonitor) -> list[tuple[Optional[int], float]]:
    return [(e.x, e.mean) for e in monitor.estimates]


def test_tensorboard_csv_and_mlflow_in_one_run(
    pictures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip("tensorboard")
    mlflow = pytest.importorskip("mlflow")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the database backend needs sqlalchemy
    tensorboard, table = TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv", "run", "0")
    flow = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")
    monitor, _ = train(tmp_path, tensorboard, table, flow)
    assert not [w for w in recwarn if "could not publish" in str(w.message)]
    assert [x for x, _ in llc_of(monitor)] == EXPECTED_X
    wanted = [(x, pytest.approx(mean, rel=1e-6)) for x, mean in llc_of(monitor)]  # TensorBoard keeps 32 bits

    events = EventAccumulator(tensorboard.log_dir, size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("slt/llc/mean")] == wanted
    assert [e.step for e in events.Scalars("slt/transition/score")] == EXPECTED_X
    assert [e.step for e in events.Scalars("loss_step")] == list(range(12))
    assert {"slt/media/chains", "slt/media/history", "slt/media/suspects"} <= set(events.Tags()["images"])
    assert "slt/tables/influence_top/text_summary" in events.Tags()["tensors"]

    with open(tmp_path / "csv/run/0/metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["slt/llc/mean"]]
    assert [(int(row["step"]), float(row["slt/llc/mean"])) for row in rows] == wanted

    client = mlflow.tracking.MlflowClient(f"file:{tmp_path}/mlruns")
    history = client.get_metric_history(flow.run_id, "slt/llc/mean")
    assert [(m.step, m.value) for m in history] == wanted
    assert client.get_run(flow.run_id).data.tags["slt/status"] == "finished"
    media = {artifact.path for artifact in client.list_artifacts(flow.run_id, "slt/media")}
    assert {"slt/media/history.png", "slt/media/chains_step_000000011.png"} <= media
    tables = {artifact.path for artifact in client.list_artifacts(flow.run_id, "slt/tables")}
    assert {"slt/tables/history.csv", "slt/tables/influence_top_step_000000011.csv"} <= tables


@pytest.mark.parametrize("execution", ["inline", pytest.param("background", marks=pytest.mark.slow)])
def test_a_step_that_uses_its_loggers_logs_its_training_alone(execution: str, tmp_path: Path) -> None:
    def train(name: str, *callbacks: Any) -> tuple[TrainingTrace, RecordingLogger, CSVLogger]:
        rows, table = RecordingLogger(), CSVLogger(tmp_path / name, "four", 3)
        scenario = Scenario(lambda: AsksItsLoggers(lr=0.0), loaders, lambda: {"logger": [table, rows]})
        trace = scenario.run(tmp_path / name, *callbacks)
        trace.rows = rows.of_training()
        return trace, rows, table

    beside = {"devices": ["cpu"], "max_pending": 3} if execution == "background" else {}
    monitor, plain = tiny_monitor(execution=execution, **beside), tiny_monitor()
    without, _, table = train("without")
    measured, rows, measured_table = train("with", monitor)
    assert_same(without, measured)
    assert len([row for row, _ in rows.rows if "by hand" in row]) == 12
    by_hand = [(Path(t.log_dir) / "metrics.csv").read_text().count("1.0") for t in (table, measured_table)]
    assert by_hand[0] == by_hand[1] >= 12
    Scenario(lambda: Plain(lr=0.0), loaders).run(tmp_path / "plain", plain)
    assert steps_of(monitor) == steps_of(plain) == [4, 8, 12]
    for ours, theirs in zip(monitor.estimates, plain.estimates, strict=True):
        # twice for a CSVLogger, times the four letters of its name
        assert ours.init_loss == pytest.approx(8 * theirs.init_loss, rel=1e-5)


class CometExperiment:
    """The methods of a Comet experiment that are called, with the arguments that they have there; they keep what comes.

    Comet's own package asks for a key and a server, so it is not used here.
    """

    def __init__(self) -> None:
        self.figures: list[tuple[Optional[str], Optional[int]]] = []
        self.tables: dict[str, list[list[Any]]] = {}
        self.others: list[tuple[Any, Any]] = []

    def log_figure(
        self,
        figure_name: Optional[str] = None,
        figure: Any = None,
        overwrite: bool = False,
        step: Optional[int] = None,
        metadata: Optional[dict[str, Any]] = None,
        format: str = "auto",
    ) -> None:
        assert hasattr(figure, "savefig")
        self.figures.append((figure_name, step))

    def log_table(self, filename: str, tabular_data: Any = None, headers: Any = False, **format_kwargs: Any) -> None:
        assert filename.endswith((".csv", ".tsv", ".json", ".html"))  # the kinds that Comet shows
        assert all(len(row) == len(headers) for row in tabular_data)
        self.tables[filename] = tabular_data

    def log_other(self, key: Any, value: Any) -> None:
        self.others.append((key, value))

    def send_notification(
        self, title: str, status: Optional[str] = None, additional_data: Optional[dict[str, Any]] = None
    ) -> None: ...


class CometLogger(RecordingLogger):
    def __init__(self) -> None:
        super().__init__()
        self.comet = CometExperiment()

    @property
    def experiment(self) -> CometExperiment:
        return self.comet


def test_comet_gets_numbers_figures_and_tables(
    pictures: None, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    logger = CometLogger()
    monitor, _ = train(tmp_path, logger)
    assert not [w for w in recwarn if "could not publish" in str(w.message)]
    llc = [(x, metrics["slt/llc/mean"]) for metrics, x in logger.of_callback() if "slt/llc/mean" in metrics]
    assert llc == llc_of(monitor)
    comet = logger.comet
    assert comet.others == [("slt/status", "running"), ("slt/status", "finished")]
    assert [step for name, step in comet.figures if name == "slt/media/chains"] == EXPECTED_X
    assert ("slt/media/history", 11) in comet.figures
    assert len(comet.tables["slt_history.csv"]) == 3
    assert len(comet.tables["slt_influence_top_step_000000011.csv"]) == PROBED


def test_no_logger_at_all_leaves_the_record(tmp_path: Path) -> None:
    monitor, _ = train(tmp_path)
    assert monitor.folder is not None
    assert [(e.x, e.mean) for e in RunRecord(monitor.folder).read()] == llc_of(monitor)


@pytest.mark.parametrize("root", ["here", "memory://root"])
def test_with_a_logger_on_a_remote_filesystem_the_record_is_local(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    monitor, logger = tiny_monitor(), CSVLogger(f"memory://logs-{tmp_path.name}", "run", "0")
    settings = {"logger": logger, "default_root_dir": str(tmp_path / root) if root == "here" else root}
    Scenario(Net, loaders, lambda: dict(settings)).run(tmp_path, monitor)
    assert monitor.folder == (tmp_path / "here/run/0/slt" if root == "here" else tmp_path / "run/0/slt")
    assert [e.step for e in RunRecord(monitor.folder).read()] == [4, 8, 12]
    assert [p.name for p in tmp_path.iterdir()] == ["here" if root == "here" else "run"]
    said = [str(w.message) for w in recwarn if "dirpath=" in str(w.message)]
    assert len(said) == 1 and f"not in memory://logs-{tmp_path.name}" in said[0]


def test_each_of_two_monitors_says_where_its_own_local_record_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = CSVLogger(f"memory://logs-{tmp_path.name}", "run", "0")
    monitors = [tiny_monitor(at_steps=[2]), tiny_monitor(at_steps=[2], name="head")]
    Scenario(Net, loaders, lambda: {"logger": logger, "max_steps": 2}).run(tmp_path, *monitors)
    said = [str(w.message).split(": the record is kept")[0] for w in recwarn if "dirpath=" in str(w.message)]
    assert said == ["SLTMonitor", "SLTMonitor (slt_head)"]


# ---------------------------------------------------------------------------------------------------- loggers that fail


class FailsAtSettings(RecordingLogger):
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        if "slt" in params:
            raise OSError("no space left on device")


class FailsAtValues(RecordingLogger):
    def log_metrics(self, metrics: Any, step: Optional[int] = None) -> None:
        if any(key.startswith("slt") for key in metrics):
            raise ConnectionError("no space left on device")
        super().log_metrics(metrics, step)


class FailsAtMedia(CometLogger):
    def __init__(self) -> None:
        super().__init__()
        self.comet.log_figure = self.comet.log_table = self.fail  # type: ignore[method-assign]

    @staticmethod
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no space left on device")


class FailsAtItsExperiment(RecordingLogger):
    """Its connection is lost while training goes on."""

    @property
    def experiment(self) -> Any:
        if self.rows:
            raise TimeoutError("no space left on device")
        return None


class Recursive(RecordingLogger):
    def log_metrics(self, metrics: Any, step: Optional[int] = None) -> None:
        if any(key.startswith("slt") for key in metrics):
            self.log_metrics(metrics, step)
        super().log_metrics(metrics, step)


@pytest.mark.parametrize("broken", [FailsAtSettings, FailsAtValues, FailsAtMedia, FailsAtItsExperiment, Recursive])
def test_a_logger_that_raises_does_not_touch_training(broken: type, pictures: None, tmp_path: Path) -> None:
    """Training, the other logger and the record are what they are without it, and one warning says so."""
    sound = RecordingLogger()
    with pytest.warns(UserWarning, match="could not publish") as caught:
        monitor, trace = train(tmp_path / "with", broken(), sound)
    assert len([w for w in caught if "could not publish" in str(w.message)]) == 1
    assert monitor.folder is not None
    assert [(e.x, e.mean) for e in RunRecord(monitor.folder).read()] == llc_of(monitor)
    assert [x for metrics, x in sound.of_callback() if "slt/llc/mean" in metrics] == EXPECTED_X
    settings = {"logger": RecordingLogger(), "log_every_n_steps": 1}
    without = Scenario(Net, with_validation, lambda: dict(settings)).run(tmp_path / "without")
    without.rows, trace.rows = [], []  # two loggers here, one there
    assert_same(without, trace)
