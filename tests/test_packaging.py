"""The wheel: everything that the package reads is in it, and the command it brings works from where it is installed."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightning_slt
from lightning_slt import __version__

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


@pytest.mark.parametrize("asked", ["--version", "--help"])
def test_the_package_itself_can_be_run_and_says_what_it_is_without_torch(installed: Path, asked: str) -> None:
    """Which takes seconds to import."""
    said = run_installed(installed, sys.executable, "-m", "lightning_slt", asked)
    assert said.startswith(f"lightning_slt {__version__}\n" if asked == "--version" else "usage: lightning-slt ")
    code = (
        f"import sys\nfrom lightning_slt.cli import main\ntry: main([{asked!r}])\n"
        "except SystemExit: print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    assert run_installed(installed, sys.executable, "-c", code) == f"{said}[]\n"


def test_names_that_are_imported_when_they_are_asked_for_are_those_of_the_type_checker() -> None:
    (block, *_) = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.name: f"{node.module}" for node in imports for alias in node.names}
    assert typed == {name: f"lightning_slt.{room}" for name, room in lightning_slt._ROOMS.items()}
    assert sorted(typed) == sorted(lightning_slt.__all__) and set(typed) <= set(dir(lightning_slt))
    for name, module in typed.items():
        assert getattr(lightning_slt, name) is getattr(importlib.import_module(module), name)


def test_modules_of_the_package_are_attributes_of_it_and_nothing_else_is() -> None:
    code = "import lightning_slt; print(lightning_slt.record.RunRecord.__name__, hasattr(lightning_slt, 'recrod'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "RunRecord False\n", done.stderr
    with pytest.raises(AttributeError, match=r"^module 'lightning_slt' has no attribute 'recrod'$"):
        lightning_slt.recrod  # type: ignore[attr-defined]  # noqa: B018


def test_the_installed_package_is_the_one_that_is_imported(installed: Path) -> None:
    code = "import lightning_slt, lightning_slt.testing; print(lightning_slt.__file__)"
    assert Path(run_installed(installed, sys.executable, "-c", code).strip()).is_relative_to(installed)
