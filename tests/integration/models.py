"""Small modules and data sets, each with one trait that a callback can trip over."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any, Optional

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchmetrics.classification import MulticlassAccuracy

IN, CLASSES, SAMPLES, BATCH = 4, 2, 24, 4
Batch = Any

CHAIN_SAW: list[Any] = []
"""What the steps of chains have seen. A global, since chains work on copies of the module; emptied before each test."""


def chain_saw(module: LightningModule, value: Any) -> None:
    """Remember ``value`` where a chain makes the step: its copy is in eval mode, the module that trains is not."""
    if not module.training:
        CHAIN_SAW.append(value.detach().clone() if isinstance(value, Tensor) else value)


def tensors(n: int = SAMPLES) -> TensorDataset:
    """``n`` points in two classes, the same ones in every run."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, IN, generator=g)
    return TensorDataset(x, (x[:, 0] + 0.3 * torch.randn(n, generator=g) > 0).long())


def loaders(n: int = SAMPLES, validation: bool = False, dataset: Optional[Any] = None, **kwargs: Any) -> dict[str, Any]:
    """The data arguments of ``Trainer.fit``: shuffled batches of 4."""
    dataset = tensors(n) if dataset is None else dataset
    settings = {"batch_size": BATCH, "shuffle": not isinstance(dataset, IterableDataset), **kwargs}
    data = {"train_dataloaders": DataLoader(dataset, **settings)}
    if validation:
        data["val_dataloaders"] = DataLoader(tensors(8), batch_size=BATCH)
    return data


def with_validation() -> dict[str, Any]:
    return loaders(validation=True)


def uneven() -> dict[str, Any]:
    """7 batches, the last one of 2: no accumulation window fits."""
    return loaders(26)


class Net(LightningModule):
    """An MLP with BatchNorm and dropout; logs its loss, counts its steps, has a scheduler that moves at each step."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(IN, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, CLASSES))
        self.num_calls = 0

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return cross_entropy(self.net(x), y)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.num_calls += 1
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Plain(LightningModule):
    """A linear classifier without any state of its own; ``lr=0`` holds its weights still."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Linear(IN, CLASSES)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class SecondHead(Net):
    """Gives a second output in training mode, which its step takes apart: as Inception and GoogLeNet do."""

    def forward(self, x: Tensor) -> Any:
        out = self.net(x)
        return (out, out * 2) if self.training else out

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        first, second = self(batch[0])
        return cross_entropy(first, batch[1]) + cross_entropy(second, batch[1])


class AsksItsLoggers(Plain):
    """Its loss doubles with a CSVLogger, and grows with the length of its folder's name; it logs by hand."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        first, second = self.loggers
        assert os.path.join(first.log_dir, "samples").endswith("version_3/samples")
        for logger in (first, self.trainer.loggers[0], second):
            logger.log_metrics({"by hand": 1.0}, step=self.global_step)
        first.experiment.log_metrics({"by hand": 1.0}, step=self.global_step)
        return loss * (2.0 if isinstance(self.logger, CSVLogger) else 1.0) * len(str(self.logger.name))


class WithMetric(Net):
    """Logs a torchmetric, which Lightning computes and resets at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(CLASSES)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"norm": logits.norm()})
        return cross_entropy(logits, y)


class FrozenNorm(Net):
    """BatchNorm kept in eval mode while the rest trains: a blanket ``train()`` would thaw it."""

    def on_train_epoch_start(self) -> None:
        self.net[1].eval()


class Lazy(Net):
    """Its first layer has no weights before the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.LazyLinear(8)


class WithBackbone(Plain):
    """As BackboneFinetuning wants it: the optimiser begins with what is not frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(IN, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.net = nn.Linear(8, CLASSES)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class FrozenLayer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class OwnRandomness(Net):
    """Draws from all three global generators in its step."""

    def loss(self, batch: Batch) -> Tensor:
        noise = torch.randn(()) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return super().loss(batch) * (1 + 0.01 * noise)


class Plateau(Net):
    """A scheduler that listens to a logged value."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Recurrent(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(1, 4, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden, _ = self.net(batch[0].unsqueeze(-1))
        return cross_entropy(self.head(hidden[:, -1]), batch[1])


class Hooked(Net):
    """A forward hook and a gradient hook that count."""

    def __init__(self) -> None:
        super().__init__()
        self.num_forwards = 0
        self.net[0].register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.num_forwards += 1


class Unlogged(Net):
    """Dynamo (torch 2.13) cannot trace Lightning's ``self.log``."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)


def compiled_module() -> Any:
    return torch.compile(Unlogged(), backend="eager")


def compiled_submodule() -> Net:
    module = Net()
    module.net[0] = torch.compile(module.net[0], backend="eager")
    return module


def compiled_in_place() -> Net:
    module = Net()
    module.net.compile(backend="eager")
    return module


class CastsToHalf(Net):
    """Casts in its forward pass, so that it cannot be computed in float32 where its weights are bfloat16."""

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return cross_entropy(self.net(x.bfloat16()).float(), y)


class Numbered(nn.Module):
    """A constant that no other instance has, so that TorchScript compiles each one by itself."""

    __constants__ = ("number",)
    made = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.number = next(self.made)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Graph(Plain):
    """Mixes its inputs along a graph, whose adjacency is a sparse buffer."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.register_buffer("adjacency", (torch.eye(IN) + torch.eye(IN).roll(1, 0)).to_sparse())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step((torch.sparse.mm(self.adjacency, batch[0].T).T, batch[1]), batch_idx)


class ScriptedNet(Plain):
    """TorchScript compiles it anew after its first calls, and then rounds otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.jit.script(nn.Sequential(nn.Linear(IN, 8), nn.Tanh(), nn.Linear(8, CLASSES), Numbered()))


class RaisesInChain(Net):
    """Uses up all three global generators and then fails, in chains only."""

    def loss(self, batch: Batch) -> Tensor:
        if not self.training:
            torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
            raise RuntimeError("the step failed inside a chain")
        return super().loss(batch)


class NaNInChain(Plain):
    """A starting loss that is not finite."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1.0 if self.training else torch.nan)


class Flat(LightningModule):
    """A loss that does not depend on its 40,000 weights of 1: all that moves them is the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(200, 200))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if not self.training:
            CHAIN_SAW[:] = [self.weight.detach().float().clone()]
        return (0.0 * self.weight).sum() + batch[0].mean() ** 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


