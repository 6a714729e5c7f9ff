"""A training run of its own process, that a test may kill: ``python -m tests.integration.beside FOLDER [LAST_STEP]``.

It goes on from the last checkpoint in the folder, where there is one, and ends by SIGKILL after LAST_STEP steps. Every
step is a firing and a checkpoint. The workers' process ids go to ``workers.txt``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Optional

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slt import SGLD, SLTMonitor
from tests.integration.harness import TINY, quiet_trainer, seed_everything
from tests.integration.models import Plain, loaders, zeros

STEPS = 12


class Ends(Callback):
    """Ends the process at a moment after a step, and tells of workers before."""

    def __init__(self, monitor: SLTMonitor, folder: Path, last: int, pause: float) -> None:
        self.monitor, self.folder, self.last, self.pause = monitor, folder, last, pause

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert self.monitor._late is not None
        beside = self.monitor._late._beside
        assert beside._pool is not None
        with open(self.folder / "workers.txt", "a") as file:
            file.write("".join(f"{pid}\n" for pid in beside._pool.processes))
        if trainer.global_step == self.last:
            time.sleep(self.pause)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.last < 0:
            (self.folder / "trains").touch()
            time.sleep(self.pause)


def monitor_of(folder: Path, **changes: Any) -> SLTMonitor:
    settings: dict[str, Any] = {**TINY, "sampler": SGLD(lr=1e-4), "every_n_train_steps": 1, **changes}
    return SLTMonitor(dirpath=str(folder / "slt"), **settings)


def data() -> dict[str, Any]:
    """Without an order to lose: Lightning begins an epoch anew when it is resumed in the middle."""
    return loaders(dataset=zeros(24), shuffle=False)


def last_checkpoint(folder: Path) -> Optional[str]:
    found = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    return str(found[-1]) if found else None


def main(folder: Path, last: int = 0, pause: float = 0.0) -> None:
    torch.set_num_threads(1)
    seed_everything()
    monitor = monitor_of(
        folder, execution="background", devices=["cpu"], max_pending=3, when_full="wait", max_wait=120.0
    )
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    trainer = quiet_trainer(
        folder, callbacks=[monitor, saver, Ends(monitor, folder, last, pause)], enable_checkpointing=True
    )
    trainer.fit(Plain(), ckpt_path=last_checkpoint(folder), **data())


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(float(value) if "." in value else int(value) for value in sys.argv[2:]))  # type: ignore[arg-type]
