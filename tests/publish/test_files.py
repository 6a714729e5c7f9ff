import json
import math

import numpy as np
from PIL import Image

from lightning_slt.publish import RunPublisher
from lightning_slt.publish.sink import RunCost
from lightning_slt.record import RunRecord
from tests.publish.helpers import make_estimate, read_csv


def test_a_run_is_complete_on_disk(tmp_path):
    estimates = [make_estimate(mean=float(k), step=100 * k, num_draws=10) for k in (1, 2)]
    estimates.append(make_estimate(mean=math.nan, se=math.nan, step=300, reasons=("diverged",), num_draws=10))
    publisher = RunPublisher([], tmp_path / "run")
    publisher.start({"num_chains": 4, "where": tmp_path, "bad": math.nan})
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "running"
    for estimate in estimates:
        publisher.estimate(estimate)
    live = (tmp_path / "run/history.csv").read_text()
    publisher.finish(estimates, "finished", cost=RunCost(2.5, 10.0))

    rows = read_csv(tmp_path / "run/history.csv")
    assert [(row["step"], row["llc"], row["valid"]) for row in rows] == [
        ("100", "1.0", "True"),
        ("200", "2.0", "True"),
        ("300", "", "False"),
    ]
    assert live == (tmp_path / "run/history.csv").read_text()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "finished" and summary["num_estimates"] == 3
    assert summary["cost"] == {"seconds": 2.5, "run_seconds": 10.0}
    assert summary["last"]["step"] == 300 and summary["last"]["mean"] is None
    assert summary["config"] == {"num_chains": 4, "where": str(tmp_path), "bad": None}
    names = sorted(path.name for path in (tmp_path / "run/figures").iterdir())
    assert names == [*(f"chains_step_{s:09d}.png" for s in (100, 200, 300)), "history.png"]
    assert Image.open(tmp_path / "run/figures/history.png").size == (1000, 450)
    read = list(RunRecord(tmp_path / "run").read())
    assert [e.step for e in read] == [100, 200, 300]
    assert np.array_equal(read[1].trace.numpy(), estimates[1].trace.numpy())


def test_a_resumed_run_writes_its_history_anew(tmp_path):
    first, again = make_estimate(mean=1.0, step=100), make_estimate(mean=3.0, step=100)
    RunPublisher([], tmp_path).estimate(first)
    publisher = RunPublisher([], tmp_path)
    publisher.estimate(again)
    publisher.finish([again], "finished")
    assert [row["llc"] for row in read_csv(tmp_path / "history.csv")] == ["3.0"]


def test_the_summary_of_a_resumed_run_counts_what_was_measured_before(tmp_path):
    first = RunPublisher([], tmp_path)
    first.start({})
    for step in (100, 200):
        first.estimate(make_estimate(mean=float(step), step=step))
    resumed = RunPublisher([], tmp_path)

    def told():
        summary = json.loads((tmp_path / "summary.json").read_text())
        return summary["status"], summary["num_estimates"], summary["last"]["mean"]

    resumed.start({})
    assert told() == ("running", 2, 200.0)
    resumed.estimate(make_estimate(mean=5.0, step=300))
    assert told() == ("running", 3, 5.0)
