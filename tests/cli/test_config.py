"""``lightning-slt config``: what it prints says what each setting means, and loads again."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from lightning_slt import SLTMonitor, TransitionDetector, TransitionMonitor, estimate_influence, estimate_llc
from lightning_slt.cli import main
from lightning_slt.cli.config import SECTIONS, WIDTH, arguments_of, comments_of, schema_of
from lightning_slt.config import MonitorConfig, RunConfig, SamplerConfig, load


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["config", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("section", SECTIONS)
def test_what_is_printed_loads_again_to_the_defaults(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    schema = schema_of(section)
    text = printed(capsys, section)
    assert load(yaml.safe_load(text), schema=schema) == schema()
    assert max(map(len, text.splitlines())) <= WIDTH + 2


def test_a_whole_run_is_printed_where_nothing_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    assert text == printed(capsys, "run")
    assert set(yaml.safe_load(text)) == {f.name for f in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_its_comment_above_it(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, section).splitlines()
    for i, line in enumerate(lines):
        if re.match(r" *\w+:", line):
            assert re.match(r" *# .*[.\w)]$", lines[i - 1]), line
    assert not [line for line in lines if re.search(r"``|:(class|func|mod):|\bNone\b|\bTrue\b", line)]


@pytest.mark.parametrize(
    ("section", "documented"),
    [
        ("monitor", SLTMonitor),
        ("transitions", TransitionMonitor),
        ("llc", estimate_llc),
        ("influence", estimate_influence),
        ("detector", TransitionDetector),
    ],
)
def test_comments_are_those_of_the_docstring(section: str, documented: object) -> None:
    said = arguments_of(documented)
    comments = comments_of(schema_of(section))
    assert comments == {name: said[name] for name in comments}
    told = {"transitions": "alert", "detector": "min_change"}.get(section, "method")
    assert comments[told] in said.values()


def test_a_field_that_nothing_is_said_of_is_no_silent_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SLTMonitor, "__doc__", (SLTMonitor.__doc__ or "").replace("num_chains:", "chains:"))
    with pytest.raises(KeyError, match="num_chains"):
        comments_of(MonitorConfig)


def test_the_section_that_is_commented_out_is_one_that_can_be_put_in(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "monitor").splitlines()
    start = lines.index("# sampler:")
    assert lines[start - 1] == "sampler: null"
    opened = [*lines[: start - 1], *(line[2:] for line in lines[start : start + 9]), *lines[start + 9 :]]
    assert load(yaml.safe_load("\n".join(opened))) == MonitorConfig(sampler=SamplerConfig())


def test_an_entry_of_two_names_is_said_of_both() -> None:
    def documented() -> None:
        """Does something.

        Args:
            one: the first.
            two, three: how many of
                each; None for all.
        """

    told = "how many of each; null for all."
    assert arguments_of(documented) == {"one": "the first.", "two": told, "three": told}
