import json
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_slt.publish import RunPublisher
from lightning_slt.publish.sink import Page
from lightning_slt.publish.tensorboard import TensorBoardSink
from lightning_slt.publish.wandb_logger import WandbSink
from tests.publish.helpers import make_estimate, read_csv


def run_out_of_order(logger, folder=None):
    """Training rows at 10, 20, 20, 30; estimates of x = 20 and, late, x = 12."""
    estimates = [make_estimate(mean=5.0, step=21, x=20), make_estimate(mean=4.0, step=13, x=12, acceptance=0.5)]
    publisher = RunPublisher([logger], folder)
    publisher.start({"num_chains": 4})
    logger.log_metrics({"train_loss": 1.0}, step=10)
    publisher.estimate(estimates[0])
    logger.log_metrics({"train_loss": 0.9}, step=20)
    publisher.estimate(estimates[1])
    logger.log_metrics({"train_loss": 0.8}, step=30)
    publisher.finish(estimates[::-1], "finished")
    return estimates


def test_csv_rows_keep_their_x_and_training_keeps_its_rows(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    run_out_of_order(logger)
    folder = tmp_path / "lightning_logs/version_0"
    rows = read_csv(folder / "metrics.csv")
    read = [(r["step"], r["train_loss"], r["slt/llc/mean"], r["slt/step"], r["slt/diag/acceptance"]) for r in rows]
    assert read == [
        ("10", "1.0", "", "", ""),
        ("20", "", "5.0", "21.0", ""),
        ("20", "0.9", "", "", ""),
        ("12", "", "4.0", "13.0", "0.5"),
        ("30", "0.8", "", "", ""),
    ]
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["slt"] == {"num_chains": 4}
    assert json.loads((folder / "slt_media/summary.json").read_text())["status"] == "finished"
    pictures = sorted(path.name for path in (folder / "slt_media/figures").iterdir())
    assert pictures == ["chains_step_000000013.png", "chains_step_000000021.png", "history.png"]


def test_csv_has_no_sidecar_where_the_run_has_a_folder(tmp_path):
    logger = CSVLogger(tmp_path / "csv")
    run_out_of_order(logger, tmp_path / "run")
    assert not (tmp_path / "csv/lightning_logs/version_0/slt_media").exists()
    assert (tmp_path / "run/figures/history.png").exists()
    assert len(read_csv(tmp_path / "csv/lightning_logs/version_0/metrics.csv")) == 5


def test_tensorboard_events_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    run_out_of_order(logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("slt/llc/mean")] == [(20, 5.0), (12, 4.0)]
    assert [(e.step, e.value) for e in events.Scalars("slt/step")] == [(20, 21.0), (12, 13.0)]
    train = events.Scalars("train_loss")
    assert [e.step for e in train] == [10, 20, 30]
    assert [e.value for e in train] == pytest.approx([1.0, 0.9, 0.8])
    chains = events.Images("slt/media/chains")
    assert [(e.step, e.width, e.height) for e in chains] == [(20, 1000, 450), (12, 1000, 450)]
    assert len(events.Images("slt/media/history")) == 1

    def text(name):
        return [e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"slt/{name}/text_summary")]

    assert text("status") == ["running", "finished"]
    assert "| num_chains | 4 |" in text("config")[0]
    assert len(text("tables/history")[0].splitlines()) == 4
    assert "hp_metric" not in events.Tags()["scalars"]


def test_a_bar_in_a_setting_does_not_end_its_cell():
    """restrict= may name layers by a pattern, and a loss function is shown as it is."""
    texts = {}
    experiment = SimpleNamespace(add_text=lambda tag, text, step: texts.update({tag: text}))
    TensorBoardSink(SimpleNamespace(experiment=experiment)).start(
        {"restrict": ["fc1|fc2"], "nbeta": 144.7234, "lr": None}
    )
    assert texts["slt/config"].splitlines() == [
        "| setting | value |",
        "| --- | --- |",
        "| restrict | ['fc1\\|fc2'] |",
        "| nbeta | 144.7234 |",
        "| lr | None |",
    ]


def test_mlflow_reads_back(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the database backend needs sqlalchemy
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")
    run_out_of_order(logger)
    client = mlflow.tracking.MlflowClient(f"file:{tmp_path}/mlruns")
    history = client.get_metric_history(logger.run_id, "slt/llc/mean")
    assert [(m.step, m.value) for m in history] == [(20, 5.0), (12, 4.0)]
    data = client.get_run(logger.run_id).data
    assert data.tags["slt/status"] == "finished"
    assert data.params["slt/num_chains"] == "4"
    assert set(data.metrics) >= {"slt/diag/valid", "slt/diag/rhat", "slt/cost/overhead_frac", "train_loss"}
    media = [a.path for a in client.list_artifacts(logger.run_id, "slt/media")]
    names = ["chains_step_000000012", "chains_step_000000020", "history"]
    assert media == [f"slt/media/{name}.png" for name in names]
    table = next(tmp_path.rglob("tables/history.csv"))
    assert [(r["x"], r["llc"]) for r in read_csv(table)] == [("12", "4.0"), ("20", "5.0")]


class _Online:
    """A wandb run on a server, and its logger: notes each row, and fails on the first."""

    def __init__(self):
        self.rows, self.experiment = [], SimpleNamespace(summary={})

    def log_metrics(self, row, step):
        if step == 1:
            raise ConnectionError(f"row {step} was refused")
        self.rows.append(step)


def test_a_row_that_a_server_refuses_takes_no_later_row_with_it():
    logger = _Online()
    sink, told = WandbSink(logger), []
    for step in (1, 2, 3):
        try:
            sink.page(Page({"slt/transition/score": 1.0}, summary={"slt/transition/count": float(step)}), step)
        except ConnectionError as error:
            told.append(str(error))
        assert sink._later.wait(10.0)
    assert told == ["row 1 was refused"]
    assert logger.rows == [2, 3]
    assert logger.experiment.summary == {"slt/transition/count": 3.0}
