"""The wheel: everything that the package reads is in it, and the command it brings works from where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_slt"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, with the setuptools that is here: nothing is downloaded."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(PACKAGE, source / "lightning_slt", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def run_installed(installed: Path, *command: str) -> str:
    """What a command prints in a folder without sources, where only the installed package can be imported."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_that_the_package_holds_is_in_the_wheel(wheel: Path) -> None:
    held = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert "lightning_slt/py.typed" in held
    assert held == {name for name in names if name.startswith("lightning_slt/")}
    others = {name.split("/")[0] for name in names} - {"lightning_slt"}
    assert len(others) == 1 and others.pop().endswith(".dist-info")  # no tests, no examples


def test_the_command_works_from_an_installed_wheel(installed: Path) -> None:
    assert run_installed(installed, str(installed / "bin" / "lightning-slt"), "config", "monitor").startswith("# ")


def test_the_installed_package_is_the_one_that_is_imported(installed: Path) -> None:
    code = "import lightning_slt, lightning_slt.testing; print(lightning_slt.__file__)"
    assert Path(run_installed(installed, sys.executable, "-c", code).strip()).is_relative_to(installed)
