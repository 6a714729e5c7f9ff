from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities import registry


@pytest.fixture(scope="session", autouse=True)
def _installed_once() -> Iterator[None]:
    """Every Trainer asks for plugins, by a file of each package that is installed: they are read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order, so that fixed seeds give fixed numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that offline runs of wandb are written to.

    wandb keeps its run, its mode and its settings for the whole process: what an earlier test has left is ended before,
    and what this one leaves is ended after.
    """
    wandb = pytest.importorskip("wandb")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(tmp_path),
        "WANDB_DATA_DIR": str(tmp_path / "staging"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
    }.items():
        monkeypatch.setenv(name, value)

    def end() -> None:
        if wandb.run is not None:
            wandb.finish()
        wandb.teardown()

    end()
    yield tmp_path
    end()
