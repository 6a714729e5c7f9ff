"""A real offline run, read back with wandb's own reader (``wandb leet inspect --json``)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_slt.callbacks.susceptibilities import keys_of
from lightning_slt.publish import RunPublisher
from lightning_slt.publish.keys import ALL_METRIC_NAMES, METRIC_NAMES
from lightning_slt.publish.sink import Page
from lightning_slt.publish.tables import HISTORY_COLUMNS
from lightning_slt.publish.wandb_logger import WandbSink
from tests.publish.helpers import make_estimate, make_susceptibility, make_transition
from tests.publish.test_loggers import run_out_of_order
from tests.wandb_runs import inspect, records

wandb = pytest.importorskip("wandb")
from lightning.pytorch.loggers import WandbLogger  # noqa: E402


def test_every_value_of_a_run_with_late_results_reads_back(offline):
    logger = WandbLogger(save_dir=offline, project="p")
    run_out_of_order(logger)
    folder = Path(logger.experiment.dir).parent
    wandb.finish()

    found = records(folder)
    rows = [record["history"]["item"] for record in found if record["type"] == "history"]
    x = "trainer/global_step"
    assert [(r[x], r["train_loss"]) for r in rows if "train_loss" in r] == [(10, 1.0), (20, 0.9), (30, 0.8)]
    llc = [r for r in rows if "slt/llc/mean" in r]
    assert [(r[x], r["slt/step"], r["slt/llc/mean"]) for r in llc] == [(20, 21, 5.0), (12, 13, 4.0)]
    assert [r["_step"] for r in rows] == list(range(len(rows)))  # wandb's own step was not moved
    assert {key for key in llc[1] if key.startswith("slt/") and "media" not in key} == {
        f"slt/{n}" for n in METRIC_NAMES
    }
    assert [(r["slt/media/chains.width"], r["slt/media/chains.height"]) for r in llc] == [(1000, 450)] * 2

    defined = [record["metric"] for record in found if record["type"] == "metric"]
    assert [m["glob_name"] for m in defined if "glob_name" in m] == ["*"]  # Lightning's, and no glob of ours
    exact = {m["name"]: m for m in defined if m.get("name", "").startswith("slt/")}
    assert set(exact) == {f"slt/{name}" for name in ALL_METRIC_NAMES}
    assert {m["step_metric"] for m in exact.values()} == {x}

    whole = json.loads(inspect(folder, "--summary"))
    assert whole["config"]["slt"] == {"num_chains": 4}
    assert whole["summary"]["slt/status"] == "finished"
    assert whole["summary"]["slt/llc/mean"] == {"last": 4, "max": 5, "min": 4}
    table = whole["summary"]["slt/tables/history"]
    assert (table["nrows"], table["ncols"], table["log_mode"]) == (2, len(HISTORY_COLUMNS), "IMMUTABLE")
    assert whole["summary"]["slt/tables/chains"]["nrows"] == 400
    data = json.loads((folder / "files" / table["path"]).read_text())["data"]
    assert [row[:4] for row in data] == [[13, 12, None, 4.0], [21, 20, None, 5.0]]
    assert whole["summary"]["slt/media/history"]["width"] == 1000


def test_what_belongs_to_one_firing_is_one_row_and_part_of_trainings_own_where_that_comes_next(offline):
    logger = WandbLogger(save_dir=offline, project="p", prefix="mine")
    publisher = RunPublisher([logger], None)
    publisher.start({})

    def firing(x, joins=None):
        with publisher.one_row(joins):
            publisher.estimate(make_estimate(step=x + 1, x=x))
            publisher.page(Page({"slt/transition/score": 1.0}, step=x + 1), x)
            publisher.page(Page({"slt/transition/score": 7.0}, step=3), 2)  # of an earlier point, which comes late

    publisher.settle()  # nothing waits
    firing(9)
    firing(19, joins=19)
    logger.log_metrics({"loss": 0.5}, step=19)
    publisher.settle()
    firing(29, joins=29)  # and training has nothing to log
    publisher.settle()
    logger.log_metrics({"loss": 0.25}, step=49)
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    rows = [record["history"]["item"] for record in records(folder) if record["type"] == "history"]
    shown = ("trainer/global_step", "mine-slt/step", "mine-slt/transition/score", "mine-loss")
    assert [tuple(row.get(key) for key in shown) for row in rows] == [
        (9, 10, 1, None),
        (2, None, 7, None),
        (2, None, 7, None),
        (19, 20, 1, 0.5),
        (2, None, 7, None),
        (29, 30, 1, None),
        (49, None, None, 0.25),
    ]


def test_tables_that_come_all_at_once_have_a_row_each(offline):
    """As after a server that did not answer: they are logged without an x, as a part of what comes next."""
    logger = WandbLogger(save_dir=offline, project="p")
    sink = WandbSink(logger)
    for value in (1, 2, 3):
        sink._log_tables({"slt/tables/a": value})
    sink._log_tables({"slt/tables/b": 4})
    logger.log_metrics({"loss": 0.5}, step=19)
    sink._log_tables({"slt/tables/b": 5})
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    rows = [record["history"]["item"] for record in records(folder) if record["type"] == "history"]
    keys = ("slt/tables/a", "slt/tables/b", "loss")
    assert [tuple(row.get(key) for key in keys) for row in rows] == [
        (1, None, None),
        (2, None, None),
        (3, 4, 0.5),
        (None, 5, None),
    ]


def test_susceptibility_is_summarised_as_the_other_scalars_are(offline):
    """Its names are those of components and groups, which are known when they come."""
    logger = WandbLogger(save_dir=offline, project="p", prefix="mine")
    publisher = RunPublisher([logger], None)
    publisher.start({})
    for x, chi in ((9, 0.5), (19, -2.0), (29, 1.0)):
        found = make_susceptibility({"head": [chi, 2 * chi]}, ("Cat",), step=x + 1)
        publisher.page(Page(keys_of(found, "slt"), step=x + 1), x)
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    found = records(folder)
    names = [f"susceptibility/head/{label}" for label in ("all", "all_se", "group_cat", "group_cat_se")]
    exact = {m["name"]: m for m in (r["metric"] for r in found if r["type"] == "metric") if "name" in m}
    for name in (*names, "susceptibility/valid"):
        assert exact[f"mine-slt/{name}"]["step_metric"] == "trainer/global_step"
        assert exact[f"mine-slt/{name}"]["summary"] == exact["mine-slt/llc/mean"]["summary"]
    defined = [r["metric"]["name"] for r in found if r["type"] == "metric" and "slt/" in r["metric"].get("name", "")]
    assert len(defined) == len(set(defined)) == len(ALL_METRIC_NAMES) + len(names) + 1, "each once"
    summary = json.loads(inspect(folder, "--summary"))["summary"]
    assert summary["mine-slt/susceptibility/head/all"] == {"last": 1, "max": 1, "min": -2}
    assert summary["mine-slt/susceptibility/head/group_cat"] == {"last": 2, "max": 2, "min": -4}


@pytest.mark.parametrize(
    "own",
    [
        {"num_chains": 8, "mine": 1},
        *(pytest.param(own, marks=pytest.mark.slow) for own in ("mine", {"num_draws": 50}, 0)),
    ],
)
def test_a_key_of_the_users_own_config_is_kept(own, offline):
    logger = WandbLogger(save_dir=offline, project="p")
    logger.experiment.config.update({"slt": own, "lr": 0.1})
    with pytest.warns(UserWarning, match="'slt' in the wandb run's config is not the monitor's and is kept") as said:
        RunPublisher([logger], None).start({"num_chains": 4})
    RunPublisher([logger], None).start({"num_chains": 5})  # a second fit: its own settings are replaced as before
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    records(folder)
    config = json.loads(inspect(folder, "--summary"))["config"]
    assert (config["slt"], config["slt_settings"], config["lr"]) == (own, {"num_chains": 5}, 0.1)
    assert "slt_settings" in str(said[0].message)


def test_the_settings_of_a_further_fit_replace_those_of_the_one_before(offline, recwarn):
    logger = WandbLogger(save_dir=offline, project="p")
    RunPublisher([logger], None).start({"num_chains": 4, "num_draws": None})
    RunPublisher([logger], None).start({"num_chains": 8, "num_draws": 50})
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    records(folder)
    config = json.loads(inspect(folder, "--summary"))["config"]
    assert config["slt"] == {"num_chains": 8, "num_draws": 50} and "slt_settings" not in config
    assert not [w for w in recwarn if "config" in str(w.message)]


def test_a_picture_in_wandb_is_the_file_of_the_run_folder(offline):
    """Packed once: wandb takes over the bytes."""
    logger = WandbLogger(save_dir=offline, project="p")
    publisher = RunPublisher([logger], offline / "slt")
    publisher.start({})
    publisher.estimate(make_estimate(step=5))
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    (local,) = (offline / "slt" / "figures").iterdir()
    (sent,) = (folder / "files" / "media" / "images" / "slt" / "media").iterdir()
    assert sent.read_bytes() == local.read_bytes()


@pytest.mark.slow
def test_the_tables_of_a_very_long_run_reach_to_its_end(offline):
    """wandb cuts off what is beyond 10,000 rows: the newest estimates, and the transitions behind them."""
    one = make_estimate(num_chains=1, num_draws=1)
    estimates = [one.replace(step=10 * k, x=k) for k in range(1, 10_502)]
    logger = WandbLogger(save_dir=offline, project="p")
    publisher = RunPublisher([logger], None)
    publisher.start({})
    publisher.finish(estimates, "finished", [make_transition()])
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    records(folder)  # until it is written
    summary = json.loads(inspect(folder, "--summary"))["summary"]
    history, curve = (
        json.loads((folder / "files" / summary[f"slt/tables/{name}"]["path"]).read_text())["data"]
        for name in ("history", "curve")
    )
    assert len(history) == len(curve) == 10_000
    assert (history[0][0], history[-1][0]) == (10, 105_010)
    assert [row[0] for row in curve[-2:]] == ["estimate", "transition"] and curve[-2][1] == 105_010


def test_a_failed_run_says_so_even_without_estimates(offline):
    logger = WandbLogger(save_dir=offline, project="p", prefix="mine")
    publisher = RunPublisher([logger], None)
    publisher.start({})
    publisher.estimate(make_estimate(mean=float("nan"), se=float("nan"), reasons=("diverged",), step=5))
    publisher.finish([], "failed")
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    found = records(folder)
    rows = [record["history"]["item"] for record in found if record["type"] == "history"]
    assert len(rows) == 1
    assert rows[0]["mine-slt/diag/valid"] == 0 and "mine-slt/llc/mean" not in rows[0]
    names = {record["metric"].get("name") for record in found if record["type"] == "metric"}
    assert "mine-slt/llc/mean" in names and "slt/llc/mean" not in names
    assert json.loads(inspect(folder, "--summary"))["summary"]["slt/status"] == "failed"


def test_a_disabled_run_writes_nothing_and_does_not_warn(offline, monkeypatch, recwarn):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = WandbLogger(save_dir=offline / "none", project="p")
    run_out_of_order(logger)
    assert not [w for w in recwarn if "could not publish" in str(w.message)]
    assert not (offline / "none/wandb").exists()


def test_wandb_is_not_imported_to_publish_elsewhere(tmp_path):
    code = (
        "import sys; sys.modules['wandb'] = None;"
        "from lightning_slt.publish import RunPublisher; from tests.publish.helpers import make_estimate as m;"
        f"p = RunPublisher([], __import__('pathlib').Path({str(tmp_path)!r}));"
        "p.start({}); p.estimate(m()); p.finish([m()], 'finished')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (tmp_path / "figures/history.png").exists()
