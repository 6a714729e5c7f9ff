"""The site builds without a warning, whole, and asks no other server for anything."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lightning_slt
import lightning_slt.testing

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|link\s[^>]*rel=["']?stylesheet)[^>]*?(?:src|href)=["']?(https?:)?//"""
)
"""Something that a browser fetches by itself."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the site, and what the build said."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_it_builds_without_a_warning(built: tuple[Path, str]) -> None:
    assert "WARNING" not in built[1] and "ERROR" not in built[1], built[1]


def test_every_page_is_in_the_nav(built: tuple[Path, str]) -> None:
    """A page that is written and cannot be found is not there."""
    home = (built[0] / "index.html").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        address = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert (built[0] / address).exists(), address
        assert f'href="{address}"' in home or address == "index.html" or _in_a_section(built[0], address), address


def _in_a_section(folder: Path, address: str) -> bool:
    """Pages beyond the first of a tab are listed on the pages of that tab."""
    name = address.rsplit("/", 1)[-1]
    listed = re.compile(rf'<a href="(?:[^"]*/)?{re.escape(name)}" class="md-nav__link"')
    return any(listed.search(page.read_text(encoding="utf-8")) for page in folder.rglob("*.html") if page.name != name)


def test_nothing_is_loaded_from_elsewhere(built: tuple[Path, str]) -> None:
    for page in built[0].rglob("*.html"):
        assert not LOADED.search(page.read_text(encoding="utf-8")), page.name


def test_equations_are_drawn_by_the_browser_itself(built: tuple[Path, str]) -> None:
    theory = (built[0] / "theory.html").read_text(encoding="utf-8")
    written = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8").count("```math")
    assert theory.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == written > 5
    assert "\\frac" not in theory


@pytest.mark.parametrize(
    "name",
    [f"lightning_slt.{name}" for name in lightning_slt.__all__ if not name.startswith("_")]
    + [f"lightning_slt.testing.{name}" for name in ("smoke_test", "assert_training_undisturbed")],
)
def test_every_public_name_has_its_entry(name: str, built: tuple[Path, str]) -> None:
    pages = (built[0] / "reference").rglob("*.html")
    entry = re.compile(rf'<h2 id="{re.escape(name)}"')
    assert any(entry.search(page.read_text(encoding="utf-8")) for page in pages)


def test_docstrings_arrive_as_pages_and_not_as_source(built: tuple[Path, str]) -> None:
    for page in (built[0] / "reference").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r":(?:class|func|meth|mod):|\.\. math::", text), page.name


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[a](reading.md#the-keys)", "[a](reading.md#the-keys)"),
        ("[b](../CHANGELOG.md)", "[b](changelog.md)"),
        ("[c](../benchmarks/README.md#x)", "[c](benchmarks.md#x)"),
        ("see [`d`](../examples/digits.py).", "see `d`."),
        ("[e](../nowhere.py)", "[e](../nowhere.py)"),
        ("![f](images/grokking.png)", "![f](images/grokking.png)"),
        ("[g](https://example.org/a.md)", "[g](https://example.org/a.md)"),
    ],
)
def test_links_into_the_repository(written: str, shown: str) -> None:
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "docs" / "hooks" / "site.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="choosing.md"))
    assert hook.on_page_markdown(written, page, None, None) == shown
