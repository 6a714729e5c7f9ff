"""Ranks that share a firing: which strategies are supported, and how ranks agree and hand each other results."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any, Optional, TypeVar

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from lightning_slt.callbacks.apart import SeenTrainer
from lightning_slt.sampling.batches import MinibatchSource, ReplaySource
from lightning_slt.sampling.collective import Alone, Collective, RankLostError, Together
from lightning_slt.sampling.common_batches import CommonBatches
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.sharded import ShardedObjective, whole_weights
from lightning_slt.warned import speaker, warn

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another in a firing; a slow rank is waited for, a dead one ends the run as DDP would."""

PATIENCE = timedelta(minutes=1)
"""How long a rank on which a pass of a sharded model has failed waits for the others to fail as well."""

GONE = -1
"""The word of a rank that will not come any more."""


class RankFailedError(RuntimeError):
    """Another rank failed in its share of the chains; this firing is skipped on all of them.

    Attributes:
        kinds: names of the classes of what they failed with.
    """

    def __init__(self, message: str, kinds: Collection[str] = ()) -> None:
        super().__init__(message)
        self.kinds = frozenset(kinds)


class Ranks:
    """The ranks of a data-parallel run, with a process group of their own on the CPU.

    A group of its own keeps the chains' messages out of the way of those of training (Lightning broadcasts a signal on
    the default group with every batch). It must be made on every rank at the same moment: in ``setup``.
    """

    _made = 0

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        Ranks._made += 1  # in the same order on every rank
        self._store = dist.PrefixStore(f"lightning_slt_{Ranks._made}", _get_default_store())
        self._arrivals = 0

    def close(self) -> None:
        """Give the process group back; no exchange after this."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def exchange(self, work: Callable[[], T]) -> list[T]:
        """See :class:`~lightning_slt.sampling.collective.Collective`."""
        error: Optional[Exception] = None
        mine: Any = None
        try:
            mine = work()
        except RankLostError:
            raise  # nobody is there to be told
        except Exception as raised:
            error = raised
        told = None if error is None else (type(error).__name__, str(error))
        answers: list[Any] = [None] * self.world_size
        dist.all_gather_object(answers, (told, mine), group=self._group)
        if error is not None:
            raise error
        failed = [(rank, what) for rank, (what, _) in enumerate(answers) if what is not None]
        if failed:
            said = "; ".join(f"rank {rank} failed: {kind}: {what}" for rank, (kind, what) in failed)
            raise RankFailedError(said, {kind for _, (kind, _) in failed})
        return [value for _, value in answers]

    def arrive(self, alone: bool) -> None:
        """See :class:`~lightning_slt.sampling.collective.Meeting`.

        Word is left in the store of the process group. A collective with a short timeout would not do: its threads go
        on to wait for the others, and keep the process from ending.
        """
        self._arrivals += 1
        late: list[int] = []
        try:
            self._store.set(str(self.rank), str(self._arrivals))
            end = time.monotonic() + PATIENCE.total_seconds()
            while alone:
                words = {rank: self._word_of(rank) for rank in range(self.world_size)}
                late = [rank for rank, word in words.items() if word < self._arrivals]
                if not late:
                    return
                if time.monotonic() > end or any(words[rank] == GONE for rank in late):
                    self._store.set(str(self.rank), str(GONE))
                    break
                time.sleep(0.05)
        except RuntimeError as error:  # the process that holds the store is gone
            raise RankLostError("the first rank is gone, and training cannot go on.") from error
        if late:
            raise RankLostError(
                f"a chain failed on rank {self.rank} and not on rank {late[0]}, which waits for this one inside the "
                "sharded model: training cannot go on."
            )

    def _word_of(self, rank: int) -> int:
        """How often a rank has come, or :data:`GONE`."""
        return int(self._store.get(str(rank))) if self._store.check([str(rank)]) else 0

    def add(self, values: Tensor) -> Tensor:
        """See :class:`~lightning_slt.sampling.collective.Collective`."""
        dist.all_reduce(values, group=self._group)
        return values


def make_collective(trainer: Trainer) -> Collective:
    """The collective of this run; called on every rank in ``setup``."""
    if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
        return Together(Ranks()) if is_sharded(trainer) else Ranks()
    return Alone()


def close_collective(collective: Collective) -> None:
    """Give a collective's process group back, where it has one."""
    ranks = collective.ranks if isinstance(collective, Together) else collective
    if isinstance(ranks, Ranks):
        ranks.close()


