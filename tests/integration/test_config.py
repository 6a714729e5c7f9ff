"""LightningCLI and Hydra build the monitor from files; a typo is refused with its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lightning_slt import SGLD, TransitionMonitor
from lightning_slt.sampling.samplers import SGNHT, RMSpropSGLD
from tests.integration.harness import Scenario, SLTMonitor, steps_of
from tests.integration.models import Net, Plain, loaders, with_validation

ARGUMENTS: dict[str, Any] = {
    "every_n_train_steps": 4,
    "num_chains": 2,
    "num_draws": 4,
    "num_burnin_steps": 2,
    "num_steps_bw_draws": 1,
    "localization": 1.0,
    "restrict": ["net.*"],
    "on_failure": "raise",
}


def assert_as_configured(monitor: SLTMonitor, folder: Path) -> None:
    """It trains, fires, and its chains are those that the file asks for."""
    Scenario(Plain, loaders).assert_undisturbed(folder, monitor)
    assert steps_of(monitor) == [4, 8, 12]
    assert {(e.num_chains, e.num_draws, e.num_burnin_steps) for e in monitor.estimates} == {(2, 4, 2)}
    assert {(e.localization, e.step_size, e.num_weights) for e in monitor.estimates} == {(1.0, 1e-4, 10)}


def command_line(folder: Path, arguments: dict[str, Any], *overrides: str) -> LightningCLI:
    trainer = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "default_root_dir": str(folder),
        "callbacks": [{"class_path": "lightning_slt.SLTMonitor", "init_args": arguments}],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer}))
    args = ["--config", str(path), *overrides]
    return LightningCLI(Plain, run=False, args=args, save_config_callback=None, seed_everything_default=False)


def monitor_of(cli: LightningCLI) -> SLTMonitor:
    (monitor,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, SLTMonitor)]
    return monitor


def test_lightning_cli_builds_it(tmp_path: Path) -> None:
    sampler = {"class_path": "lightning_slt.SGLD", "init_args": {"lr": 1e-4}}
    assert_as_configured(monitor_of(command_line(tmp_path, {**ARGUMENTS, "sampler": sampler})), tmp_path)


def test_lightning_cli_takes_overrides(tmp_path: Path) -> None:
    monitor = monitor_of(command_line(tmp_path, ARGUMENTS, "--trainer.callbacks.every_n_train_steps=6"))
    Scenario(Plain, loaders).run(tmp_path, monitor)
    assert steps_of(monitor) == [6, 12]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"num_chain": 2}, "num_chain"),
        ({"num_chains": "two"}, "num_chains"),
        ({"every_n_steps": 1}, "every_n_steps"),
        ({"probes": 5}, "probes"),
    ],
)
def test_lightning_cli_refuses_a_typo(
    wrong: dict[str, Any], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line(tmp_path, {**ARGUMENTS, **wrong})
    assert name in capsys.readouterr().err


def hydra_monitor(folder: Path, arguments: dict[str, Any]) -> SLTMonitor:
    """Through a composed file, so that nested values arrive as Hydra hands them over: DictConfig and ListConfig."""
    hydra = pytest.importorskip("hydra")
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"monitor": {"_target_": "lightning_slt.SLTMonitor", **arguments}})
    )
    with hydra.initialize_config_dir(str(folder), version_base=None):
        config = hydra.compose("config")
    return hydra.utils.instantiate(config.monitor)


@pytest.mark.parametrize("probe", [True, 7])
@pytest.mark.parametrize("build", ["LightningCLI", "Hydra"])
def test_samples_to_look_at(build: str, probe: Any, tmp_path: Path) -> None:
    arguments = {**ARGUMENTS, "num_draws": 32, "probe": probe, "query": 3}
    monitor = hydra_monitor(tmp_path, arguments) if build == "Hydra" else monitor_of(command_line(tmp_path, arguments))
    Scenario(Net, with_validation).run(tmp_path, monitor)
    assert [(e.step, len(e.train_index), len(e.query_index)) for e in monitor.influences] == [
        (step, 24 if probe is True else 7, 3) for step in (4, 8, 12)
    ]


def test_a_dataset_and_functions_by_their_class_paths(tmp_path: Path) -> None:
    """What is no plain data can still be named in a file."""
    arguments = {
        "num_draws": 32,
        "probe": {"class_path": "tests.integration.models.OwnsGenerator"},
        "group_fn": "tests.integration.test_config.sign",
        "render": "builtins.repr",
    }
    monitor = monitor_of(command_line(tmp_path, {**ARGUMENTS, **arguments}))
    Scenario(Plain, loaders).run(tmp_path, monitor)
    assert [(e.step, len(e.train_index), e.groups) for e in monitor.influences] == [
        (step, 24, ("down", "up")) for step in (4, 8, 12)
    ]


@pytest.mark.parametrize("build", ["LightningCLI", "Hydra"])
def test_what_is_no_choice_of_samples_is_named(build: str, tmp_path: Path) -> None:
    arguments = {**ARGUMENTS, "probe": "everything"}
    with pytest.raises(Exception, match="probe: expected a number of samples or a map-style Dataset"):
        hydra_monitor(tmp_path, arguments) if build == "Hydra" else command_line(tmp_path, arguments)


def sign(sample: Any) -> str:
    return "up" if sample[0][0] > 0 else "down"


SAMPLERS: dict[str, Any] = {
    "nested target": {"_target_": "lightning_slt.SGLD", "lr": 1e-4},
    "untyped nested dict": {"lr": 1e-4},
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_hydra_builds_it(sampler: dict[str, Any], tmp_path: Path) -> None:
    monitor = hydra_monitor(tmp_path, {**ARGUMENTS, "sampler": sampler})
    assert_as_configured(monitor, tmp_path)


@pytest.mark.parametrize("kind", [SGLD, RMSpropSGLD, SGNHT], ids=lambda kind: kind.__name__)
def test_a_nested_dict_names_any_sampler(kind: type) -> None:
    monitor = SLTMonitor(sampler={"name": kind.__name__, "lr": 1e-4})  # type: ignore[arg-type]
    assert monitor._asked.settings.sampler == kind(lr=1e-4)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"num_chain": 2}, "num_chain"),
        ({"sampler": {"learning_rate": 1e-4}}, "learning_rate"),
        ({"sampler": {"name": "MALA"}}, "one of LeimkuhlerMatthews, SGLD, RMSpropSGLD, SGNHT"),
    ],
)
def test_hydra_refuses_a_typo(wrong: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=name):
        hydra_monitor(tmp_path, {**ARGUMENTS, **wrong})


def test_checkpoint_of_a_hydra_run_holds_plain_types(tmp_path: Path) -> None:
    """A DictConfig in the state would break ``torch.load(weights_only=True)``."""
    monitor = hydra_monitor(tmp_path, {**ARGUMENTS, "at_steps": [1, 2], "sampler": {"lr": 1e-4}})
    saver = ModelCheckpoint(tmp_path, "last", every_n_train_steps=12)
    settings = {"callbacks": [saver], "enable_checkpointing": True}
    Scenario(Net, loaders, lambda: dict(settings)).run(tmp_path, monitor)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "SLTMonitor" in k]
    assert [e["step"] for e in state["estimates"]] == steps_of(monitor) == [1, 2, 4, 8, 12]


def test_sampler_given_in_python(tmp_path: Path) -> None:
    assert_as_configured(SLTMonitor(**ARGUMENTS, sampler=SGLD(lr=1e-4)), tmp_path)


# ------------------------------------------------------------------------------------------------- transition monitor


def act(transition: Any, trainer: Any, pl_module: Any) -> None:
    """Named in a file by its path."""


WATCH: dict[str, Any] = {"min_change": 2.0, "at_boundary": "suppress", "alert": False, "max_snapshots": 5}


def test_lightning_cli_builds_a_transition_monitor(tmp_path: Path) -> None:
    callbacks = [
        {"class_path": "lightning_slt.TransitionMonitor", "init_args": {**WATCH, "on_transition": f"{__name__}.act"}},
        {"class_path": "lightning_slt.SLTMonitor", "init_args": ARGUMENTS},
    ]
    trainer = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": str(tmp_path)}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {**trainer, "callbacks": callbacks}}))
    args = ["--config", str(path)]
    cli = LightningCLI(Plain, run=False, args=args, save_config_callback=None, seed_everything_default=False)
    (watch,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, TransitionMonitor)]
    assert watch._on_transition is act
    assert_watches(watch, monitor_of(cli), tmp_path)


def test_hydra_builds_a_transition_monitor(tmp_path: Path) -> None:
    hydra = pytest.importorskip("hydra")
    watch = hydra.utils.instantiate({"_target_": "lightning_slt.TransitionMonitor", **WATCH})
    assert_watches(watch, hydra_monitor(tmp_path, ARGUMENTS), tmp_path)
    with pytest.raises(Exception, match="min_chang"):
        hydra.utils.instantiate({"_target_": "lightning_slt.TransitionMonitor", "min_chang": 2.0})


def assert_watches(watch: TransitionMonitor, monitor: SLTMonitor, folder: Path) -> None:
    """As configured, and told of every estimate."""
    assert (watch._settings["min_change"], watch._settings["at_boundary"]) == (2.0, "suppress")
    assert (watch._alert, watch._weights.max_snapshots) == (False, 5)
    Scenario(Plain, loaders).run(folder, watch, monitor)
    assert steps_of(monitor) == [4, 8, 12] and watch.state_dict()["fed"] == 12
