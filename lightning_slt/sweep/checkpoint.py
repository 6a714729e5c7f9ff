"""Checkpoints as files: which step they are of, and which weights in them are meant."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_slt.sweep.settings import AVERAGED

WRAPPERS = ("_forward_module.", "_orig_mod.", "module.")
"""What every name begins with in the weights of a module in wrappers: of Fabric, of ``torch.compile``, of DDP."""
CURRENT, STATE = "current_model_state", "state_dict"
"""Where an averaging callback leaves the weights that train, and where the others are."""
SUFFIX = ".ckpt"
SHARDED = (".metadata", "meta.pt")
"""Files that only the folder of a checkpoint in shards has: those of PyTorch and of Lightning."""
_STEP = re.compile(r"step[=_](\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """One file.

    Attributes:
        path: of it.
        step: optimiser steps done.
        epoch: of the run, where it is known.
        content: SHA-256 of the file.
    """

    path: Path
    step: int
    epoch: Optional[int]
    content: str

    @staticmethod
    def of(path: Path) -> Checkpoint:
        """Look into a file.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: where it is no checkpoint, or says nowhere which step it is of.
        """
        state = read_state(path)
        epoch = _whole(state, "epoch", path) if state.get("epoch") is not None else None
        return Checkpoint(path, _step_of(state, path), epoch, _digest(path))


def read_state(path: Path) -> Mapping[str, Any]:
    """What is in a checkpoint, on the CPU. As Lightning does with its own, it is unpickled: open only what you trust.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it cannot be read, or holds no ``state_dict``.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such checkpoint. Give a file that is there.") from error
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(state, Mapping) or not isinstance(state.get(STATE), Mapping):
        raise ValueError(f"{path}: holds no 'state_dict'; checkpoints of Lightning and pinned snapshots do.")
    return state


def weights_in(state: Mapping[str, Any], which: str, path: Path) -> dict[str, Tensor]:
    """The raw or the averaged weights of a checkpoint.

    Lightning's averaging callbacks (``EMAWeightAveraging``, ``WeightAveraging``) put the average in ``state_dict`` and
    the weights that train in ``current_model_state``; a checkpoint without those has raw weights alone.

    Raises:
        ValueError: where averaged weights are asked for and there are none.
    """
    if which == AVERAGED and CURRENT not in state:
        raise ValueError(
            f"weights='averaged': {path} has no averaged weights (no '{CURRENT}' in it). Set weights='raw'."
        )
    return dict(state[CURRENT] if which != AVERAGED and CURRENT in state else state[STATE])


def unwrapped(weights: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The weights by the names that ``module`` has, where they were stored from inside wrappers of it."""
    names = module.state_dict().keys()
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in weights) and names.isdisjoint(weights):
            weights = {name.removeprefix(wrapper): weight for name, weight in weights.items()}
    return weights


def in_order(
    paths: Sequence[Path], unread: Optional[dict[Path, str]] = None
) -> tuple[list[Checkpoint], list[Checkpoint]]:
    """Checkpoints by step, and those that are left out since another one is of the same step (``last.ckpt``).

    Args:
        paths: files, and folders for the ``*.ckpt`` in them.
        unread: is given what is wrong with files that are no checkpoints, such as one that a crash has cut off, where
            there are others; None to refuse them all for it.

    Raises:
        FileNotFoundError, ValueError: as :meth:`Checkpoint.of`; ValueError for none at all.
    """
    if not paths:
        raise ValueError("no checkpoints were given: name files, such as logs/version_0/checkpoints/*.ckpt.")
    kept: dict[int, Checkpoint] = {}
    left: list[Checkpoint] = []
    files = dict.fromkeys(file for path in paths for file in _files_of(path))
    found: list[Checkpoint] = []
    refused: dict[Path, ValueError] = {}
    for file in files:
        try:
            found.append(Checkpoint.of(file))
        except ValueError as error:
            refused[file] = error
    if refused and (unread is None or not found):
        raise next(iter(refused.values()))
    if unread is not None:
        unread.update({file: str(reason).removeprefix(f"{file}: ") for file, reason in refused.items()})
    for checkpoint in sorted(found, key=lambda c: (c.step, c.path)):
        if checkpoint.step in kept:
            left.append(checkpoint)
        else:
            kept[checkpoint.step] = checkpoint
    return list(kept.values()), left


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if any((path / name).exists() for name in SHARDED):
        raise ValueError(
            f"{path}: is one checkpoint in shards. Make a file of it: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    if not (files := sorted(path.glob(f"*{SUFFIX}"))):
        raise ValueError(f"{path}: a folder without checkpoints (*{SUFFIX}); name files, or the folder with them.")
    return files


def _step_of(state: Mapping[str, Any], path: Path) -> int:
    """Batches that stepped, which is what a monitor counts; ``global_step`` counts the steps of all optimisers."""
    for key in ("global_step", "step"):
        if key not in state:
            continue
        step, optimizers = _whole(state, key, path), len(state.get("optimizer_states") or ())
        try:
            # one behind in a checkpoint that is written at the end of a batch
            batches = int(state["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"])
        except (KeyError, TypeError):
            return step
        several = optimizers > 1 and step % optimizers == 0 and step // optimizers - batches in (0, 1)
        return step // optimizers if several else step
    named = _STEP.search(path.name)
    if named is None:
        raise ValueError(f"{path}: says nowhere which step it is of. Name it like step=1000.ckpt.")
    return int(named[1])


def _whole(state: Mapping[str, Any], key: str, path: Path) -> int:
    """A whole number in a checkpoint.

    Raises:
        ValueError: where it is none.
    """
    try:
        return int(state[key])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: its {key!r} is {state[key]!r}, and no whole number.") from error


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


__all__ = ["Checkpoint", "in_order", "read_state", "unwrapped", "weights_in"]
