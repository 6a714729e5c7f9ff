"""The story of a run in a terminal."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from lightning_slt.callbacks.folder import restore_record
from lightning_slt.cli import main
from lightning_slt.influence_record import InfluenceRecord
from lightning_slt.publish.html.page import report_html
from lightning_slt.publish.run import load_run
from lightning_slt.record import RunRecord
from lightning_slt.susceptibility_record import SusceptibilityRecord
from tests.publish.helpers import make_estimate, make_influence, make_susceptibility
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


def test_suspects_that_are_ranked_over_a_run_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path)
    last = make_influence(step=500)
    InfluenceRecord(folder).save(last.replace(suspicion=torch.arange(30).double()))
    assert main(["show", str(tmp_path), "--no-color"]) == 0
    out = capsys.readouterr().out
    assert "Likely wrong labels and outliers, ranked over all firings up to step 500" in out
    assert "at all firings up to the chosen one" in report_html(load_run(tmp_path))


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


def written_in(columns: int, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["show", str(folder), "--no-color"]) == 0
    return capsys.readouterr().out


def test_the_whole_curve_of_a_long_run_fits_into_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is what a person looks for, and is not cut off; nor are numbers in a narrow one."""
    record = RunRecord(tmp_path / "slt")
    for k in range(200):
        record.append(make_estimate(mean=10.0 + (k > 195), step=50 * (k + 1)))
    for columns in (80, 50):
        out = written_in(columns, tmp_path, capsys, monkeypatch)
        assert "…" not in out and max(map(len, out.splitlines())) <= columns
        curve = next(line for line in out.splitlines() if line.startswith("LLC"))
        assert curve.split()[1].endswith("█") and "10.0 to 11.0" in curve
        assert ("R-hat" in out.split("How far")[0]) == (columns == 80)
        assert "10,000  11.0 ± 0.5" in out


def test_no_line_ends_inside_a_number_and_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a table nor in a sentence."""
    folder = write_run(tmp_path)
    SusceptibilityRecord(folder).save(make_susceptibility({"head": [0.5, 0.25]}, ("cat",), step=500))
    for columns in range(44, 90):
        out = written_in(columns, folder, capsys, monkeypatch)
        parts = [part.strip() for line in out.splitlines() for part in re.split(r"\s{2,}|│", line)]
        assert not [part for part in parts if part.startswith("±") or part.endswith("±")], columns
        assert "3.000 ± 0.010" in out and "from 10.0 ± 0.5" in re.sub(r"[\s│]+", " ", out)
        assert max(map(len, out.splitlines())) <= columns


def test_a_long_name_of_a_monitor_leaves_its_curve_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "encoder.layers.0.self_attention.projection"
    RunRecord(tmp_path / "slt").append(make_estimate(mean=10.0, step=100))
    RunRecord(tmp_path / "slt_part").append(make_estimate(mean=3.0, step=100, component=name))
    lines = written_in(80, tmp_path, capsys, monkeypatch).splitlines()
    assert lines[lines.index(name) + 1].split()[:3] == ["LLC", "▁", "3.00"]


def test_the_reasons_of_the_row_above_are_not_told_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RunRecord(tmp_path / "slt")
    reason = "negative beyond its error: the weights are not at a minimum (chains run downhill)"
    for k in range(4):
        bad = {"valid": False, "reasons": (reason,)} if k < 3 else {}
        record.append(dataclasses.replace(make_estimate(mean=-10.0, step=100 * (k + 1)), **bad))
    out = written_in(160, tmp_path, capsys, monkeypatch)
    rows = [line.split("valid", 1)[-1] for line in out.splitlines() if line.strip().startswith(tuple("1234"))]
    rows = [row.split("NOT VALID")[-1].strip() for row in rows if "NOT VALID" in row]
    assert rows == ["chains ran downhill: the weights were at no minimum", "as above", "as above"]
    assert "1 of the 4 estimates is valid" in out and "1 of 4 estimates is valid" in out


def test_a_mean_loss_of_zero_is_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a hinge loss, which most samples have none of."""
    monkeypatch.setenv("COLUMNS", "160")
    folder = write_run(tmp_path, firings=1)
    influence = make_influence(n=3, step=100, mean_loss=torch.zeros(3).double())
    InfluenceRecord(folder).save(influence.replace(train_group=("a", "b", "c")))
    assert main(["show", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[3:6] for line in lines if line[:1] == ["1"] and "a" in line] == [["0.000", "±", "0.010"]]


BROKEN: dict[str, tuple[str, bytes]] = {
    "empty traces": ("traces/step_000000200.npz", b""),
    "traces that are none": ("traces/step_000000200.npz", b"garbage" * 20),
    "cut traces": ("traces/step_000000200.npz", b"PK\x03\x04"),
    "empty influence": ("influence/step_000000200.safetensors", b""),
    "influence that is none": ("influence/step_000000200.safetensors", b"garbage" * 20),
    "broken text of influence": ("influence/step_000000200.json", b"{"),
    "broken transitions": ("transitions.json", b"{broken"),
    "transitions of something else": ("transitions.json", b"[]"),
}


@pytest.mark.parametrize("command", ["show", "report"])
@pytest.mark.parametrize(("name", "content"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_and_the_rest_is_shown(
    command: str,
    name: str,
    content: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write_run(tmp_path) / name
    assert path.exists()
    path.write_bytes(content)
    assert main([command, str(tmp_path)]) == 0
    assert f"{path}: cannot be read (" in caplog.text
    assert "Restore the file from a copy, or delete it" in caplog.text
    if command == "show":
        out = capsys.readouterr().out
        assert "5 estimates" in out
        assert ("structure was built (confirmed)" in out) == (name != "transitions.json")


def test_a_line_that_is_no_estimate_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path)
    with open(folder / "estimates.jsonl", "ab") as file:
        file.write(b"\xff\xfe\x00garbage\n7\n")
    assert main(["show", str(tmp_path)]) == 0
    assert "5 estimates" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"garbage" * 20], ids=["empty", "garbage"])
def test_what_a_resumed_run_finds_broken_is_left_out(content: bytes, tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "traces" / "step_000000200.npz").write_bytes(content)
    (folder / "influence" / "step_000000200.safetensors").write_bytes(content)
    record = RunRecord(folder)
    others = [e for e in record.read(traces=False) if e.step not in (100, 200)]
    with pytest.warns(UserWarning, match=r"influence at step 200.*step_000000200\.safetensors"):
        found = restore_record(record, 500, others, [])
    assert list(found) == [100, 200]
    assert found[100][1] is not None and found[200][1] is None


def test_huge_numbers_leave_room_for_the_other_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    record = RunRecord(tmp_path / "slt")
    for step, mean in ((100, -1.06e13), (200, 3.2e7)):
        record.append(make_estimate(mean=mean, se=5e-2 * abs(mean), step=step, init_loss=2.5e13, seconds=0.123))
    assert main(["show", str(tmp_path), "--no-color"]) == 0
    out = capsys.readouterr().out
    assert "−1.06e+13 ± 5e+11" in out and "3.20e+07 ± 2e+06" in out
    assert "…" not in out and "0.123" in out


def test_one_estimate_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunRecord(tmp_path / "slt").append(make_estimate(step=100))
    assert main(["show", str(tmp_path)]) == 0
    assert "\n1 estimate \n" in re.sub(" +\n", " \n", capsys.readouterr().out)
    assert main(["report", str(tmp_path)]) == 0
    assert "The table of 1 estimate<" in (tmp_path / "slt" / "report.html").read_text(encoding="utf-8")
