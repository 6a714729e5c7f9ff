"""The weights of a run around its transitions: where they are kept, and that a full disk does not end the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from lightning.pytorch import LightningModule, Trainer

from lightning_slt.callbacks.distribution import weights_to_keep
from lightning_slt.callbacks.flags.snapshots import SnapshotRing
from lightning_slt.transitions import Transition
from lightning_slt.warned import warn


class KeptWeights:
    """The ring of snapshots of one run after another, and what is pinned of it for a transition.

    Files are written by the first rank. What fails becomes a warning, once a fit.

    Args:
        max_snapshots: files in the ring at the most.
        dirpath: folder of the files; None for the one that :meth:`begin` is told.
        who: says what fails.
    """

    def __init__(self, max_snapshots: int, dirpath: Optional[str], who: str = "TransitionMonitor") -> None:
        self.max_snapshots, self._dirpath, self._who = max_snapshots, dirpath, who
        self._ring: Optional[SnapshotRing] = None
        self._state: Optional[dict[str, Any]] = None  # of a ring to go on with
        self._warned = False

    def begin(self) -> None:
        """A fit begins."""
        self._ring, self._warned = None, False

    def end(self) -> None:
        """A fit is over; another one may go on."""
        self._state, self._ring = self.state_dict(), None

    def forget(self) -> None:
        """Another run: the files of the last one are not its own."""
        self._state = None

    def add(self, trainer: Trainer, module: LightningModule, step: int, folder: Optional[Path], prefix: str) -> None:
        """Keep the weights of a step; on all ranks at once.

        Args:
            trainer: whose weights they are.
            module: that trains.
            step: of the weights.
            folder: of the monitor's record, for files without a ``dirpath``; None where it has none.
            prefix: of the curve: each has a folder of its own below ``dirpath``.
        """
        try:
            weights = weights_to_keep(trainer, module)
            if not trainer.is_global_zero:
                return
            if self._ring is None:
                self._ring = self._open(folder, prefix)
            if self._ring is not None:
                self._ring.add(weights, step, trainer.current_epoch)
        except Exception as error:
            self._warn(error)

    def pin(self, trainer: Trainer, transition: Transition, again: bool) -> dict[str, str]:
        """Keep for good the weights before, at the onset of, after and at the flag of a transition.

        Args:
            trainer: of the run.
            transition: as it is known by now.
            again: it has been pinned before, when less was known of it.

        Returns:
            A path for each role; empty on other ranks, and where nothing is kept.
        """
        if self._ring is None or not trainer.is_global_zero:
            return {}
        roles = {
            "before": transition.onset,
            "onset": transition.onset,
            "after": transition.end,
            "flag": transition.known_at,
        }
        try:
            return self._ring.pin(roles, f"transition_{transition.id:02d}", stay=again)
        except OSError as error:
            self._warn(error)
            return {}

    def _open(self, folder: Optional[Path], prefix: str) -> Optional[SnapshotRing]:
        """The ring of this run, that of a checkpoint where there was one; None where no files are written."""
        state, self._state = self._state, None
        if state is not None and Path(state["folder"]).exists():
            ring = SnapshotRing(Path(state["folder"]), self.max_snapshots)
            ring.load_state_dict(state)
            return ring
        if self._dirpath is not None:
            named = Path(self._dirpath).expanduser()
            folder = named if prefix == "slt" else named / prefix
        if folder is None:
            return None
        candidate, number = folder, 1
        # what an earlier run has pinned is not ours to replace
        while any((candidate / name).exists() for name in ("snapshots", "pinned")):
            candidate, number = folder.with_name(f"{folder.name}_run{number}"), number + 1
        return SnapshotRing(candidate, self.max_snapshots)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"{self._who} could not keep weights: {type(error).__name__}: {error}. Training goes on; further "
                "failures are not reported. Free the disk, name another dirpath, or set pin_checkpoints=False."
            )

    def state_dict(self) -> Optional[dict[str, Any]]:
        """Of the ring; None where there is none."""
        return self._ring.state_dict() if self._ring is not None else self._state

    def load_state_dict(self, state: Optional[dict[str, Any]]) -> None:
        """Go on with this ring, where its folder is still there."""
        self._state = state

    def __getstate__(self) -> dict[str, Any]:
        """For strategies that spawn: an open ring stays behind."""
        return {**self.__dict__, "_ring": None}


__all__ = ["KeptWeights"]
