"""What the code of the documentation takes as given: a module, its data, a trainer's neighbours. All of it tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_slt
from lightning_slt import SGLD, SLTMonitor

PROBED_STEP = 920
"""The firing whose influence tensors docs/reading.md opens."""


class TinyModule(L.LightningModule):
    """Two weight matrices, an encoder and a head, for components to be named."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 2)
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).tanh())

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def samples(num: int = 40) -> Dataset[Any]:
    generator = torch.Generator().manual_seed(num)
    x = torch.randn(num, 3, generator=generator)
    return TensorDataset(x, x[:, :1] + 0.5 * torch.randn(num, 1, generator=generator))


class TinyData(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(), batch_size=20)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(20), batch_size=20)


def loss_of(module: Any, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


def namespace() -> dict[str, Any]:
    """Every name that a page may use without saying where it is from."""
    torch.manual_seed(0)
    public = {name: getattr(lightning_slt, name) for name in lightning_slt.__all__}
    return {
        **public,
        "DDPStrategy": DDPStrategy,
        "EarlyStopping": EarlyStopping,
        "FSDPStrategy": FSDPStrategy,
        "L": L,
        "ModelCheckpoint": ModelCheckpoint,
        "ModelParallelStrategy": ModelParallelStrategy,
        "Trainer": L.Trainer,
        "act": lambda transition, trainer, module: None,
        "datamodule": TinyData(),
        "dataset": samples(),
        "loss_fn": loss_of,
        "make_datamodule": TinyData,
        "make_module": TinyModule,
        "module": TinyModule(),
        "query_data": samples(20),
        "torch": torch,
        "train_data": samples(),
    }


def leave_files(folder: Path) -> None:
    """What pages open by name: a record (``slt/``) with influence in it, and a checkpoint (``epoch=9.ckpt``)."""
    sampler = SGLD(lr=1e-4)
    small = {"num_chains": 2, "num_draws": 20, "num_burnin_steps": 5, "num_steps_bw_draws": 1}
    monitor = SLTMonitor(at_steps=[PROBED_STEP], sampler=sampler, probe=30, dirpath=str(folder / "slt"), **small)
    trainer = L.Trainer(
        max_steps=PROBED_STEP,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    trainer.fit(TinyModule(), TinyData())
    trainer.save_checkpoint(folder / "epoch=9.ckpt")
