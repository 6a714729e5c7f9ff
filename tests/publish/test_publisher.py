import json
import warnings

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from lightning_slt.publish import RunPublisher
from lightning_slt.publish import publisher as publisher_module
from tests.publish.helpers import make_estimate


class Memory(Logger):
    def __init__(self, experiment=None):
        super().__init__()
        self.rows, self.params, self._experiment = [], [], experiment

    name = version = "memory"

    @property
    def experiment(self):
        return self._experiment

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        self.params.append(params)


class Dead(Memory):
    def log_metrics(self, metrics, step=None):
        raise ConnectionError("no route to host")


class Comet:
    def __init__(self):
        self.calls = []

    def log_other(self, key, value):
        self.calls.append(("other", key, value))

    def log_figure(self, figure_name, figure, step=None):
        self.calls.append(("figure", figure_name, step))

    def log_table(self, filename, tabular_data, headers):
        self.calls.append(("table", filename, len(tabular_data)))


def warnings_of(publisher, estimates):
    """The publishing warnings of a whole run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        publisher.start({"a": 1})
        for estimate in estimates:
            publisher.estimate(estimate)
        publisher.finish(estimates, "failed")
    return [str(w.message) for w in caught if "could not publish" in str(w.message)]


def test_a_dead_logger_warns_once_and_stops_nothing(tmp_path):
    alive = Memory()
    publisher = RunPublisher([Dead(), alive], tmp_path)
    caught = warnings_of(publisher, [make_estimate(step=step) for step in (10, 20, 30)])
    assert len(caught) == 1
    assert caught[0].startswith("lightning_slt could not publish to Dead: ConnectionError: no route to host")
    assert [step for step, _ in alive.rows] == [10, 20, 30]
    assert len((tmp_path / "estimates.jsonl").read_text().splitlines()) == 3


def test_with_several_monitors_the_warning_says_whose_it_is(tmp_path):
    publisher = RunPublisher([Dead()], tmp_path, "slt_head")
    (said,) = warnings_of(publisher, [make_estimate(step=10)])
    assert said.startswith("lightning_slt (slt_head) could not publish to Dead: ConnectionError: no route to host")


def test_a_folder_that_cannot_be_written_warns_and_the_loggers_go_on(tmp_path):
    (tmp_path / "file").write_text("")
    logger = Memory()
    publisher = RunPublisher([logger], tmp_path / "file" / "run")
    caught = warnings_of(publisher, [make_estimate(step=step) for step in (10, 20)])
    places = sorted(message.split(" to ")[1].split(":")[0] for message in caught)
    assert places == ["the local files", "the local record"]
    assert [step for step, _ in logger.rows] == [10, 20]
    run = tmp_path / "file" / "run"
    assert all(f". {run} could not be written: name another folder with dirpath=. Training" in said for said in caught)


def test_the_local_record_is_written_before_any_logger(tmp_path):
    seen = []

    class Looks(Memory):
        def log_metrics(self, metrics, step=None):
            seen.append(json.loads((tmp_path / "estimates.jsonl").read_text())["step"])

    RunPublisher([Looks()], tmp_path).estimate(make_estimate(step=10))
    assert seen == [10]


def test_a_comet_experiment_gets_figures_and_a_table():
    comet = Comet()
    publisher = RunPublisher([Memory(comet)], None)
    publisher.start({})
    publisher.estimate(make_estimate(step=10, x=9))
    publisher.finish([make_estimate(step=10, x=9)], "finished")
    assert comet.calls == [
        ("other", "slt/status", "running"),
        ("figure", "slt/media/chains", 9),
        ("other", "slt/status", "finished"),
        ("table", "slt_history.csv", 1),
        ("figure", "slt/media/history", 9),
    ]


def test_pictures_are_drawn_once_up_to_the_limit_and_not_at_all_for_nobody(monkeypatch, tmp_path):
    drawn = []
    real = publisher_module.chains_figure
    monkeypatch.setattr(publisher_module, "chains_figure", lambda e: drawn.append(e.step) or real(e))
    publisher = RunPublisher([Memory(), Memory()], tmp_path, media_limit=2)
    for step in (1, 2, 3):
        publisher.estimate(make_estimate(step=step))
    assert drawn == [1, 2]
    assert len(list((tmp_path / "figures").iterdir())) == 2
    RunPublisher([], None).estimate(make_estimate(step=4))
    assert drawn == [1, 2]


def test_other_ranks_publish_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = Memory()
    publisher = RunPublisher([logger], tmp_path / "run")
    publisher.start({})
    publisher.estimate(make_estimate())
    publisher.finish([make_estimate()], "finished")
    assert logger.rows == [] and logger.params == []
    assert not (tmp_path / "run").exists()


def test_an_unknown_status_is_refused():
    with pytest.raises(ValueError, match="'success'; it must be one of running, finished, failed"):
        RunPublisher([], None).finish([], "success")


def test_x_falls_back_to_the_order_of_arrival():
    logger = Memory()
    publisher = RunPublisher([logger], None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        publisher.estimate(make_estimate(step=None))
        publisher.estimate(make_estimate(step=None))
    assert [step for step, _ in logger.rows] == [0, 1]
