"""What a sweep reads: checkpoints of many kinds, and files that are none of its module."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_slt.sweep import SweepConfig, sweep
from lightning_slt.sweep.checkpoint import Checkpoint, in_order, unwrapped
from tests.sweep import runs
from tests.sweep.runs import assert_same_points, here

pytestmark = pytest.mark.timeout(240)


def test_nothing_is_said_of_names_inside_wrappers_that_are_put_right(
    config: SweepConfig, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Lightning, which does not put them right, says of each that the checkpoint lacks it."""
    paths, _ = runs.train(tmp_path / "run")
    plain = sweep(paths[:1], config, here([]))
    stored = torch.load(paths[0], weights_only=False)
    stored["state_dict"] = {name.replace("net.", "net._orig_mod."): w for name, w in stored["state_dict"].items()}
    torch.save(stored, tmp_path / "compiled.ckpt")
    recwarn.clear()
    compiled = sweep([tmp_path / "compiled.ckpt"], config, here([]))
    assert_same_points(compiled.estimates, plain.estimates)
    assert [str(w.message) for w in recwarn if "Found keys" in str(w.message)] == []
    stored["state_dict"].popitem()
    torch.save(stored, tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match=r"cut\.ckpt: its weights do not fit module="):
        sweep([tmp_path / "cut.ckpt"], dataclasses.replace(config, folder=str(tmp_path / "other")), here([]))


def test_a_checkpoint_without_the_hyperparameters_of_its_module(config: SweepConfig, tmp_path: Path) -> None:
    """As of a module that does not call ``save_hyperparameters``."""
    stored = {"state_dict": runs.Model(0.1).state_dict(), "pytorch-lightning_version": "2.4.0", "global_step": 5}
    torch.save(stored, tmp_path / "a.ckpt")
    config.module, config.module_args = "tests.sweep.runs:Model", {}
    with pytest.raises(ValueError, match=r"module_args={}: do not fit .*'lr'. Hyperparameters in .*a\.ckpt: none"):
        sweep([tmp_path / "a.ckpt"], config, here([]))
    config.module_args = {"lr": 0.1}
    assert sweep([tmp_path / "a.ckpt"], config, here([])).measured == 1


def test_files_that_are_no_checkpoints(config: SweepConfig, tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "unnamed.ckpt")
    for name, message in (
        ("text", "cannot be read as a checkpoint"),
        ("list", "holds no 'state_dict'"),
        ("unnamed", "says nowhere which step it is of"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep([tmp_path / f"{name}.ckpt"], config, here([]))
    with pytest.raises(FileNotFoundError):
        sweep([tmp_path / "nothing.ckpt"], config, here([]))
    with pytest.raises(ValueError, match="no checkpoints were given"):
        sweep([], config, here([]))


def _damaged(path: Path, how: str) -> None:
    """A checkpoint of another module, of weights that are not finite, or one that a crash has cut off."""
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:1000])
        return
    state = torch.load(path, weights_only=False)
    for name, weight in state["state_dict"].items():
        if how == "another module":
            state["state_dict"][name] = torch.zeros(*weight.shape, 2)
        elif weight.is_floating_point():
            weight.fill_(float("nan"))
    torch.save(state, path)


@pytest.mark.parametrize("where", [0, 3], ids=["the first", "one of them"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", "cannot be read as a checkpoint"),
        ("another module", "its weights do not fit module='tests.sweep.runs:Model'"),
        ("not finite", "some of the current weights are not finite"),
    ],
)
def test_one_damaged_checkpoint_costs_its_point_alone(
    how: str, message: str, where: int, config: SweepConfig, tmp_path: Path
) -> None:
    paths, monitor = runs.train(tmp_path / "run")
    config.localization = None
    _damaged(paths[where], how)
    told: list[str] = []
    result = sweep(paths, config, here([]), told.append)
    step = 2 * (where + 1)
    assert [e.step for e in result.estimates] == [s for s in range(2, 13, 2) if s != step]
    # one posterior for the whole curve: that of the first weights that there are
    first = torch.load(paths[0 if where else 1], weights_only=False)["state_dict"]
    flat = torch.cat([first[name].flatten() for name, _ in runs.plain().named_parameters()])
    gamma = len(flat) / float(flat.square().sum())
    assert 1 < gamma < 100
    assert [e.localization for e in result.estimates] == pytest.approx([gamma] * 5)
    if where:
        assert_same_points(result.estimates, [e for e in monitor.estimates if e.step != step])
    if how == "cut off":
        assert not result.failed and list(result.unread) == [paths[where]] and message in result.unread[paths[where]]
    else:
        assert not result.unread and list(result.failed) == [step] and message in result.failed[step]
    assert sum("failed" in line and message in line for line in told) == 1


