"""The story of a run in a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_slt.cli import main
from tests.publish.recorded import HOSTILE, write_run


@pytest.fixture
def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["show", str(write_run(tmp_path)), "--no-color"]) == 0
    return capsys.readouterr().out


def test_the_table_says_which_estimate_is_not_valid_and_why(shown: str) -> None:
    lines = [line for line in shown.splitlines() if line.strip().startswith(("300", "400"))]
    assert [("NOT VALID" in line, "25.0 ± 0.5" in line) for line in lines] == [(False, True), (True, True)]
    assert "chain" in lines[1].split("NOT VALID")[1]


def test_the_curve_leaves_out_what_is_not_valid(shown: str) -> None:
    curve = next(line for line in shown.splitlines() if line.startswith("LLC"))
    assert curve.split()[1] == "▁▁█·█"
    assert "10.0 to 25.0" in curve


def test_transitions_suspects_and_diagnostics_are_told(shown: str) -> None:
    assert "step 300  structure was built (confirmed)" in shown
    assert "Likely wrong labels and outliers at step 500" in shown
    assert "4 of 5 estimates are valid" in shown


def test_texts_of_the_run_are_neither_markup_nor_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    main_folder = write_run(tmp_path)
    (main_folder / "samples" / "sample_0.txt").write_text("[red]\x1b[2Jgone", encoding="utf-8")
    assert main(["show", str(tmp_path), "--no-color"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out and "[red]" in out
    assert HOSTILE[:20] in out


def test_a_long_run_is_thinned_to_the_rows_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert main(["show", str(tmp_path), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "5 estimates, 2 of them" in out
    assert main(["show", str(tmp_path), "--rows", "0"]) == 1
    assert "--rows=0: must be at least 1" in capsys.readouterr().err