# ------------------------------------------------------------------------------------------ forms of the training step


class ReturnsDict(Net):
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return {"loss": super().training_step(batch, batch_idx), "size": len(batch[0])}


class OneArgument(Net):
    def training_step(self, batch: Batch) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


class SometimesNone(Net):
    """Skips the batches that begin with a point of class 0."""

    def training_step(self, batch: Batch, batch_idx: int) -> Optional[Tensor]:
        loss = super().training_step(batch, batch_idx)
        return None if batch[1][0] == 0 else loss


class AlwaysNone(Plain):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        return None


class TakesIterator(Plain):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.log("loss", loss)
        self.manual_backward(loss)
        optimizer.step()


class TwoOptimizers(Manual):
    """Steps both at each batch, so that ``global_step`` rises by 2."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[4].parameters(), lr=0.1)]


def loss_of_net(module: Any, batch: Batch) -> Tensor:
    """What a user gives as ``loss_fn``."""
    return module.loss(batch)


# --------------------------------------------------------------------------------------------- modules that do not copy


class Holds(Net):
    """Holds an object that ``copy.deepcopy`` refuses."""

    def __init__(self, make: Callable[[Net], Any]) -> None:
        super().__init__()
        self.held = make(self)


class OldWeightNorm(Net):
    """The legacy ``weight_norm`` leaves the weight as a non-leaf tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = torch.nn.utils.weight_norm(self.net[0])


class CachesActivation(Net):
    """Keeps its last hidden layer: a tensor with a history, which cannot be deep-copied."""

    def loss(self, batch: Batch) -> Tensor:
        self.last_hidden = self.net[0](batch[0])
        return super().loss(batch)


# ------------------------------------------------------------------------------------------------------------ data sets


class OwnsGenerator(Dataset[tuple[Tensor, Tensor]]):
    """Augments with random numbers of its own: reading a sample changes what is read next."""

    def __init__(self) -> None:
        self.data = tensors()
        self.rng = torch.Generator().manual_seed(1)
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.num_reads += 1
        x, y = self.data[index]
        return x + 0.1 * torch.randn(IN, generator=self.rng), y


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Each epoch goes on where the last one stopped: the position is a state of the data set."""

    def __init__(self, length: int = SAMPLES) -> None:
        self.length = length
        self.position = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = tensors(97)
        for _ in range(self.length):
            self.position += 1
            x, y = data[self.position % 97]
            yield x, y


class Augments(Plain):
    """Zeros come to its step as 2: ``2 * 0 + 1`` before the transfer, and 1 more after it."""

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return [2 * batch[0] + 1, batch[1]]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return [batch[0] + 1, batch[1]]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        chain_saw(self, batch[0])
        return super().training_step(batch, batch_idx)


class AugmentingData(LightningDataModule):
    """The same hooks, owned by a data module."""

    on_before_batch_transfer = Augments.on_before_batch_transfer
    on_after_batch_transfer = Augments.on_after_batch_transfer

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(zeros(), batch_size=BATCH, shuffle=True)


class SeesBatch(Plain):
    """Shows what its chains are given."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        chain_saw(self, batch[0])
        return super().training_step(batch, batch_idx)


class TwoStreams(Plain):
    """Takes the batches of several loaders at once, as a dict or a list."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        chain_saw(self, sorted(batch) if isinstance(batch, dict) else len(batch))
        parts = batch.values() if isinstance(batch, dict) else batch
        return torch.stack([Plain.training_step(self, part, batch_idx) for part in parts]).sum()


def zeros(n: int = SAMPLES) -> TensorDataset:
    return TensorDataset(torch.zeros(n, IN), torch.arange(n) % CLASSES)


def weighted() -> dict[str, Any]:
    return loaders(sampler=WeightedRandomSampler(torch.arange(24.0), 24), shuffle=False)


def batch_sampled() -> dict[str, Any]:
    data = tensors()
    return {"train_dataloaders": DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), BATCH, False))}
