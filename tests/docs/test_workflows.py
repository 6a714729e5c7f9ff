"""Workflow files, this project's and the one to copy: they load, and what they call is there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.docs.test_code_blocks import ROOT, check_command

CI_PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
WORKFLOWS = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob(".github/workflows/*.yml"))}
(TO_COPY,) = re.findall(r"```yaml\n(# \.github/workflows/.*?)```", CI_PAGE, re.DOTALL)


def steps(text: str) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(text)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("text", [*WORKFLOWS.values(), TO_COPY], ids=[*WORKFLOWS, "the one to copy"])
def test_a_workflow_is_whole(text: str) -> None:
    workflow = yaml.safe_load(text)
    assert workflow[True]  # YAML reads the key "on" as true
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["runs-on"] == "ubuntu-latest", name
        assert all(("uses" in step) != ("run" in step) for step in job["steps"]), name
    # actions by their version, never by a branch that moves
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in steps(text) if "uses" in step)


@pytest.mark.parametrize("text", WORKFLOWS.values(), ids=WORKFLOWS)
def test_what_this_projects_workflow_calls_is_there(text: str) -> None:
    called = [step["run"].split() for step in steps(text) if "run" in step]
    for words in called:
        check_command(words)
    assert ["make", "test"] in called and ["make", "docs"] in called and ["make", "demo"] in called


def test_the_workflow_to_copy_runs_the_test_file_to_copy() -> None:
    (file,) = re.findall(r"```python\n# (\S+\.py)\n", CI_PAGE)
    runs = [step["run"] for step in steps(TO_COPY) if "run" in step]
    assert runs[-1].split() == ["python", "-m", "pytest", file, "-q"]