def test_none_of_the_checkpoints_is_of_the_module(config: SweepConfig, tmp_path: Path) -> None:
    paths, _ = runs.train(tmp_path / "run")
    for path in paths:
        _damaged(path, "another module")
    with pytest.raises(ValueError, match=r"step=2\.ckpt: its weights do not fit module='tests\.sweep\.runs:Model'"):
        sweep(paths, config, here([]))


def test_a_folder_stands_for_the_checkpoints_in_it(tmp_path: Path) -> None:
    for step in (7, 5):
        torch.save({"state_dict": runs.plain().state_dict()}, tmp_path / f"step={step}.ckpt")
    (tmp_path / "notes.txt").touch()
    found, left = in_order([tmp_path, tmp_path / "step=5.ckpt"])
    assert [(c.step, c.path.name) for c in found] == [(5, "step=5.ckpt"), (7, "step=7.ckpt")] and not left
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: a folder without checkpoints"):
        in_order([empty])
    (empty / ".metadata").touch()
    with pytest.raises(ValueError, match=r"in shards.*consolidate_checkpoint .*empty"):
        in_order([empty])


@pytest.mark.parametrize("module", ["plain", "Model"])
def test_pinned_snapshots_are_checkpoints_too(module: str, config: SweepConfig, tmp_path: Path) -> None:
    """Of a module that a function gives or a class; the step is in the file or in its name."""
    config.module, config.module_args = f"tests.sweep.runs:{module}", {"lr": 0.1}
    config.data = "tests.sweep.runs:dataset"
    torch.save({"state_dict": runs.plain().state_dict(), "step": 5, "epoch": 0}, tmp_path / "a.pt")
    torch.save({"state_dict": runs.plain().state_dict()}, tmp_path / "step=7.ckpt")
    result = sweep([tmp_path / "step=7.ckpt", tmp_path / "a.pt"], config, here([]))
    assert [(e.step, e.epoch) for e in result.estimates] == [(5, 0), (7, None)]


@pytest.mark.parametrize("key", ["global_step", "epoch"])
def test_a_checkpoint_of_no_step_costs_its_point_alone(key: str, config: SweepConfig, tmp_path: Path) -> None:
    config.module, config.data, state = "tests.sweep.runs:plain", "tests.sweep.runs:dataset", runs.plain().state_dict()
    good, bad = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"state_dict": state, "global_step": 5}, good)
    torch.save({"state_dict": state, "global_step": 6, key: None if key == "global_step" else []}, bad)
    told: list[str] = []
    result = sweep([good, bad], config, here([]), told.append)
    assert [e.step for e in result.estimates] == [5]
    assert list(result.unread) == [bad] and f"'{key}'" in result.unread[bad] and "whole number" in result.unread[bad]
    assert sum(line.startswith(f"{bad}: failed: ") for line in told) == 1


@pytest.mark.parametrize("prefix", ["_forward_module.", "_forward_module.module.", "_forward_module._orig_mod."])
def test_weights_stored_from_inside_fabric(prefix: str) -> None:
    module = runs.plain()
    state = module.state_dict()
    found = unwrapped({f"{prefix}{name}": w for name, w in state.items()}, module)
    assert found.keys() == state.keys() and all(found[name] is w for name, w in state.items())


def test_weights_stored_from_inside_ddp(config: SweepConfig, tmp_path: Path) -> None:
    """The point of the same weights; a module that has a ``module`` of its own keeps its names."""
    config.module, config.data, state = "tests.sweep.runs:plain", "tests.sweep.runs:dataset", runs.plain().state_dict()
    torch.save({"state_dict": state, "step": 5}, tmp_path / "a.pt")
    torch.save({"state_dict": {f"module.{name}": w for name, w in state.items()}, "step": 5}, tmp_path / "b.pt")
    bare, wrapped = (sweep([tmp_path / name], config, here([])).estimates for name in ("a.pt", "b.pt"))
    assert len(wrapped) == 1
    assert_same_points(wrapped, bare)
    inner = nn.Sequential(OrderedDict(module=nn.Linear(2, 1)))
    assert unwrapped(inner.state_dict(), inner).keys() == {"module.weight", "module.bias"}


@pytest.mark.parametrize(
    ("global_step", "optimizers", "batches", "step"),
    [(6, 1, 5, 6), (6, 1, 6, 6), (12, 2, 5, 6), (12, 2, 6, 6), (9, 2, 8, 9), (7, 1, None, 7)],
)
def test_the_step_is_the_count_of_batches_that_stepped(
    global_step: int, optimizers: int, batches: Any, step: int, tmp_path: Path
) -> None:
    """At the end of a batch Lightning's count is one behind, and two optimisers count twice."""
    state: dict[str, Any] = {"state_dict": {}, "global_step": global_step, "optimizer_states": [{}] * optimizers}
    if batches is not None:
        state["loops"] = {"fit_loop": {"epoch_loop.state_dict": {"_batches_that_stepped": batches}}}
    torch.save(state, tmp_path / "a.ckpt")
    assert Checkpoint.of(tmp_path / "a.ckpt").step == step
