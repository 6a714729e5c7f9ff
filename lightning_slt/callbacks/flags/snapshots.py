"""A short ring of the weights on disk, so that those of a transition are still there when it becomes known."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch

from lightning_slt.durable import save_tensors, write_whole

_DENSE = 4  # the newest snapshots, which are never thinned out
_REACH = 256  # firings, the longest stretch that the detector looks back
_NAME = re.compile(r"step_(\d{9,})\.pt")


class SnapshotRing:
    """Snapshots of the weights at the last firings, a bounded number of files, and those that are pinned.

    The files are ``{"state_dict", "step", "epoch"}``, in ``<folder>/snapshots`` and, once pinned, in
    ``<folder>/pinned``. When the ring is full, the snapshot goes that is missed least: the one with the shortest gap
    between its neighbours for its age. So the newest lie close together and older ones further apart, and an onset many
    firings ago still has a snapshot near by.

    Args:
        folder: where; made at the first write.
        max_snapshots: files in the ring at the most; pinned ones are not counted.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ring = SnapshotRing(Path(folder), max_snapshots=6)
        ...     for step in range(10):
        ...         ring.add({"w": torch.zeros(1)}, step)
        ...     print(len(ring.steps), ring.steps[-4:])
        6 [6, 7, 8, 9]
    """

    def __init__(self, folder: Path, max_snapshots: int = 12) -> None:
        self.folder = folder
        self.max_snapshots = max_snapshots
        self._entries: list[tuple[int, int]] = []  # (step, number of the firing), oldest first
        self._number = 0
        self._pinned: dict[int, str] = {}  # step -> file name in pinned/
        self._left: dict[int, int] = {}  # step -> number of the firing, of pinned ones that left the ring

    @property
    def steps(self) -> list[int]:
        """Steps of the snapshots in the ring, oldest first."""
        return [step for step, _ in self._entries if self.path(step).exists()]

    @property
    def pinned(self) -> dict[int, Path]:
        """The pinned snapshots by step."""
        return {step: self.folder / "pinned" / name for step, name in self._pinned.items()}

    def path(self, step: int) -> Path:
        """Where the snapshot of a step is while it is in the ring."""
        return self.folder / "snapshots" / f"step_{step:09d}.pt"

    def add(self, state_dict: Mapping[str, Any], step: int, epoch: int = 0) -> None:
        """Write the weights of a step, in one step; what leaves the ring is deleted.

        Raises:
            OSError: where the file cannot be written.
        """
        path = self.path(step)
        # on the CPU, so that a machine without that device can read it
        state = {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in state_dict.items()}
        whole = {"state_dict": state, "step": step, "epoch": epoch}
        write_whole(path, lambda temporary: save_tensors(whole, temporary))
        self._entries = [entry for entry in self._entries if entry[0] != step] + [(step, self._number)]
        self._number += 1
        while len(self._entries) > self.max_snapshots:
            gone, _ = self._entries.pop(self._least_missed())
            self.path(gone).unlink(missing_ok=True)

    def _least_missed(self) -> int:
        numbers = [number for _, number in self._entries]
        if len(numbers) <= _DENSE + 1 or self._number - numbers[0] > _REACH:
            return 0
        return min(
            range(1, len(numbers) - _DENSE),
            key=lambda i: (numbers[i + 1] - numbers[i - 1]) / (self._number - numbers[i]),
        )

    def pin(self, roles: Mapping[str, float], label: str, stay: bool = False) -> dict[str, str]:
        """Keep the snapshots that play these roles; those that had one under the same label and have none now go.

        Args:
            roles: role -> step that is wanted. ``"before"`` takes the last snapshot at or before it, ``"after"`` the
                first at or after it, any other the nearest; where there is none on that side, the nearest.
            label: how the files' names begin.
            stay: the ring keeps what is pinned now as well, so that it is the same whether or not a run that is resumed
                had come this far before.

        Returns:
            Role -> path. A snapshot that plays two roles is one file, named by both.

        Raises:
            OSError: where a file cannot be moved.
        """
        known = sorted({*self.steps, *(step for step, path in self.pinned.items() if path.exists())})
        chosen: dict[int, list[str]] = {}
        for role, wanted in roles.items():
            step = _choose(known, role, wanted)
            if step is not None:
                chosen.setdefault(step, []).append(role)
        paths: dict[str, str] = {}
        mine = {step: name for step, name in self._pinned.items() if name.startswith(f"{label}_")}
        pinned = self.folder / "pinned"
        for step, names in chosen.items():
            if step not in self._pinned or step in mine:
                name = f"{label}_{'_'.join(names)}_step_{step:09d}.pt"
                pinned.mkdir(parents=True, exist_ok=True)
                if step in mine:
                    os.replace(pinned / mine[step], pinned / name)
                    if not self.path(step).exists():  # pinned before a crash, after the checkpoint
                        self._leave(step)
                elif stay:
                    write_whole(pinned / name, partial(shutil.copyfile, self.path(step)))
                else:
                    os.replace(self.path(step), pinned / name)
                    self._leave(step)
                self._pinned[step] = name
            paths |= {role: str(pinned / self._pinned[step]) for role in names}
        for step in set(mine) - set(chosen):
            self._release(step)
        return paths

    def _leave(self, step: int) -> None:
        self._left |= {s: number for s, number in self._entries if s == step}
        self._entries = [entry for entry in self._entries if entry[0] != step]

    def _release(self, step: int) -> None:
        """Back to the ring it came from."""
        path = self.folder / "pinned" / self._pinned.pop(step)
        if step in self._left:
            if path.exists():
                os.replace(path, self.path(step))
            self._entries = sorted([*self._entries, (step, self._left.pop(step))])
        elif path.exists() and step in {s for s, _ in self._entries} and not self.path(step).exists():
            os.replace(path, self.path(step))  # pinned before a crash, after the checkpoint
        else:
            path.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {
            "folder": str(self.folder),
            "entries": [list(entry) for entry in self._entries],
            "number": self._number,
            "pinned": dict(self._pinned),
            "left": dict(self._left),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, with the files that are still there.

        A crash after the checkpoint may have left newer files, and half ones: they are deleted. What was pinned after
        it is found again under its new name.
        """
        self._number = int(state["number"])
        self._left = {int(step): int(number) for step, number in state.get("left", {}).items()}
        for step, name in state["pinned"].items():
            # released after the checkpoint
            if self.path(int(step)).exists() and int(step) in self._left:
                os.replace(self.path(int(step)), self.folder / "pinned" / name)
        moved = {}
        for path in sorted((self.folder / "pinned").glob("*_step_*.pt")):
            moved[int(path.stem.rsplit("_", 1)[-1])] = path.name
        # those without a file count until they would have gone: what is thinned out when is then as without the crash
        self._entries = [(int(step), int(number)) for step, number in state["entries"]]
        wanted = {int(step) for step in state["pinned"]} | {step for step, _ in self._entries}
        self._pinned = {int(step): name for step, name in state["pinned"].items()}
        self._pinned |= {step: name for step, name in moved.items() if step in wanted}
        there = set(self.steps)
        for path in (self.folder / "snapshots").glob("step_*"):
            match = _NAME.fullmatch(path.name)
            if path.suffix == ".tmp" or (match and int(match[1]) not in there):
                path.unlink(missing_ok=True)


def _choose(known: list[int], role: str, wanted: float) -> Optional[int]:
    side = known
    if role == "before":
        side = [step for step in known if step <= wanted][-1:]
    elif role == "after":
        side = [step for step in known if step >= wanted][:1]
    return min(side or known, key=lambda step: abs(step - wanted), default=None)


__all__ = ["SnapshotRing"]
