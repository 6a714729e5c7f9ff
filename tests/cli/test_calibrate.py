"""``lightning-slt calibrate``: what it prints and writes, what a run makes of that, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from lightning_slt.cli import main
from lightning_slt.config import MonitorConfig, load
from lightning_slt.publish.phrases import with_error
from tests.calibrate import runs

QUICK = ["num_draws=50"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return str(runs.save(tmp_path))


def written(folder: Path, **changes: Any) -> str:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(runs.settings(**changes)), encoding="utf-8")
    return str(path)


def train(monitor: Any, folder: Path) -> None:
    """Two steps that do not move the weights."""
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(runs.Regression(), runs.loader())


def test_a_monitor_of_what_is_written_measures_the_same(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit at the first firing of a run, whose weights these are; the localization is the found one."""
    output = tmp_path / "made" / "settings.yaml"
    file = written(tmp_path, localization=None)
    assert main(["calibrate", checkpoint, "--config", file, *QUICK, "-o", str(output)]) == 0
    out = capsys.readouterr().out
    assert output.read_text(encoding="utf-8") in out
    assert f"{output}: SLTMonitor, by lightning_slt.config.load(" in out
    settings = load(output)
    assert settings.every_n_train_steps is not None and settings.sampler is None and settings.num_draws == 50
    monitor = load(output, ["every_n_train_steps=1"]).build()
    train(monitor, tmp_path)
    first = monitor.estimates[0]
    assert first.valid and first.localization == settings.localization
    assert out.startswith(f"LLC {with_error(first.mean, first.se)}  valid")


def test_a_pinned_step_is_the_step_of_the_run(checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "settings.yaml"
    call = ["calibrate", checkpoint, "--config", written(tmp_path), *QUICK, "--pin", "--output", str(output)]
    assert main(call) == 0
    settings = load(output)
    assert settings.sampler is not None and settings.sampler.lr is not None
    assert (settings.batch_size, settings.method, settings.localization) == (runs.BATCH, "sequential", runs.GAMMA)
    monitor = load(output, ["every_n_train_steps=1"]).build()
    train(monitor, tmp_path)
    for estimate in monitor.estimates:
        assert (estimate.step_size, estimate.nbeta) == (settings.sampler.lr, settings.nbeta)
    truth = runs.case().truth
    assert truth is not None and abs(monitor.estimates[0].mean - truth) <= max(0.1 * truth, 2 * monitor.estimates[0].se)


def test_the_output_is_plain_where_it_is_a_file(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", checkpoint, "--config", written(tmp_path), *QUICK]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out
    assert said.out.startswith("LLC ") and "What the chains do" in said.out and "What it costs here" in said.out
    assert "a first firing at" in said.err and "a first firing at" not in said.out
    text = said.out.split("Settings of a monitor\n\n")[1]
    assert isinstance(load(yaml.safe_load(text)), MonitorConfig)


def test_without_a_checkpoint_the_initial_module_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--config", written(tmp_path), *QUICK, "--no-color"]) == 0
    assert "of the module as it is initialised" in capsys.readouterr().out


def test_an_estimate_that_is_not_valid_has_a_status_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "settings.yaml"
    file = written(tmp_path, module_args={"away": 3.0})
    assert main(["calibrate", "--config", file, *QUICK, "-o", str(output)]) == 3
    out = capsys.readouterr().out
    assert "NOT VALID" in out and "Chains ran downhill: the weights were at no minimum" in out
    assert "was not valid" in output.read_text(encoding="utf-8").splitlines()[2]


def test_settings_stand_behind_the_file_or_after_set(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a sweep, so that one command line serves both."""
    file = written(tmp_path)
    settings = ["num_draws=30", "num_chains=3", "--set", "num_chains=2"]
    assert main(["calibrate", checkpoint, "--config", file, *settings]) in (0, 3)
    out = capsys.readouterr().out
    assert "num_draws: 30" in out and "num_chains: 2" in out


def test_what_cannot_be_done_is_one_line(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"PK\x03\x04")
    bare = tmp_path / "bare.yaml"
    bare.write_text("num_chains: 2\n", encoding="utf-8")
    for call, said in (
        ([str(tmp_path / "none.ckpt"), "--config", file], "none.ckpt"),
        ([str(broken), "--config", file], "broken.ckpt: cannot be read as a checkpoint"),
        ([str(tmp_path), "--config", file], "is a folder. Give one checkpoint, a file"),
        ([checkpoint, "--config", str(tmp_path / "none.yaml")], "none.yaml"),
        ([checkpoint, "--config", file, "num_chain=2"], "num_chain=2: no such setting (did you mean num_chains?)"),
        ([checkpoint, "--config", file, "num_chains"], "override 'num_chains': write it as key=value"),
        (["--config", file, checkpoint], "a checkpoint stands before --config"),
        ([checkpoint, "--config", file, "-o", str(tmp_path)], "is a folder. Give the path of a YAML file"),
        ([checkpoint, "--config", str(bare)], "module: is missing, and has no default. SweepConfig needs module and"),
        ([checkpoint, "--config", str(tmp_path / "none.yaml")], "none.yaml: no such file. Give the path of a YAML"),
        ([checkpoint, "--config", checkpoint], "not a YAML file"),
        ([checkpoint, "--config", file, "module=nowhere:Net"], "module='nowhere:Net': cannot be imported"),
    ):
        assert main(["calibrate", *call]) == 1, call
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("lightning-slt calibrate: ") and said in lines[0], lines


def test_a_file_of_settings_is_asked_for(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", checkpoint])
    assert stop.value.code == 2
    assert "--config" in capsys.readouterr().err
