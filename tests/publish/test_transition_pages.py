"""Transitions, published to every kind of logger for real and read back."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger

from lightning_slt.publish import RunPublisher, history_figure
from lightning_slt.publish import publisher as publisher_module
from lightning_slt.publish.charts import pixels
from lightning_slt.publish.keys import ALL_METRIC_NAMES, TRANSITION_METRIC_NAMES, transition_metrics_of
from lightning_slt.publish.transition_charts import free_energy_figure
from lightning_slt.publish.transition_tables import TRANSITION_COLUMNS, transition_rows
from lightning_slt.publish.words import transition_sentences
from lightning_slt.transition_record import TransitionLog
from tests.publish.helpers import make_estimate, make_report, make_transition, read_csv
from tests.publish.test_publisher import Comet, Memory
from tests.wandb_runs import inspect, records

SCALARS = {f"slt/{name}" for name in TRANSITION_METRIC_NAMES}


def log_of(*reports, whole=()):
    return TransitionLog("slt/llc/mean", 12.0, tuple(reports), (295.0,), tuple(whole))


def run_of_three(logger=None, folder=None, alert=True, state="confirmed"):
    """Nothing at step 300; a flag at 360; a verdict at 400."""
    publisher = RunPublisher([] if logger is None else [logger], folder)
    publisher.start({"num_chains": 4})
    publisher.transition_point(3.5, log_of(), False, 299, 300)
    new = make_report()
    publisher.transition_point(15.0, log_of(new), True, 359, 360, [new], alert)
    judged = make_report(make_transition(state=state))
    publisher.transition_point(2.0, log_of(judged), False, 399, 400, [judged], alert)
    whole = make_transition(onset=281.0, step=299.0, state="confirmed")
    final = log_of(judged.replace(refined=whole), whole=[whole, make_transition(id=1, onset=80.0, step=90.0, end=99.0)])
    publisher.finish_transitions(final, 399, 400)
    publisher.finish([make_estimate()], "finished", final.standing)


def test_scalars_have_their_keys():
    metrics = transition_metrics_of(3.5, 12.0, True, 2, -1.5, "slt_b")
    assert metrics == {
        "slt_b/transition/score": 3.5,
        "slt_b/transition/threshold": 12.0,
        "slt_b/transition/flag": 1.0,
        "slt_b/transition/count": 2.0,
        "slt_b/transition/log_odds": -1.5,
    }
    assert set(TRANSITION_METRIC_NAMES) < set(ALL_METRIC_NAMES)
    assert all(re.fullmatch(r"[a-z0-9_]+(/[a-z0-9_]+)*", key) for key in metrics)
    assert set(transition_metrics_of(float("nan"), 12.0, False, 0)) == {
        f"slt/transition/{name}" for name in ("threshold", "flag", "count")
    }


def test_table_has_a_row_a_transition_and_those_of_the_whole_curve():
    known, only = make_transition(id=0, onset=281.0), make_transition(id=1, onset=80.0, step=90.0, end=99.0)
    rows = transition_rows(log_of(make_report(refined=known), whole=[known, only]))
    first, second = (dict(zip(TRANSITION_COLUMNS, row, strict=True)) for row in rows)
    assert (first["id"], first["state"], first["kind"], first["known_at"]) == (0, "provisional", "A", 360.0)
    assert (first["llc_before"], first["llc_after"], first["loss_before"], first["loss_after"]) == (
        10.0,
        25.0,
        1.5,
        1.0,
    )
    assert (first["llc_before_se"], first["loss_after_se"]) == (0.5, 0.01)
    assert (first["preferred"], first["critical_n_high"], first["preferred_untempered"]) == ("before", None, "after")
    assert (first["log_odds"], first["log_odds_se"], first["log_odds_untempered"]) == (-7.0, 2.0, 396.0)
    assert (first["log_odds_se_untempered"], first["critical_n_untempered"]) == (6.0, 147.0)
    assert (first["critical_n_low_untempered"], first["critical_n_high_untempered"]) == (130.0, 165.0)
    assert (first["refined_onset"], first["moved_samples"], first["moved_component"]) == (281.0, "70 30", "attn")
    assert (second["id"], second["state"], second["step"], second["sentence"]) == (None, "offline", 90.0, "")


def test_sentences_say_what_both_posteriors_prefer():
    sampled, untempered = transition_sentences(make_report())[-2:]
    assert sampled == (
        "The posterior that was sampled prefers the phase before it at the 800 samples of this run (log-odds of the "
        "new phase −7 ± 2); both would be equal at about 980 samples, 95 % 700 to unbounded."
    )
    assert untempered == (
        "The posterior at beta = 1 prefers the phase after it at the 800 samples of this run (log-odds of the new "
        "phase +396 ± 6); both would be equal at about 150 samples, 95 % 130 to 160."
    )


def test_local_files(tmp_path):
    run_of_three(folder=tmp_path)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [
        "free_energy_step_000000360.png",
        "free_energy_step_000000400.png",
        "history.png",
    ]
    rows = read_csv(tmp_path / "tables" / "transitions_step_000000400.csv")
    assert [(r["state"], r["step"], r["refined_step"]) for r in rows] == [
        ("confirmed", "300.0", "299.0"),
        ("offline", "90.0", ""),
    ]
    log = TransitionLog.read(tmp_path)
    assert log.reports[0].transition.state == "confirmed" and log.boundaries == (295.0,)
    assert [t.step for t in log.offline] == [299.0, 90.0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["slt/transition/count"], summary["slt/transition/last_step"]) == (
        "finished",
        1.0,
        300.0,
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_record_reads_back_as_it_was(tmp_path):
    log = log_of(
        make_report(refined=make_transition(score=float("nan"))), make_report(make_transition(id=1), tempered=None)
    )
    log.write(tmp_path)
    read = TransitionLog.read(tmp_path)
    assert read.reports[1] == log.reports[1]
    assert read.reports[0].replace(refined=None) == log.reports[0].replace(refined=None)
    assert np.isnan(read.reports[0].refined.score)
    with pytest.raises(FileNotFoundError):
        TransitionLog.read(tmp_path / "none")


def test_any_logger_gets_the_rows(tmp_path):
    logger = Memory()
    run_of_three(logger)
    rows = [(step, row) for step, row in logger.rows if "slt/transition/flag" in row]
    assert [(step, row["slt/transition/flag"], row["slt/transition/count"]) for step, row in rows] == [
        (299, 0.0, 0.0),
        (359, 1.0, 1.0),
        (399, 0.0, 1.0),
    ]
    assert [set(row) for _, row in rows] == [SCALARS - {"slt/transition/log_odds"}, SCALARS, SCALARS]
    assert rows[1][1]["slt/transition/log_odds"] == -7.0


def test_a_retracted_transition_has_no_odds():
    """They are those of the newest that stands."""
    logger = Memory()
    run_of_three(logger, state="retracted")
    rows = [row for _, row in logger.rows if "slt/transition/flag" in row]
    assert ["slt/transition/log_odds" in row for row in rows] == [False, True, False]
    logger = Memory()
    publisher = RunPublisher([logger], None)
    gone = make_report(make_transition(id=1, state="retracted"), tempered=None)
    publisher.transition_point(1.0, log_of(make_report(), gone), False, 399, 400)
    assert [row["slt/transition/log_odds"] for _, row in logger.rows] == [-7.0]


def test_other_ranks_publish_no_transition(monkeypatch, tmp_path):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = Memory()
    run_of_three(logger, tmp_path / "run")
    assert logger.rows == [] and not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_drawn_costs_the_picture_only(monkeypatch, tmp_path):
    def broken(_):
        raise ValueError("no font")

    monkeypatch.setattr(publisher_module, "free_energy_figure", broken)
    logger = Memory()
    with pytest.warns(UserWarning, match="the free energies: ValueError: no font"):
        run_of_three(logger, tmp_path)
    assert len([row for _, row in logger.rows if "slt/transition/flag" in row]) == 3
    assert TransitionLog.read(tmp_path).reports[0].transition.state == "confirmed"


class Wandb(Memory):
    """What of a wandb run is called for an alert."""

    LOGGER_JOIN_CHAR = "-"


Wandb.__name__ = "WandbLogger"


class Run:
    def __init__(self):
        self.alerts, self.summary = [], {}

    def alert(self, **kwargs):
        self.alerts.append(kwargs)

    def define_metric(self, *_, **__):
        pass


@pytest.mark.parametrize(("state", "count"), [("confirmed", 1), ("retracted", 2)])
def test_alerts_of_new_and_retracted_transitions_have_titles_of_their_own(state, count, monkeypatch):
    pytest.importorskip("wandb")
    run = Run()
    run.config = type("Config", (), {"update": lambda *_, **__: None})()
    monkeypatch.setattr(publisher_module, "free_energy_figure", lambda _: None)
    monkeypatch.setattr(publisher_module, "history_figure", lambda *_: None)
    run_of_three(Wandb(run), state=state)
    assert [a["title"] for a in run.alerts] == [
        "slt: transition 0 at step 300, kind A",
        "slt: transition 0 at step 300, retracted",
    ][:count]
    assert all(a["wait_duration"] == 1 and a["text"].startswith("transition 0 (kind A, ") for a in run.alerts)
    assert run.summary["slt/transition/count"] == (0.0 if state == "retracted" else 1.0)
    assert run.summary["slt/transition/last_step"] == (-1.0 if state == "retracted" else 300.0)


def test_no_alert_where_none_is_wanted():
    run = Run()
    run.config = type("Config", (), {"update": lambda *_, **__: None})()
    run_of_three(Wandb(run), alert=False)
    assert run.alerts == []


def test_wandb_reads_back(offline, recwarn):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=offline, project="p")
    run_of_three(logger)
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    found = records(folder)
    assert not [w for w in recwarn if "could not publish" in str(w.message)]
    (alert,) = [record["alert"] for record in found if record["type"] == "alert"]
    assert alert["title"] == "slt: transition 0 at step 300, kind A" and alert["text"].startswith(
        "transition 0 (kind A"
    )
    rows = [record["history"]["item"] for record in found if record["type"] == "history"]
    flags = [(r["trainer/global_step"], r["slt/transition/flag"]) for r in rows if "slt/transition/flag" in r]
    assert flags == [(299, 0), (359, 1), (399, 0)]
    assert len([r for r in rows if "slt/media/free_energy._type" in r]) == 3
    summary = json.loads(inspect(folder, "--summary"))["summary"]
    assert summary["slt/transition/count"] == 1 and summary["slt/transition/last_step"] == 300
    assert summary["slt/transition/flag"] == {"last": 0, "max": 1, "min": 0}
    table = summary["slt/tables/transitions"]
    assert (table["nrows"], table["ncols"]) == (2, len(TRANSITION_COLUMNS))


def test_tensorboard_reads_back(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"transition 0 at step 300, kind A: transition 0 \(kind A, provisional\)"):
        run_of_three(logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("slt/transition/flag")] == [(299, 0.0), (359, 1.0), (399, 0.0)]
    assert [e.step for e in events.Images("slt/media/free_energy")] == [359, 399, 399]
    (said,) = events.Tensors("slt/alerts/transition_0/text_summary")
    assert said.step == 359 and b"LLC from 10" in said.tensor_proto.string_val[0]


def test_mlflow_reads_back(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the database backend needs sqlalchemy
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")
    run_of_three(logger, state="retracted")
    client = mlflow.tracking.MlflowClient(f"file:{tmp_path}/mlruns")
    history = client.get_metric_history(logger.run_id, "slt/transition/flag")
    assert [(m.step, m.value) for m in history] == [(299, 0.0), (359, 1.0), (399, 0.0)]
    tags = client.get_run(logger.run_id).data.tags
    assert tags["slt/transition_0"].startswith("slt: transition 0 at step 300, retracted: transition 0")
    names = [a.path for a in client.list_artifacts(logger.run_id, "slt/tables")]
    assert "slt/tables/transitions_step_000000399.csv" in names


def test_csv_logger_has_a_sidecar(tmp_path):
    run_of_three(CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    folder = tmp_path / "lightning_logs" / "version_0"
    rows = [r for r in read_csv(folder / "metrics.csv") if r["slt/transition/flag"]]
    assert [(r["step"], r["slt/transition/flag"]) for r in rows] == [("299", "0.0"), ("359", "1.0"), ("399", "0.0")]
    assert len(list((folder / "slt_media" / "tables").glob("transitions_step_*.csv"))) == 2


def test_a_comet_experiment_is_notified():
    comet = Comet()
    comet.send_notification = lambda title, additional_data: comet.calls.append(
        ("said", title, additional_data["step"])
    )
    run_of_three(Memory(comet))
    assert [c for c in comet.calls if c[0] == "said"] == [("said", "slt: transition 0 at step 300, kind A", 359)]


# ------------------------------------------------------------------------------------------------------------- pictures


def test_free_energies_cross_at_the_critical_n():
    figure = free_energy_figure(make_report())
    assert pixels(figure).shape == (450, 1000, 4)
    tempered, untempered = figure.axes
    for axes, critical in ((tempered, 978.0), (untempered, 147.0)):
        before, after = (line for line in axes.lines if line.get_label().startswith("phase"))
        assert axes.get_xscale() == "log"
        gap = np.asarray(before.get_ydata()) - np.asarray(after.get_ydata())
        crossing = np.asarray(before.get_xdata())[np.flatnonzero(np.diff(np.sign(gap)))]
        assert crossing[-1] == pytest.approx(critical, rel=0.1)
        rules = {line.get_label(): line.get_xdata()[0] for line in axes.lines if not line.get_label().startswith("ph")}
        assert rules["n = 800"] == 800 and len(rules) == 2
        low, high = axes.get_xlim()
        assert low < critical < high and low < 800 < high
    assert "prefers the phase before" in tempered.get_title("left")
    assert free_energy_figure(make_report(after=None)) is None
    assert free_energy_figure(make_report(tempered=None, untempered=None)) is None


def test_history_marks_transitions_and_leaves_out_what_was_retracted():
    estimates = [make_estimate(num_draws=2, step=s) for s in range(100, 600, 50)]
    marked = [
        make_transition(state="confirmed"),
        make_transition(id=1, onset=400.0, step=420.0, end=430.0, kind="B", boundary=410.0),
        make_transition(id=2, onset=500.0, step=510.0, end=520.0, state="retracted"),
    ]
    plain, figure = history_figure(estimates), history_figure(estimates, marked)
    top, bottom = figure.axes
    for axes, before in zip((top, bottom), plain.axes, strict=True):
        rules = axes.lines[-2:] if axes is bottom else [line for line in axes.lines if line.get_ydata()[-1] == 1]
        assert [line.get_xdata()[0] for line in rules] == [300.0, 420.0]
        assert [line.get_linestyle() for line in rules] == ["-", "--"]
        assert rules[0].get_color() != rules[1].get_color()
        assert len(axes.lines) - len(before.lines) == 2
    assert [t.get_text() for t in top.texts] == ["A", "B"]
    assert figure._suptitle.get_text().endswith("10 estimates, 2 transitions")
