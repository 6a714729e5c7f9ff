"""A run with influence, published to every kind of logger for real and read back."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from lightning_slt.publish import RunPublisher
from lightning_slt.publish import publisher as publisher_module
from lightning_slt.publish.influence_tables import PAIR_COLUMNS, SUSPECT_COLUMNS
from lightning_slt.publish.keys import ALL_METRIC_NAMES, INFLUENCE_METRIC_NAMES, influence_metrics_of
from lightning_slt.publish.render import Rendered
from tests.publish.helpers import make_influence, nothing_measured, picture_of, pictures_of, read_csv
from tests.publish.test_publisher import Comet, Dead, Memory
from tests.wandb_runs import inspect, records

SCALARS = {f"slt/{name}" for name in INFLUENCE_METRIC_NAMES}
SUSPECTS = [f"sample_{10 * k}" for k in range(20)]


def shown(estimate):
    """The suspects as pictures, but for number 10, which is text."""
    return {**pictures_of(estimate), 10: Rendered("text", None, "the words of sample 10")}


def run_of_two(logger=None, folder=None, pairs=False, finish=True):
    """Two firings with the same samples; at the second one suspect is new: number 250."""
    first = make_influence(step=21)
    changed = first.mean_loss.clone()
    changed[25] = 9.0
    second = make_influence(step=41, mean_loss=changed)
    publisher = RunPublisher([] if logger is None else [logger], folder)
    publisher.start({"num_chains": 4})
    for estimate in (first, second):
        publisher.influence(estimate, shown(estimate), pairs=pairs)
    history = [first.without_pairs(), second]
    if finish:
        publisher.finish_influence(history)
        publisher.finish([], "finished")
    return history


def names_in(folder, pattern="*"):
    return sorted(path.name for path in folder.glob(pattern)) if folder.exists() else []


@pytest.fixture
def few_pictures(monkeypatch):
    """Drawing takes longest: a stand-in where a test does not look at the pictures."""
    for name in ("influence_figure", "suspects_figure", "trajectories_figure"):
        monkeypatch.setattr(publisher_module, name, lambda *_: None)


# ----------------------------------------------------------------------------------------------------------------- keys


def test_every_scalar_has_its_key_and_its_value():
    estimate = make_influence()
    metrics = influence_metrics_of(estimate)
    assert set(metrics) == SCALARS >= {"slt/influence/max_abs", "slt/influence/top_share"}
    assert set(INFLUENCE_METRIC_NAMES) <= set(ALL_METRIC_NAMES)
    assert all(re.fullmatch(r"[a-z0-9_]+(/[a-z0-9_]+)*", key) for key in metrics)
    assert metrics["slt/influence/max_abs"] == 2.0 and metrics["slt/influence/passing"] == pytest.approx(1 / 180)
    assert metrics["slt/influence/top_share"] == pytest.approx((27.5 + 28.5 + 29.5) / 450)
    assert metrics["slt/influence/between_share"] == 0.125
    assert (metrics["slt/influence/dropped"], metrics["slt/influence/valid"]) == (0.0, 1.0)
    assert influence_metrics_of(estimate.without_pairs()) == metrics
    assert influence_metrics_of(nothing_measured(), "slt_head") == {
        "slt_head/influence/dropped": 0.0,
        "slt_head/influence/valid": 0.0,
    }


# --------------------------------------------------------------------------------------------------------- local files


def test_local_files_have_pictures_tables_and_each_sample_once(tmp_path):
    run_of_two(folder=tmp_path)
    steps = ("000000021", "000000041")
    assert names_in(tmp_path / "figures") == [
        *(f"influence_step_{s}.png" for s in steps),
        *(f"suspects_step_{s}.png" for s in steps),
        "trajectories_step_000000041.png",
    ]
    with Image.open(tmp_path / "figures" / "influence_step_000000021.png") as picture:
        assert picture.size == (1000, 450)
        colours = np.unique(np.asarray(picture).reshape(-1, 3), axis=0)
    assert len(colours) > 100  # heat map and histogram, not an empty frame

    rows = read_csv(tmp_path / "tables" / "influence_top_step_000000041.csv")
    assert list(rows[0]) == list(SUSPECT_COLUMNS)
    assert [r["media"] for r in rows] == ["sample_250", *SUSPECTS[:19]]
    assert (rows[0]["rank"], rows[0]["plain_loss_rank"], rows[1]["plain_loss_rank"]) == ("1", "5", "30")

    # what the tables refer to is there, and nothing else
    files = names_in(tmp_path / "samples")
    assert files == sorted(f"{m}.txt" if m == "sample_10" else f"{m}.png" for m in {*SUSPECTS, "sample_250"})
    assert (tmp_path / "samples" / "sample_10.txt").read_text() == "the words of sample 10\n"
    with Image.open(tmp_path / "samples" / "sample_250.png") as picture:
        assert picture.getextrema() == (250, 250)
    assert not list(tmp_path.rglob("*.tmp"))


def test_pairs_are_in_the_files_at_the_end_and_with_a_small_budget_only_there(tmp_path, few_pictures):
    run_of_two(folder=tmp_path, finish=False)
    assert names_in(tmp_path / "tables", "influence_pairs*") == []
    kept = load_file(tmp_path / "influence" / "step_000000041.safetensors")
    assert kept["matrix"].shape == (0, 30) and kept["mean_loss"].shape == (30,)
    told = json.loads((tmp_path / "influence" / "step_000000041.json").read_text())
    assert told["known_max_abs"] == 2.0 and told["known_passing"] == pytest.approx(1 / 180)

    run_of_two(folder=tmp_path)
    assert names_in(tmp_path / "tables", "influence_pairs*") == ["influence_pairs_step_000000041.csv"]
    (row,) = read_csv(tmp_path / "tables" / "influence_pairs_step_000000041.csv")
    assert list(row) == list(PAIR_COLUMNS)
    assert (row["query"], row["side"], row["index"], row["value"], row["z"]) == ("1", "helpful", "20", "2.0", "8.0")
    shapes = [load_file(tmp_path / "influence" / f"step_0000000{s}.safetensors")["matrix"].shape for s in (21, 41)]
    assert shapes == [(0, 30), (6, 30)]


def test_pairs_are_in_the_files_at_once_with_a_large_budget(tmp_path, few_pictures):
    run_of_two(folder=tmp_path, pairs=True, finish=False)
    assert names_in(tmp_path / "tables", "influence_pairs*") == [
        "influence_pairs_step_000000021.csv",
        "influence_pairs_step_000000041.csv",
    ]
    assert load_file(tmp_path / "influence" / "step_000000021.safetensors")["matrix"].shape == (6, 30)


def test_no_table_of_pairs_where_no_pair_stands_out(tmp_path, few_pictures):
    publisher = RunPublisher([], tmp_path)
    still = make_influence(matrix=0.25 * make_influence().se)
    publisher.influence(still, {}, pairs=True)
    publisher.finish_influence([still])
    assert names_in(tmp_path / "tables") == ["influence_top_step_000000100.csv"]


# -------------------------------------------------------------------------------------------------------------- loggers


def test_csv_logger_has_the_scalars_and_a_sidecar(tmp_path):
    run_of_two(CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    folder = tmp_path / "lightning_logs" / "version_0"
    rows = read_csv(folder / "metrics.csv")
    assert [(r["step"], r["slt/influence/max_abs"], r["slt/influence/valid"]) for r in rows] == [
        ("20", "2.0", "1.0"),
        ("40", "2.0", "1.0"),
    ]
    assert set(rows[0]) >= SCALARS
    media = folder / "slt_media"
    assert len(names_in(media / "figures")) == 5 and len(names_in(media / "samples")) == 21
    assert names_in(media / "tables") == [
        "influence_pairs_step_000000041.csv",
        "influence_top_step_000000021.csv",
        "influence_top_step_000000041.csv",
    ]


def test_csv_logger_has_no_sidecar_where_the_run_has_a_folder(tmp_path, few_pictures):
    run_of_two(CSVLogger(tmp_path / "csv"), tmp_path / "run")
    assert not (tmp_path / "csv/lightning_logs/version_0/slt_media").exists()
    assert len(names_in(tmp_path / "run/samples")) == 21


def test_tensorboard_reads_back(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    run_of_two(logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= SCALARS
    assert [(e.step, e.value) for e in events.Scalars("slt/influence/max_abs")] == [(20, 2.0), (40, 2.0)]
    pictures = {t.removeprefix("slt/media/") for t in tags["images"]}
    assert [(e.step, e.width, e.height) for e in events.Images("slt/media/influence")] == [
        (20, 1000, 450),
        (40, 1000, 450),
    ]
    assert [e.step for e in events.Images("slt/media/suspects")] == [20, 40]
    assert [e.step for e in events.Images("slt/media/trajectories")] == [40]
    images = {f"sample_{10 * k}" for k in (*range(20), 25) if k != 1}
    assert pictures == {"influence", "suspects", "trajectories", *(f"samples/{name}" for name in images)}
    assert [(e.step, e.width) for e in events.Images("slt/media/samples/sample_0")] == [(20, 64)]
    assert [e.step for e in events.Images("slt/media/samples/sample_250")] == [40]

    def text(name):
        return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(f"slt/{name}/text_summary")]

    assert [(step, len(table.splitlines())) for step, table in text("tables/influence_top")] == [(20, 22), (40, 22)]
    assert text("tables/influence_top")[1][1].splitlines()[2].startswith("| 1 | 250 | 1 | 9 |")
    ((step, table),) = text("tables/influence_pairs")
    assert step == 40 and table.splitlines()[2] == "| 1 |  | 1 | helpful | 20 | 2 | 2 | 0.25 | 8 | 0.5 |"
    ((step, table),) = text("tables/samples")
    assert step == 20 and table.splitlines()[2:] == ["| sample_10 | the words of sample 10 |"]


def test_mlflow_reads_back(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the database backend needs sqlalchemy
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")
    run_of_two(logger)
    client = mlflow.tracking.MlflowClient(f"file:{tmp_path}/mlruns")
    history = client.get_metric_history(logger.run_id, "slt/influence/max_abs")
    assert [(m.step, m.value) for m in history] == [(20, 2.0), (40, 2.0)]
    assert set(client.get_run(logger.run_id).data.metrics) >= SCALARS

    def artifacts(folder):
        return [a.path.removeprefix(f"{folder}/") for a in client.list_artifacts(logger.run_id, folder) if not a.is_dir]

    assert artifacts("slt/media") == [
        "influence_step_000000020.png",
        "influence_step_000000040.png",
        "suspects_step_000000020.png",
        "suspects_step_000000040.png",
        "trajectories_step_000000040.png",
    ]
    assert artifacts("slt/tables") == [
        "influence_pairs_step_000000040.csv",
        "influence_top_step_000000020.csv",
        "influence_top_step_000000040.csv",
    ]
    samples = artifacts("slt/media/samples")
    assert len(samples) == 21 and "sample_10.txt" in samples and "sample_250.png" in samples
    rows = read_csv(next(tmp_path.rglob("influence_top_step_000000040.csv")))
    assert [r["index"] for r in rows[:2]] == ["250", "0"]


def test_a_comet_experiment_gets_figures_and_tables():
    comet = Comet()
    run_of_two(Memory(comet))
    assert [c for c in comet.calls if c[0] == "figure"] == [
        ("figure", "slt/media/influence", 20),
        ("figure", "slt/media/suspects", 20),
        ("figure", "slt/media/influence", 40),
        ("figure", "slt/media/suspects", 40),
        ("figure", "slt/media/trajectories", 40),
    ]
    assert [c for c in comet.calls if c[0] == "table"] == [
        ("table", "slt_influence_top_step_000000020.csv", 20),
        ("table", "slt_influence_top_step_000000040.csv", 20),
        ("table", "slt_influence_pairs_step_000000040.csv", 1),
    ]


def test_any_other_logger_gets_numbers_and_nothing_else(few_pictures):
    logger = Memory()
    run_of_two(logger)
    assert [(step, set(row)) for step, row in logger.rows] == [(20, SCALARS), (40, SCALARS)]
    assert all(type(v) is float for _, row in logger.rows for v in row.values())


def test_wandb_reads_back(offline):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=offline, project="p")
    run_of_two(logger)
    folder = Path(logger.experiment.dir).parent
    wandb.finish()

    found = records(folder)
    rows = [record["history"]["item"] for record in found if record["type"] == "history"]
    x = "trainer/global_step"
    firings = [row for row in rows if "slt/influence/max_abs" in row]
    assert [(r[x], r["slt/influence/max_abs"], r["slt/influence/valid"]) for r in firings] == [(20, 2, 1), (40, 2, 1)]
    assert all(set(row) >= SCALARS for row in firings)
    assert [(r["slt/media/influence.width"], r["slt/media/influence.height"]) for r in firings] == [(1000, 450)] * 2
    assert [r["slt/media/suspects._type"] for r in firings] == ["image-file"] * 2
    # the pictures of samples: all but the text at first, then the new one alone, each by the name that tables use
    assert [r["slt/media/samples.count"] for r in firings] == [19, 1]
    captions = [r["slt/media/samples.captions"] for r in firings]
    assert captions == [[m for m in SUSPECTS if m != "sample_10"], ["sample_250"]]
    (last,) = [row for row in rows if "slt/media/trajectories._type" in row]
    assert last[x] == 40 and not set(last) & SCALARS
    tables = [sorted({k.split("/")[2].split(".")[0] for k in row if k.startswith("slt/tables/")}) for row in rows]
    assert tables == [["influence_top", "samples"], ["influence_top"], ["influence_pairs"]]

    def table(row, name):
        data = json.loads((folder / "files" / row[f"slt/tables/{name}.path"]).read_text())
        assert row[f"slt/tables/{name}.nrows"] == len(data["data"])
        return data

    top = table(firings[1], "influence_top")
    assert top["columns"] == list(SUSPECT_COLUMNS)
    assert [(row[0], row[1], row[6], row[9]) for row in top["data"][:2]] == [
        (1, 250, 5, "sample_250"),
        (2, 0, 30, "sample_0"),
    ]
    assert table(firings[0], "samples")["data"] == [["sample_10", "the words of sample 10"]]
    assert table(last, "influence_pairs")["data"] == [[1, None, "1", "helpful", 20, "2", 2, 0.25, 8, 0.5]]

    exact = {record["metric"].get("name"): record["metric"] for record in found if record["type"] == "metric"}
    assert {exact[key]["step_metric"] for key in SCALARS} == {x}
    summary = json.loads(inspect(folder, "--summary"))["summary"]
    assert summary["slt/influence/max_abs"] == {"last": 2, "max": 2, "min": 2}
    assert summary["slt/status"] == "finished"


# ----------------------------------------------------------------------------------------- once each, and nothing stops


class Pages:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.pages = []

    def start(self, config):
        pass

    def estimate(self, estimate, figure, step):
        pass

    def page(self, page, step):
        self.pages.append((step, page))

    def finish(self, estimates, status, figure):
        pass


@pytest.fixture
def pages(monkeypatch):
    sink = Pages()
    monkeypatch.setattr(publisher_module, "sink_for", lambda *_, **__: sink)
    return sink.pages


def test_a_sample_is_handed_over_once_however_often_it_is_a_suspect(pages, few_pictures):
    run_of_two(Memory())
    assert [list(page.samples) for _, page in pages] == [SUSPECTS, ["sample_250"], []]
    ids = [row[-1] for row in pages[1][1].tables["influence_top"].rows]
    assert set(ids) <= {*pages[0][1].samples, *pages[1][1].samples}


def test_pairs_are_handed_over_when_asked_for_and_at_the_end(pages, few_pictures):
    run_of_two(Memory())
    assert [sorted(page.tables) for _, page in pages] == [["influence_top"], ["influence_top"], ["influence_pairs"]]
    pages.clear()
    run_of_two(Memory(), pairs=True, finish=False)
    assert [sorted(page.tables) for _, page in pages] == [["influence_pairs", "influence_top"]] * 2


def test_late_and_nameless_estimates_have_an_x(pages, few_pictures):
    publisher = RunPublisher([Memory()], None)
    for step in (41, 21, None, None):
        publisher.influence(make_influence(step=step))
    publisher.influence(make_influence(step=7, x=None))
    assert [step for step, _ in pages] == [40, 20, 2, 3, 7]


def test_pictures_stop_at_the_limit_and_numbers_go_on(pages):
    publisher = RunPublisher([Memory()], None, media_limit=1)
    for step in (1, 2):
        publisher.influence(make_influence(step=step))
    assert [sorted(page.pictures) for _, page in pages] == [["influence", "suspects"], []]
    assert [len(page.scalars) for _, page in pages] == [6, 6]


def test_nothing_measured_is_published_as_not_valid(tmp_path):
    logger = Memory()
    publisher = RunPublisher([logger], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        publisher.influence(nothing_measured())
        publisher.finish_influence([nothing_measured()])
        publisher.finish_influence([])
    assert logger.rows == [(99, {"slt/influence/dropped": 0.0, "slt/influence/valid": 0.0})]
    assert names_in(tmp_path / "figures") == ["influence_step_000000100.png"]
    assert names_in(tmp_path) == ["figures", "influence"]


def publishing_warnings(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "could not publish" in str(w.message)]


def test_a_dead_logger_warns_once_and_the_others_go_on(tmp_path, few_pictures):
    alive = Memory()
    publisher = RunPublisher([Dead(), alive], tmp_path)

    def run():
        for step in (10, 20, 30):
            publisher.influence(make_influence(step=step), pictures_of(make_influence()))
        publisher.finish_influence([make_influence(step=30)])

    (said,) = publishing_warnings(run)
    assert said.startswith("lightning_slt could not publish to Dead: ConnectionError: no route to host")
    assert [step for step, _ in alive.rows] == [9, 19, 29]
    assert len(names_in(tmp_path / "tables", "influence_top*")) == 3 and len(names_in(tmp_path / "samples")) == 20


def test_a_folder_that_cannot_be_written_warns_and_the_loggers_go_on(tmp_path, few_pictures):
    (tmp_path / "file").write_text("")
    logger = Memory()
    publisher = RunPublisher([logger], tmp_path / "file" / "run")
    said = publishing_warnings(lambda: [publisher.influence(make_influence(step=s)) for s in (10, 20)])
    places = sorted(message.split(" to ")[1].split(":")[0] for message in said)
    assert places == ["the local files", "the local record of influence"]
    assert [step for step, _ in logger.rows] == [9, 19]


@pytest.mark.parametrize("broken", ["influence_figure", "suspects_figure"])
def test_a_picture_that_fails_takes_neither_numbers_nor_tables_nor_other_pictures_with_it(broken, pages, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such colour")

    monkeypatch.setattr(publisher_module, broken, fail)
    publisher = RunPublisher([Memory()], None)
    said = publishing_warnings(lambda: [publisher.influence(make_influence(step=s)) for s in (10, 20)])
    assert len(said) == 1 and "RuntimeError: no such colour" in said[0]
    other = {"influence_figure": "suspects", "suspects_figure": "influence"}[broken]
    assert [(list(p.pictures), len(p.scalars), list(p.tables)) for _, p in pages] == [
        ([other], 6, ["influence_top"])
    ] * 2


def test_a_picture_that_cannot_be_drawn_is_left_out(pages, monkeypatch):
    """Found where it is made, not in each logger that would draw it."""

    def unfinished(*_):
        figure = Figure()
        figure.text(0, 0, "$\\frac{$")  # raises when it is drawn
        return figure

    monkeypatch.setattr(publisher_module, "suspects_figure", unfinished)
    publisher = RunPublisher([Memory()], None)
    (said,) = publishing_warnings(lambda: publisher.influence(make_influence()))
    assert "the suspects" in said
    assert [list(page.pictures) for _, page in pages] == [["influence"]]


def test_trajectories_that_fail_leave_the_pairs(pages, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such colour")

    monkeypatch.setattr(publisher_module, "trajectories_figure", fail)
    publisher = RunPublisher([Memory()], None)
    said = publishing_warnings(lambda: publisher.finish_influence([make_influence(step=1), make_influence(step=2)]))
    assert len(said) == 1
    assert [(page.pictures, list(page.tables)) for _, page in pages] == [({}, ["influence_pairs"])]


def test_nothing_is_drawn_for_nobody(monkeypatch):
    drawn = []
    for name in ("influence_figure", "suspects_figure", "trajectories_figure"):
        monkeypatch.setattr(publisher_module, name, lambda *_: drawn.append(1))
    publisher = RunPublisher([], None)
    publisher.influence(make_influence(step=1), {0: picture_of(0)})
    publisher.finish_influence([make_influence(step=1), make_influence(step=2)])
    assert drawn == []


def test_other_ranks_publish_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = Memory()
    publisher = RunPublisher([logger], tmp_path / "run")
    publisher.influence(make_influence(), pictures_of(make_influence()), pairs=True)
    publisher.finish_influence([make_influence(step=1), make_influence(step=2)])
    assert logger.rows == [] and not (tmp_path / "run").exists()
