"""LightningCLI: the callbacks are named in the YAML file by their classes, and their arguments are checked by type.

    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --trainer.max_epochs 3 \
        --trainer.callbacks.min_change 1.0      # of the last callback in the list

A typo or a wrong type ends the run before it begins, with the argument's name.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from digits import Digits, loaders
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader


class DigitsData(L.LightningDataModule):
    """scikit-learn's digits."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self._train, self._val = loaders(batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._train

    def val_dataloader(self) -> DataLoader[Any]:
        return self._val


def main() -> None:
    """Everything else is in the file."""
    LightningCLI(Digits, DigitsData, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
