"""The wandb workspace: built and serialised without a server, and every key of it is one that a run has logged."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from lightning_slt.callbacks.susceptibilities import keys_of
from lightning_slt.cli import main
from lightning_slt.publish import RunPublisher, workspace
from lightning_slt.publish.chart_rows import CURVE_COLUMNS
from lightning_slt.publish.keys import ALL_METRIC_NAMES, MEDIA_NAMES, TABLE_NAMES
from lightning_slt.publish.tables import CHAIN_COLUMNS
from lightning_slt.transition_record import TransitionLog
from tests.publish.helpers import make_estimate, make_influence, make_report, make_susceptibility, pictures_of
from tests.wandb_runs import inspect, records


def test_every_key_of_the_plan_has_a_name_that_is_published() -> None:
    known = {*ALL_METRIC_NAMES, *(f"tables/{n}" for n in TABLE_NAMES), *(f"media/{n}" for n in MEDIA_NAMES)}
    named = workspace.keys()
    assert {key.removeprefix("slt/") for key in named} <= known


@pytest.mark.parametrize(("of_logger", "prefix"), [("", "slt"), pytest.param("exp", "exp-slt", marks=pytest.mark.slow)])
def test_every_key_of_the_workspace_is_in_a_logged_run(of_logger: str, prefix: str, offline: Path) -> None:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=offline, project="p", prefix=of_logger)
    publisher = RunPublisher([logger], None)
    publisher.start({})
    estimates = [make_estimate(step=step, x=step - 1) for step in (100, 200)]
    influences = [make_influence(step=step) for step in (100, 200)]
    report = make_report()
    log = TransitionLog("slt", 8.0, (report,))
    for estimate, influence in zip(estimates, influences, strict=True):
        publisher.estimate(estimate)
        publisher.influence(influence, pictures_of(influence))
    publisher.transition_point(9.0, log, True, 199, 200, [report], alert=False)
    publisher.finish_influence(influences)
    publisher.finish_transitions(log, 199, 200)
    publisher.finish(estimates, "finished", log.standing)
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    records(folder)
    logged = set(json.loads(inspect(folder, "--summary"))["summary"])
    named = workspace.keys(prefix)
    assert [key for key in named if key not in logged] == []


def test_the_patterns_find_the_susceptibilities_of_a_run_and_not_their_errors() -> None:
    """Components and groups have the user's names, so that no plan can list their keys."""
    found = make_susceptibility({"body": [0.1] * 7, "head": [0.2] * 7}, ("cat", "dog", "noise", "e", "se", "use"))
    keys = keys_of(found, "exp-slt")
    whole, groups = (sorted(k for k in keys if re.search(p, k)) for p in workspace.patterns("exp-slt"))
    named = [f"exp-slt/susceptibility/{component}/" for component in ("body", "head")]
    assert whole == [f"{name}all" for name in named]
    labels = ("group_cat", "group_dog", "group_e", "group_noise", "group_se", "group_use")
    assert groups == [f"{name}{label}" for name in named for label in labels]


def test_the_custom_charts_ask_for_columns_that_their_tables_have() -> None:
    from lightning_slt.publish.specs.filled import fields_of

    assert set(fields_of(workspace.CHARTS["curve"])) <= set(CURVE_COLUMNS)
    assert set(fields_of(workspace.CHARTS["chains"])) <= set(CHAIN_COLUMNS)
    for spec in workspace.CHARTS.values():
        assert '"@' not in json.dumps(spec), "a token of the page was left unfilled"
        assert spec["data"] == {"name": "wandb"}


def test_the_workspace_serialises_in_the_order_of_its_sections() -> None:
    pytest.importorskip("wandb_workspaces")
    built = workspace.build_workspace("me", "mine", losses=["train/loss"])
    spec = workspace.serialised(built)
    sections = [s["name"] for s in spec["section"]["panelBankConfig"]["sections"]]
    names = [name for name, _ in workspace.PLAN]
    assert [s for s in sections if s in names] == names
    text = json.dumps(spec)
    assert not [key for key in workspace.keys(losses=["train/loss"]) if key not in text]
    assert [json.dumps(p) in text for p in workspace.patterns()] == [True, True]
    assert workspace.chart_id("curve") in text
    again = workspace.serialised(workspace.build_workspace("me", "mine", losses=["train/loss"]))
    assert [s["name"] for s in again["section"]["panelBankConfig"]["sections"]] == sections


def test_panels_of_a_section_do_not_overlap() -> None:
    pytest.importorskip("wandb_workspaces")
    for section in workspace.build_workspace("me", "mine").sections:
        cells = [
            (x, y)
            for p in section.panels
            for x in range(p.layout.x, p.layout.x + p.layout.w)
            for y in range(p.layout.y, p.layout.y + p.layout.h)
        ]
        assert len(cells) == len(set(cells)), section.name
        assert max(x for x, _ in cells) < workspace.WIDE


def test_publish_prints_the_workspace_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    assert main(["publish", "me/mine", "--prefix", "slt_attn", "--print"]) == 0
    assert "slt_attn/llc/mean" in json.dumps(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("prefix", ["exp-slt", "exp/a-b-slt_attn"])
def test_a_run_whose_logger_has_a_prefix_of_its_own_can_be_named(
    prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """WandbLogger(prefix="exp") writes "exp-" in front of every key."""
    pytest.importorskip("wandb_workspaces")
    assert main(["publish", "me/mine", "--prefix", prefix, "--print"]) == 0
    text = json.dumps(json.loads(capsys.readouterr().out))
    assert [key for key in workspace.keys(prefix) if key not in text] == []
    assert '"slt/' not in text, "no panel is of the keys without the logger's prefix"


def test_publish_without_the_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["publish", "me/mine", "--print"]) == 1
    assert "pip install 'lightning_slt[publish]'" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["mine", "/mine", "me/", "me/mine/x"])
def test_publish_refuses_what_names_no_project(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", given]) == 1
    assert "expected ENTITY/PROJECT" in capsys.readouterr().err


def test_a_prefix_that_no_monitor_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for prefix in ("llc", "exp", "expslt", "exp-slt/llc"):
        assert main(["publish", "me/mine", "--prefix", prefix, "--print"]) == 1
        said = capsys.readouterr().err
        assert f"prefix={prefix!r}" in said and "'exp-slt' of WandbLogger(prefix='exp')" in said


def test_a_server_that_does_not_answer_is_said_within_seconds(
    offline: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["publish", "me/mine"]) == 1
    assert "no wandb server answers at http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "there"),
    [
        ("a custom chart of that name already exists", True),
        ("Error 1062: Duplicate entry 'me/slt-curve' for key 'name'", True),
        ("entity me does not exist", False),
        ("project doesn't exist", False),
        ("permission denied", False),
    ],
)
def test_a_chart_that_is_there_already_is_no_failure_but_an_entity_that_is_not_is(message: str, there: bool) -> None:
    assert workspace._is_there_already(message) == there
