"""The report: what stands in the file, whatever the run has named its samples and groups."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from lightning_slt.cli import main
from lightning_slt.publish import RunPublisher
from lightning_slt.publish.chart_rows import CURVE_COLUMNS, component_rows, curve_rows
from lightning_slt.publish.html import report_html
from lightning_slt.publish.run import load_run
from lightning_slt.publish.specs.chains import cost, diagnostics
from lightning_slt.publish.specs.curve import components, curve
from lightning_slt.publish.specs.parts import ABOVE, BELOW, VALID
from tests.publish.helpers import make_estimate
from tests.publish.recorded import DIVERGED, HOSTILE, write_run


class Elements(HTMLParser):
    """Every element of a page, and the text inside those of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report_html(load_run(write_run(tmp_path_factory.mktemp("run"))))


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="run">(.*?)</script>', page, re.S)[1])


def test_the_page_names_nothing_that_must_be_fetched_and_forbids_it(page: str) -> None:
    elements = Elements(page).found
    assert not [a for tag, a in elements if tag in ("link", "iframe", "object", "embed") or a.get("src")]
    policy = next(a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "unsafe-eval" not in policy


def test_hostile_names_of_samples_groups_and_settings_make_no_element(page: str) -> None:
    elements = Elements(page).found
    assert not [tag for tag, _ in elements if tag == "img"]
    # the data, three libraries, the page's own
    assert len([tag for tag, _ in elements if tag == "script"]) == 5
    assert not [a for _, a in elements if any(name.startswith("on") for name in a)]
    assert data_of(page)["samples"]["0"]["text"] == f"sample 0 {HOSTILE}"


def test_a_firing_that_lost_a_chain_is_said_to_be_left_out(page: str) -> None:
    data = data_of(page)
    rows = [r for r in data["charts"]["curve"]["datasets"]["rows"] if r["row"] == "estimate"]
    assert [r["state"] for r in rows] == ["valid", "valid", "valid", "not valid", "valid"]
    segments = [r["segment"] for r in rows]
    assert segments[2] != segments[4], "the band must not run through an estimate that is not valid"
    firing = next(f for f in data["chains"][0]["firings"] if f["step"] == DIVERGED)
    assert not firing["valid"] and "Not valid" in firing["words"]
    assert 'class="bad"' in page


def test_components_transitions_energies_and_samples_are_all_there(page: str) -> None:
    data = data_of(page)
    assert {"curve", "components", "diagnostics", "cost", "energy0", "trajectories"} == set(data["charts"])
    assert len(data["chains"]) == 3
    rules = [r for r in data["charts"]["curve"]["datasets"]["rows"] if r["row"] == "transition"]
    assert [(r["step"], r["end"], r["kind"]) for r in rules] == [(280.0, 330.0, "A")]
    assert len(data["samples"]) == 20


def test_a_component_beyond_its_frame_is_marked_as_such() -> None:
    """Cut at the frame, it would else look as if it were there."""
    estimates = [make_estimate(mean=mean, step=10 * k, valid=k > 1) for k, mean in enumerate((-90.0, 400.0, 5.0, 6.0))]
    states = [row["state"] for row in component_rows("attn", estimates)]
    assert states == [BELOW, ABOVE, VALID, VALID]
    points = components()["spec"]["layer"][-1]["encoding"]["shape"]
    marks = dict(zip(points["scale"]["domain"], points["scale"]["range"], strict=True))
    assert points["field"] == "state"
    assert [marks[state] for state in states] == ["triangle-down", "triangle-up", "circle", "circle"]


def test_where_nothing_is_valid_the_whole_errors_are_drawn() -> None:
    """Cut at the other estimates, -8 ± 5 would look as if it could not be below -8."""
    estimates = [make_estimate(mean=m, se=se, step=s, valid=False) for m, se, s in ((-8.0, 5.0, 10), (-6.0, 2.0, 20))]
    rows = [dict(zip(CURVE_COLUMNS, row, strict=True)) for row in curve_rows(estimates)]
    assert [(row["low"], row["llc"], row["high"]) for row in rows] == [
        pytest.approx((-17.8, -8.0, 1.8)),
        pytest.approx((-9.92, -6.0, -2.08)),
    ]


def test_a_monitor_whose_chains_are_lost_is_not_to_be_chosen(tmp_path: Path) -> None:
    """The first of three: the page begins with the chains that there are."""
    folder = write_run(tmp_path)
    shutil.rmtree(folder / "traces")
    text = report_html(load_run(folder))
    chains = data_of(text)["chains"]
    assert [len(monitor["firings"]) for monitor in chains] == [5, 5]
    selector = re.search(r'<select class="monitor">(.*?)</select>', text)[1]
    assert re.findall(r'<option value="(\d)">(\w+|&lt;)', selector) == [("0", "attn"), ("1", "&lt;")]


def test_of_a_long_run_some_estimates_are_drawn_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is to stay one that can be mailed: a point is near a kilobyte of it."""
    folder = write_run(tmp_path, firings=41, draws=4)
    for room in ("data", "sections"):
        monkeypatch.setattr(f"lightning_slt.publish.html.{room}.MAX_POINTS", 11)
    text = report_html(load_run(folder))
    charts = data_of(text)["charts"]
    rows = charts["curve"]["datasets"]["rows"]
    assert [row["step"] for row in rows if row["row"] == "estimate"] == list(range(100, 4101, 400))
    assert [row["row"] for row in rows if row["row"] != "estimate"] == ["transition", "boundary"]
    assert len(charts["components"]["datasets"]["rows"]) == 33
    assert len({row["step"] for row in charts["diagnostics"]["datasets"]["rows"]}) == 11
    assert "Of 41 estimates 11 are drawn; all are in history.csv." in text


def test_points_of_a_long_run_are_small_where_they_are_valid() -> None:
    layers = curve(points=1000)["vconcat"][0]["layer"]
    (size,) = [part["encoding"]["size"] for part in layers if part.get("params")]
    assert size["condition"]["test"].endswith(f"=== '{VALID}'") and size["condition"]["value"] < 10
    assert size["value"] > 20
    assert f"'{VALID}'" in components(points=1000)["spec"]["layer"][-1]["encoding"]["size"]["condition"]["test"]
    assert curve(points=100) == curve() and components(points=50) == components()


def axes_of(spec: Any) -> Iterator[Any]:
    """The axes of measured numbers and of counts in a spec."""
    if isinstance(spec, list):
        for part in spec:
            yield from axes_of(part)
    elif isinstance(spec, dict):
        for name, part in spec.items():
            if name in ("x", "y") and "type" in part and part.get("axis", {}).get("labels", True):
                yield part.get("axis", {})
            yield from axes_of(part)


@pytest.mark.parametrize("spec", [curve(), components(), diagnostics(), cost()], ids=["curve", "parts", "diag", "cost"])
def test_an_axis_of_one_value_has_no_row_of_zeros(spec: Any) -> None:
    """The library writes 100.000000 and 12.0000000 where nothing is said of the format."""
    axes = list(axes_of(spec))
    assert axes and all(axis.get("format") in (",.12~g", ",~r") for axis in axes)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_limits_of_very_many_draws_are_found() -> None:
    """A call of JavaScript takes no more than some ten thousand arguments."""
    script = files("lightning_slt.publish.html").joinpath("page.js").read_text(encoding="utf-8")
    function = re.search(r"  function limitsOf\(.*?\n  }\n", script, re.S)[0]
    asked = "[Array.from({length: 300000}, (_, k) => k % 101), [null, NaN], [null, 2.5], [-1, Infinity, 3]]"
    done = subprocess.run(
        ["node", "-e", f"{function} console.log(JSON.stringify({asked}.map(limitsOf)))"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout) == [[-8, 108], [0, 1], [2.375, 2.625], pytest.approx([-1.32, 3.32])]


def test_the_command_writes_one_file_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "out" / "page.html"), "--title", "<b>"]) == 0
    assert "page.html (" in capsys.readouterr().out
    assert "<h1>&lt;b&gt;</h1>" in (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["page.html"]


@pytest.mark.parametrize("output", ["", "file/report.html"], ids=["a folder", "a file for a folder"])
def test_an_output_that_cannot_be_written_is_named(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", firings=2, draws=4)
    (tmp_path / "file").write_text("")
    assert main(["report", str(folder), "-o", str(tmp_path / output)]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / output) in said and "-o" in said and "such as" in said
    assert ".tmp" not in said and "Errno" not in said


def test_a_folder_without_a_record_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "none': no such folder" in capsys.readouterr().err


class _Run:
    def __init__(self, offline: bool) -> None:
        self.offline, self.disabled, self.summary = offline, False, {}
        self.config: dict = {}

    def define_metric(self, *a: object, **k: object) -> None: ...


class WandbLogger:
    """A logger of that name, with a run that is on a server or not."""

    _prefix = ""
    LOGGER_JOIN_CHAR = "-"

    def __init__(self, offline: bool) -> None:
        self.experiment = _Run(offline)

    def log_metrics(self, metrics: object, step: object = None) -> None: ...


@pytest.mark.parametrize(
    ("loggers", "written"),
    [([], True), ([WandbLogger(offline=True)], True), ([WandbLogger(offline=False)], False)],
    ids=["no logger", "wandb offline", "wandb online"],
)
def test_the_report_is_written_by_itself_where_no_server_shows_the_run(
    tmp_path: Path, loggers: list[object], written: bool
) -> None:
    publisher = RunPublisher(loggers, tmp_path)
    publisher.start({})
    estimates = [make_estimate(step=10), make_estimate(step=20)]
    for estimate in estimates:
        publisher.estimate(estimate)
    publisher.finish(estimates, "finished")
    assert (tmp_path / "report.html").exists() is written


def test_a_report_without_room_names_the_command_for_another_file(tmp_path: Path) -> None:
    """Said at the end of a run, where nobody has called a command that has options."""
    publisher = RunPublisher([], tmp_path)
    publisher.estimate(make_estimate(step=10))
    (tmp_path / "report.html").mkdir()
    with pytest.warns(UserWarning, match="could not publish to the report") as caught:
        publisher.finish([make_estimate(step=10)], "finished")
    (said,) = [str(w.message) for w in caught]
    command = (
        f"Have it written to another file, such as here: lightning-slt report {tmp_path} -o report.html. Training and"
    )
    assert command in said and ".." not in said


def test_a_report_that_fails_is_warned_about_and_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise RuntimeError("no page")

    monkeypatch.setattr("lightning_slt.publish.html.write_report", broken)
    publisher = RunPublisher([], tmp_path)
    publisher.estimate(make_estimate(step=10))
    with pytest.warns(UserWarning, match="could not publish to the report: RuntimeError: no page"):
        publisher.finish([make_estimate(step=10)], "finished")
    assert '"finished"' in (tmp_path / "summary.json").read_text()
