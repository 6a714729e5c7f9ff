"""A warning is of the line that warns, and ends nothing."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import lightning_slt.callbacks
from lightning_slt.warned import warn


@pytest.mark.parametrize("every_rank", [False, True])
def test_a_warning_is_of_the_line_that_warns_and_logged_where_a_filter_would_raise_it(
    every_rank: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def warns() -> None:
        warn("it takes long", every_rank)

    with pytest.warns(UserWarning, match=r"^it takes long$") as caught:
        warns()
    assert caught[0].filename == __file__ and not caplog.records
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warns()
    assert [(r.levelname, r.message) for r in caplog.records] == [("WARNING", "it takes long")]


def test_no_callback_warns_in_another_way() -> None:
    files = [path for path in Path(lightning_slt.callbacks.__file__).parent.rglob("*.py")]
    ways = ("rank_zero_warn", "warnings.warn", "import warnings")
    assert len(files) > 30 and [f.name for f in files if any(way in f.read_text() for way in ways)] == []


def test_nothing_of_the_package_warns_in_another_way() -> None:
    package = Path(lightning_slt.__file__).parent
    files = [path for path in package.rglob("*.py") if path.name != "warned.py"]
    ways = ("rank_zero_warn", "warnings.warn", "rank_zero_deprecation")
    found = [f.name for f in files if any(way in f.read_text(encoding="utf-8") for way in ways)]
    assert len(files) > 200 and found == []
