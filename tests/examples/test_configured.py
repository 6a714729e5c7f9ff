"""The examples that are configured by LightningCLI and by Hydra: they run, take overrides, and refuse mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_slt.record import RunRecord
from tests.examples.test_examples import OFFLINE, ROOT

START = {
    "lightning_cli": ["fit", "--config", str(ROOT / "examples" / "lightning_cli.yaml")],
    "hydra_target": [],
}
QUICK = {
    "lightning_cli": ["--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"],
    "hydra_target": ["trainer.max_epochs=2", "+trainer.enable_progress_bar=false"],
}


def run_configured(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *START[name], *QUICK[name], *arguments]
    environment = {**os.environ, **OFFLINE}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", START)
def test_a_run_from_a_file(name: str, tmp_path: Path) -> None:
    done = run_configured(name, tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob(f"runs/{name}/csv/version_0/slt")
    (estimate,) = RunRecord(record).read()
    assert (estimate.step, estimate.num_chains, estimate.num_draws) == (46, 2, 50)
    assert estimate.num_weights == 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10
    if name == "hydra_target":
        assert f"step 46: LLC {estimate.mean:.2f} ± {estimate.se:.2f}, valid: {estimate.valid}" in done.stdout


MISTAKES = {
    "lightning_cli": [
        ("--trainer.callbacks.min_chang=1", "min_chang"),
        ("--trainer.callbacks.min_change=much", "min_change"),
    ],
    "hydra_target": [
        ("+callbacks.slt.num_chain=3", "num_chain"),
        ("callbacks.slt.sampler.name=MALA", "one of LeimkuhlerMatthews, SGLD, RMSpropSGLD, SGNHT"),
    ],
}


@pytest.mark.parametrize(
    ("name", "mistake", "said"),
    [
        pytest.param(name, *mistake, marks=() if mistake[1] == "min_chang" else pytest.mark.slow)
        for name, given in MISTAKES.items()
        for mistake in given
    ],
)
def test_a_mistake_ends_the_run_before_it_begins(name: str, mistake: str, said: str, tmp_path: Path) -> None:
    done = run_configured(name, tmp_path, mistake)
    assert done.returncode != 0
    assert said in done.stderr
    assert not list(tmp_path.rglob("estimates.jsonl"))
