"""docs/devices.md names a test for every combination of strategy, precision and execution, and each of them exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "devices.md"
REFERENCE = re.compile(r"`(tests/[\w/]+\.py::[^`]+)`")


def rows_under(heading: str, text: str) -> list[list[str]]:
    """The cells of every row of the tables whose first line is ``heading``."""
    rows: list[list[str]] = []
    for table in re.findall(rf"^{re.escape(heading)}\n\|[-|]+\|\n((?:\|.*\n)*)", text, re.MULTILINE):
        rows += [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return rows


def test_every_row_says_whether_it_is_supported_and_names_a_test() -> None:
    rows = rows_under("| strategy | precision | execution | state | shown by |", PAGE.read_text(encoding="utf-8"))
    assert len(rows) >= 25
    for row in rows:
        assert len(row) == 5, row
        assert re.match(r"supported|refused|as `", row[3]), row
        assert REFERENCE.search(row[4]), row


def named() -> list[str]:
    """The tests that the page names."""
    return sorted(set(REFERENCE.findall(PAGE.read_text(encoding="utf-8"))))


def test_every_test_that_is_named_is_in_its_file() -> None:
    assert len(named()) >= 30
    for test in named():
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name.partition("[")[0] in functions, test


@pytest.mark.slow
def test_every_test_that_is_named_exists() -> None:
    """As pytest itself finds them, with their parameters."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", *named()]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
