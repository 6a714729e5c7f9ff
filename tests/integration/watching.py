"""Runs that are watched for transitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback

from tests.integration.harness import Scenario
from tests.integration.models import Plain, loaders

EPOCHS = {"max_epochs": 10}  # 60 steps of 6 batches an epoch


def train(folder: Path, *callbacks: Callback, **trainer: Any) -> Any:
    return Scenario(Plain, loaders, lambda: {**EPOCHS, **trainer}).run(folder, *callbacks)


class Stepped(Plain):
    """A learning rate that drops to a tenth at step 30, where the curve jumps."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
