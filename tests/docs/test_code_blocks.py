"""Every code block of the documentation runs: Python is executed, YAML loaded, command lines looked up."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from lightning_slt.cli import main, parser
from tests.docs.names import leave_files, namespace

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
FENCE = re.compile(r"^ *```+(\S*)", re.MULTILINE)
KNOWN = {"python", "yaml", "bash", "text", "math", "json", "html"}
SHOWN = {"text", "math", "json", "html"}
"""What is there to be looked at; everything else runs."""


def text_file(example: Example) -> None:
    """A YAML block loads; one that names its file in the first line is there under that name for what follows."""
    text = str(example.parsed)
    given = yaml.safe_load(text)
    assert isinstance(given, dict), text
    named = re.match(r"# (\S+\.ya?ml)\n", text)
    if named:
        path = Path(named[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def command_lines(example: Example) -> None:
    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            check_command(words)


def check_command(words: list[str]) -> None:
    """A command that exists: run where it is ours and only prints, looked up where it would install, train or send.

    Raises:
        AssertionError: for a target, a file or a program that is not there.
        SystemExit: for arguments that a command of ours does not take.
    """
    while words and "=" in words[0]:  # VARIABLE=value before the command, or by itself
        words = words[1:]
    if not words or words[0] in SHELL:
        return
    program, *arguments = words[1:] if words[0] in LAUNCHERS else words
    if program == "lightning-slt":
        if arguments[0] == "config":
            assert main(arguments) == 0
        else:
            parser().parse_args(arguments)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets, words
    elif program in ("python", "torchrun"):
        (script,) = [word for word in arguments if word.endswith(".py")][:1]
        assert script == USERS or (ROOT / script).exists(), words
    else:
        assert program in OTHERS, words


SHELL = ("export", "cd", "#!/bin/bash")
LAUNCHERS = ("srun", "nice", "time")
OTHERS = ("pip", "git", "wandb", "tensorboard", "mlflow", "sbatch")
USERS = "train.py"
"""A script of the reader's own."""

SYBIL = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser("yaml", text_file),
        CodeBlockParser("bash", command_lines),
        SkipParser(),
    ],
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    leave_files(folder)
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the page's own, and trainers of one epoch on the CPU."""
    for made in files.iterdir():
        (tmp_path / made.name).symlink_to(made)
    monkeypatch.chdir(tmp_path)
    for name, value in {"MAX_EPOCHS": "1", "ACCELERATOR": "cpu", "ENABLE_PROGRESS_BAR": "0"}.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_code_of_a_page_runs(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = SYBIL.parse(page)
    document.namespace.update(namespace())
    examples = list(document.examples())
    for example in examples:
        example.evaluate()
    for name, shown in list(document.namespace.items()):
        if name.startswith("test_"):
            shown()
    opened = FENCE.findall(page.read_text(encoding="utf-8"))[::2]
    assert len(examples) >= sum(language not in SHOWN for language in opened)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    opened = FENCE.findall(page.read_text(encoding="utf-8"))[::2]
    assert set(opened) <= KNOWN
