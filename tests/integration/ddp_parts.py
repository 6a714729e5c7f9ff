"""What scenarios of several data-parallel ranks are made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from tests.integration import models
from tests.integration.harness import SLTMonitor

Result = dict[str, Any]


def ranks_of(world: int, **kwargs: Any) -> Callable[[], dict[str, Any]]:
    """A trainer of ``world`` CPU ranks; of one process where it is 1."""

    def make() -> dict[str, Any]:
        strategy = {"strategy": DDPStrategy(process_group_backend="gloo")} if world > 1 else {}
        return {"devices": world, **strategy, **kwargs}

    return make


def said(monitor: SLTMonitor, **more: Any) -> Result:
    return {"estimates": [e.state_dict() for e in monitor.estimates], **more}


class Unreadable(torch.utils.data.Dataset):
    """Samples that the second rank cannot read while a firing lasts."""

    firing = False

    def __init__(self) -> None:
        self.samples = models.tensors()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        if self.firing and os.environ.get("LOCAL_RANK") == "1":
            raise OSError("only this rank fails")
        return self.samples[index]


class Firing(Callback):
    """Before and after the monitor among the callbacks: tells the data that a firing may come, or is over."""

    def __init__(self, now: bool) -> None:
        self.now = now

    def on_train_batch_end(self, *_: Any) -> None:
        Unreadable.firing = self.now