def is_sharded(trainer: Trainer) -> bool:
    """Whether each rank has a part of the weights."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def make_objective(trainer: Trainer, module: LightningModule, collective: Collective, **settings: Any) -> Objective:
    """The loss of the module: on a private copy of it, or in place on its shards.

    Args:
        settings: ``loss_fn``, ``restrict``, ``context`` and ``say`` of
            :class:`~lightning_slt.sampling.objective.Objective`.
    """
    if is_sharded(trainer):
        return ShardedObjective(module, collective, trainer.world_size, trainer=SeenTrainer(trainer), **settings)
    return Objective(module, trainer=SeenTrainer(trainer), **settings)


def share_batches(source: MinibatchSource, collective: Collective, prefix: str = "slt") -> MinibatchSource:
    """A source from which ranks that run chains together take the same minibatches; on all of them at once.

    Ranks that run chains of their own keep their own minibatches, with the n of the first: chains of one estimate are
    of one posterior, and callbacks that act on it must do the same on all ranks.
    """
    if isinstance(collective, Together):
        return source if isinstance(source, CommonBatches) else CommonBatches(source, collective)
    if collective.world_size == 1:
        return source
    told = collective.exchange(lambda: (source.num_samples, source.given))
    sizes, given = [size for size, _ in told], {batch for _, batch in told}
    if None not in given and len(given) > 1:
        warn(
            f"{speaker(prefix, 'num_samples=None')}: an iterable dataset gives each rank batches of its own, and n "
            "counts those of the first rank alone. Give num_samples= of all the data where each rank has a part of it."
        )
    source.num_samples = sizes[0]
    if len(set(sizes)) > 1 and not isinstance(source, ReplaySource):  # of batches seen so far one may have more
        warn(
            f"{speaker(prefix, 'num_samples=None')}: the ranks train on data sets of different sizes, {sizes}, and "
            f"n = {sizes[0]} is the first rank's. Give num_samples= where all of them together are what is trained on."
        )
    return source


def weights_to_keep(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The weights and buffers of the whole model, by name, on the first rank; of interest there only.

    To be called on all ranks at once: those of a sharded model are gathered one after another, into the memory of the
    first rank's CPU.
    """
    if not is_sharded(trainer):
        return dict(module.state_dict()) if trainer.is_global_zero else {}
    return whole_weights(module, keep=trainer.is_global_zero)


def check_strategy(trainer: Trainer, elementwise: bool = True, samples: bool = False, prefix: str = "slt") -> None:
    """Refuse, before training, a strategy under which chains could not run.

    Args:
        trainer: with its strategy.
        elementwise: the sampler moves each weight by itself.
        samples: losses of single samples are asked for.
        prefix: of the monitor, for what is said.

    Raises:
        MisconfigurationException: for strategies that own the weights, and for what shards do not allow, naming what
            can be done.
    """
    strategy, who = trainer.strategy, speaker(prefix)
    if type(strategy).__module__.startswith("pytorch_lightning"):
        raise MisconfigurationException(
            f"{who} is a callback of the package lightning, and this Trainer is of pytorch_lightning: they do not "
            "know each other's classes. Import the Trainer and the modules from lightning.pytorch."
        )
    precision = type(getattr(strategy, "_precision_plugin", None)).__name__
    if precision in ("TransformerEnginePrecision", "BitsandbytesPrecision"):
        raise MisconfigurationException(
            f"{who} does not support {precision}: its scaling state is shared with training. Train with another "
            "precision, or measure stored checkpoints with estimate_llc(...)."
        )
    if isinstance(strategy, (XLAStrategy, SingleDeviceXLAStrategy)):
        raise MisconfigurationException(
            f"{who} does not support {type(strategy).__name__}: chains were never tried on TPUs. Measure stored "
            "checkpoints with estimate_llc(...) on another device."
        )
    # DeepSpeedStrategy derives from DDPStrategy, but its engine owns the weights
    if isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy):
        return
    if not isinstance(strategy, ModelParallelStrategy):
        raise MisconfigurationException(
            f"{who} does not support {type(strategy).__name__}, which keeps the weights to itself: train with "
            "strategy='ddp' or ModelParallelStrategy (FSDP2), or measure stored checkpoints with estimate_llc(...)."
        )
    if samples:
        raise MisconfigurationException(
            f"{speaker(prefix, 'probe=...')} does not support ModelParallelStrategy: losses of single samples need "
            "whole weights on each device. Leave probe=None, or measure stored checkpoints with "
            "estimate_influence(...)."
        )
    if not elementwise:
        raise MisconfigurationException(
            f"{speaker(prefix, 'sampler=...')} does not support this sampler under ModelParallelStrategy: its steps "
            "need sums over all the weights. Use LeimkuhlerMatthews, SGLD or RMSpropSGLD."
        )
