"""The examples run from a shell as a reader would run them, and leave what they say they leave."""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_slt.influence_record import InfluenceRecord
from lightning_slt.record import RunRecord

ROOT = Path(__file__).parents[2]
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}


def run_example(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In an empty folder of its own: an example must not depend on where it is started."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--fast", "--output", str(folder / "out")]
    command += [*arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=120
    )


def assert_picture(path: Path, height: int = 400) -> None:
    """A PNG with something drawn on it."""
    assert path.stat().st_size > 5000
    assert path.read_bytes().startswith(b"\x89PNG")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(pixels) >= 1000 * height
    assert len(np.unique(pixels, axis=0)) > 20
    assert 0.005 < float((pixels != pixels[0]).any(axis=1).mean()) < 0.9  # more than a frame, less than a blot


@pytest.mark.parametrize(
    ("name", "steps", "loss_at_chance", "pictures"),
    [
        ("digits", [23, 46, 69], math.log(10), ["history.png"]),
        ("grokking", [5, 20, 40], math.log(31), ["history.png", "grokking.png"]),
    ],
)
def test_example_measures_draws_and_says_where(
    name: str, steps: list[int], loss_at_chance: float, pictures: list[str], tmp_path: Path
) -> None:
    done = run_example(name, tmp_path, "trainer.enable_progress_bar=false")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

    folder = tmp_path / "out" / "slt"
    record = list(RunRecord(folder).read())
    assert [e.step for e in record] == steps
    assert {e.trace.shape for e in record} == {(4, 20)}
    # it learns: from about chance to well below it
    assert record[-1].init_loss < record[0].init_loss < 1.1 * loss_at_chance
    for picture in pictures:
        assert_picture(folder / "figures" / picture)
        assert str(folder / "figures" / picture) in done.stdout
    chains = sorted((folder / "figures").glob("chains_step_*.png"))
    assert len(chains) == len(steps)
    for picture_of_chains in chains:
        assert_picture(picture_of_chains)

    (wandb_run,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    assert f"Where the results are: {folder}" in done.stdout
    assert f"wandb sync {wandb_run}" in done.stdout
    assert f"3 estimates of the learning coefficient (LLC), {sum(e.valid for e in record)} valid" in done.stdout
    assert ("not valid" in done.stdout) == any(not e.valid for e in record)


def test_overrides_and_the_csv_logger(tmp_path: Path) -> None:
    arguments = ["--logger", "csv", "trainer.max_epochs=1", "monitor.num_chains=2", "trainer.enable_progress_bar=false"]
    done = run_example("digits", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    (estimate,) = RunRecord(tmp_path / "out" / "slt").read()
    assert estimate.num_chains == 2
    metrics = tmp_path / "out" / "csv" / "version_0" / "metrics.csv"
    assert str(metrics) in done.stdout
    assert "slt/llc/mean" in metrics.read_text()
    assert not (tmp_path / "out" / "wandb").exists()


@pytest.mark.parametrize("logger", ["none", "csv"])
def test_wrong_labels_are_found_shown_and_counted(logger: str, tmp_path: Path) -> None:
    """35 of the 300 samples that are looked at are flipped: of twenty at random, two or three would be."""
    done = run_example("mislabelled_digits", tmp_path, "--logger", logger, "trainer.enable_progress_bar=false")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "could not" not in done.stderr
    counts = re.findall(
        r"step (\d+): (\d+) of the 20 worst were flipped \((\d+) of the 20 worst by plain loss\); "
        r"(\d+) of all 300 samples looked at were",
        done.stdout,
    )
    assert [int(step) for step, *_ in counts] == [69, 138]
    assert {int(flipped) for *_, flipped in counts} == {35}
    assert min(int(found) for _, found, *_ in counts) >= 15

    folder = tmp_path / "out" / "slt"
    for name, height in (("suspects", 300), ("influence", 400), ("trajectories", 400)):
        assert_picture(folder / "figures" / f"{name}_step_000000138.png", height)
    for name in ("suspects", "influence"):
        assert str(folder / "figures" / f"{name}_step_000000138.png") in done.stdout
    with open(folder / "tables" / "influence_top_step_000000138.csv", encoding="utf-8") as file:
        suspects = [row["media"] for row in csv.DictReader(file)]
    assert len(suspects) == 20
    assert all((folder / "samples" / f"{name}.png").stat().st_size > 50 for name in suspects)
    assert [e.step for e in InfluenceRecord(folder).read()] == [69, 138]
    metrics = tmp_path / "out" / "csv" / "version_0" / "metrics.csv"
    assert metrics.exists() == (logger == "csv") and (
        logger == "none" or "slt/influence/max_abs" in metrics.read_text()
    )


def test_a_typo_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = run_example("digits", tmp_path, "monitor.num_chain=8")
    assert done.returncode == 2
    assert "monitor.num_chain=8: no such setting (did you mean num_chains?)" in done.stderr
    assert not (tmp_path / "out").exists()
