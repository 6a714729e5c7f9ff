"""Susceptibility in the report and in the terminal: what it is, its numbers, its course, and whether it may be read."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from lightning_slt.cli import main
from lightning_slt.publish.html import report_html, write_report
from lightning_slt.publish.run import load_run
from lightning_slt.publish.specs.parts import BELOW, VALID
from lightning_slt.publish.susceptibility_rows import cells, course_rows, drawn
from lightning_slt.publish.words import headline, susceptibility_verdict
from lightning_slt.record import RunRecord
from lightning_slt.susceptibility_record import SusceptibilityEstimate, SusceptibilityRecord
from tests.publish import browser
from tests.publish.helpers import make_estimate, make_susceptibility
from tests.publish.recorded import HOSTILE
from tests.publish.test_report import Elements, data_of

REASON = "head: 1 of 4 chains have diverged"
NOTE = "body: the heat of the step is 5 % of the LLC"


def at(step: int, head: float = 0.2, groups: tuple[str, ...] = ("cat", HOSTILE), **changes) -> SusceptibilityEstimate:
    chi = {"head": [head / 2, head, 0.02], "body": [-3.0, -2.5, -3.5]}
    return make_susceptibility(chi, groups, step=step, **changes)


def write(folder: Path, history: list[SusceptibilityEstimate]) -> Path:
    for found in history:
        RunRecord(folder / "slt").append(make_estimate(step=found.step))
        SusceptibilityRecord(folder / "slt").save(found)
    return folder


HISTORY = [at(100), at(200, head=-80.0, reasons=(REASON,)), at(300, head=0.5), at(400, head=0.6, notes=(NOTE,))]


def section_of(page: str) -> str:
    found = re.search(r'<section id="susceptibility">.*?</section>', page, re.S)
    return found[0] if found else ""


def shown_in(columns: int, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["show", str(folder), "--no-color"]) == 0
    return capsys.readouterr().out


def test_the_report_has_the_last_firing_as_a_table_with_errors(tmp_path: Path) -> None:
    page = report_html(load_run(write(tmp_path, HISTORY)))
    assert '<a href="#susceptibility">' in page
    section = section_of(page)
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)]
    assert [row[0] for row in rows[:3]] == ["data", "<b>the whole shift</b>", "cat"] and len(rows) == 4
    numbers = [[cell.replace("\u00a0", " ") for cell in row[1:]] for row in rows]
    assert numbers == [
        ["head", "body"],
        ["0.300 ± 0.010", "−3.000 ± 0.010"],
        ["0.600 ± 0.010", "−2.500 ± 0.010"],
        ["0.020 ± 0.010", "−3.500 ± 0.010"],
    ]
    assert section.count('class="number faint"') == 1, "0.02 is within 3 errors of zero"
    assert "How a component of the model answers to data" in section
    assert "Step 400: valid, from 4 chains of 250 draws for each component. 3 of the 4 firings are valid." in section
    assert NOTE in section and 'class="verdict bad"' not in section


def test_where_all_firings_are_valid_it_is_said_so() -> None:
    assert susceptibility_verdict(HISTORY[2:]).endswith("for each component. Both firings are valid.")
    assert susceptibility_verdict([at(100), *HISTORY[2:]]).endswith("for each component. All 3 firings are valid.")
    assert susceptibility_verdict(HISTORY[:1]).endswith("for each component.")


def test_names_of_groups_make_no_element(tmp_path: Path) -> None:
    page = report_html(load_run(write(tmp_path, HISTORY)))
    elements = Elements(page).found
    assert not [tag for tag, _ in elements if tag == "img"] and len([t for t, _ in elements if t == "script"]) == 5


def test_a_last_firing_that_is_not_valid_says_why_in_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, HISTORY[:2])
    said = f"Step 200: not valid, none of its numbers may be read: {REASON}. 1 of the 2 firings is valid."
    section = section_of(report_html(load_run(folder)))
    assert f'class="verdict bad">{said}' in section
    assert said in re.sub(r"\s+", " ", shown_in(400, folder, capsys, monkeypatch))


def test_the_course_of_each_component_is_a_line_that_leaves_out_what_is_not_valid() -> None:
    rows = course_rows(HISTORY)
    whole = [row for row in rows if row["component"] == "head" and row["whole"]]
    assert [(row["step"], row["state"]) for row in whole] == [(100, VALID), (200, BELOW), (300, VALID), (400, VALID)]
    assert [row["chi"] for row in whole] == pytest.approx([0.1, whole[1]["chi"], 0.25, 0.3])
    assert (whole[0]["low"], whole[0]["high"]) == pytest.approx((0.1 - 0.0196, 0.1 + 0.0196))
    assert -0.5 < whole[1]["chi"] < 0, "on the frame: -40 would flatten all else"
    assert whole[0]["segment"] != whole[2]["segment"], "the band must not run through what is not valid"
    assert whole[2]["segment"] == whole[3]["segment"], "nor break between two that are"
    cat = [row for row in rows if row["component"] == "head" and row["line"] == "cat"]
    assert [(row["step"], row["chi"]) for row in cat] == [(100, 0.2), (300, 0.5), (400, 0.6)]
    assert [row["words"] for row in cat][-1] == "Step 400: head to cat 0.600 ± 0.010"


def test_a_group_has_the_error_of_its_own() -> None:
    """A whole shift is known better than the parts that it is the mean of."""
    errors = torch.tensor([[0.5, 0.75], [0.25, 0.125]]).double()
    (whole, cat, dog) = cells(at(100, groups=("cat", "dog"), group_se=errors))
    assert [(cell.component, cell.group, cell.se) for cell in whole] == [
        ("head", None, pytest.approx(0.01)),
        ("body", None, pytest.approx(0.01)),
    ]
    for cells_of_group, expected in (
        (cat, [("cat", 0.2, 0.5), ("cat", -2.5, 0.25)]),
        (dog, [("dog", 0.02, 0.75), ("dog", -3.5, 0.125)]),
    ):
        assert [(cell.group, pytest.approx(cell.chi), cell.se) for cell in cells_of_group] == expected
    assert [cell.clear for cell in (*cat, *dog)] == [False, True, False, True]


def test_of_many_groups_those_that_stand_out_most_have_a_line() -> None:
    groups = tuple(str(k) for k in range(10))
    rows = course_rows([make_susceptibility({"head": [0.5, *range(10)]}, groups, step=s) for s in (1, 2)])
    assert list(dict.fromkeys(row["line"] for row in rows)) == ["the whole shift", "4", "5", "6", "7", "8", "9"]


def test_a_long_history_is_thinned_to_what_fits_into_a_page(tmp_path: Path) -> None:
    history = [at(step) for step in range(1, 2002)]
    assert len(course_rows(drawn(history))) <= 6_000
    assert [found.step for found in drawn(history)][-1] == 2001


def test_what_is_not_finite_is_told_as_unknown(tmp_path: Path) -> None:
    bad = make_susceptibility({"head": [math.nan]}, se=math.nan, step=100, reasons=("head: no chain is left",))
    page = report_html(load_run(write(tmp_path, [bad])))
    assert "n/a" in section_of(page) and "susceptibility0" not in data_of(page)["charts"]


def test_the_terminal_has_a_line_for_each_component_and_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, [found.replace(groups=("cat", "dog")) for found in HISTORY])
    out = shown_in(100, folder, capsys, monkeypatch)
    part = out.split("Susceptibility: which component answers to which data")[1]
    lines = [re.split(r"\s{2,}", line.strip()) for line in part.splitlines()]
    assert ["head", "the whole shift", "0.300 ± 0.010", "30", "▁·▆█"] in lines
    assert ["cat", "0.600 ± 0.010", "60", "▁·▆█"] in lines
    assert ["dog", "0.020 ± 0.010", "2.0", "▁·▁▁"] in lines
    assert ["body", "the whole shift", "−3.000 ± 0.010", "300", "▁·▁▁"] in lines
    assert "How a component of the model answers to data" in part and NOTE in part


@pytest.mark.parametrize("columns", [80, 60])
def test_the_table_fits_a_narrow_terminal(
    columns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shown_in(columns, write(tmp_path, HISTORY), capsys, monkeypatch)
    assert max(map(len, out.splitlines())) <= columns and "…" not in out
    for value in ("0.300 ± 0.010", "−3.500 ± 0.010"):
        assert value in out


def test_the_story_names_what_stands_out_most(tmp_path: Path) -> None:
    told = headline(load_run(write(tmp_path, [found.replace(groups=("cat", "dog")) for found in HISTORY])))
    assert (
        "Susceptibility to data was measured 4 times, of components head and body; at step 400 what stands out most is "
        "body, held more tightly by data of group “dog” (−3.500 ± 0.010)."
    ) in told


def test_nothing_is_said_where_none_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    RunRecord(tmp_path / "slt").append(make_estimate(step=100))
    assert "usceptibility" not in shown_in(100, tmp_path, capsys, monkeypatch)
    page = report_html(load_run(tmp_path))
    assert 'id="susceptibility"' not in page and "#susceptibility" not in page


@pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
def test_the_course_is_drawn_in_a_browser(tmp_path: Path) -> None:
    """Without a complaint, whatever kinds of rows there are."""
    alone = [make_susceptibility({"head": [chi]}, step=step) for step, chi in ((100, 0.5), (200, 0.75))]
    # of each frame the points of its lines, and the firing that is not valid
    histories = {
        "all": (HISTORY, 20),
        "valid": (HISTORY[2:], 12),
        "not valid": ([HISTORY[1], HISTORY[1].replace(step=300)], 4),
        "alone": (alone, 2),
    }
    with browser.chromium() as driver:
        for name, (history, points) in histories.items():
            browser.open_report(driver, write_report(write(tmp_path / name, history)))
            assert browser.console(driver) == [], name
            marks = "[...document.querySelectorAll('[data-chart=susceptibility0] .mark-symbol.role-mark path')]"
            assert driver.execute_script(f"return {marks}.length") == points, name
