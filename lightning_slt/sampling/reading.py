"""Samples read as minibatches, in another process where reading could move the dataset on."""

from __future__ import annotations

import multiprocessing
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate, get_worker_info

from lightning_slt.sampling.belongings import RANDOM, random_state, set_random_state
from lightning_slt.sampling.own_memory import OwnMemory
from lightning_slt.sampling.rng import LOADER, generator
from lightning_slt.sampling.structures import PLAIN

OF_DIFFERENT_SIZES = "stack expects each tensor to be equal size"
"""How torch says that samples cannot be stacked."""
STANDARD = (0, 1, 2)
"""Files of every process, which print to one place."""
TIMEOUT = 300.0
"""Seconds for which a batch is waited for: a process that was forked beside a thread which held a lock never ends."""


@dataclass
class Reader:
    """Reads samples of a map-style dataset.

    Attributes:
        dataset: map style.
        seed: of the worker processes.
        num_workers: processes that read; None reads a dataset that is known to be plain tensors here, and any other, or
            one whose samples an object collates, in one forked process, so that random numbers or counters of its own
            are not moved on.
        worker_init_fn: as in a DataLoader, for those processes.
    """

    dataset: Dataset[Any]
    seed: int = 0
    num_workers: Optional[int] = None
    worker_init_fn: Optional[Callable[[int], None]] = None
    _here: bool = field(default=False, init=False)

    def __call__(self, batches: list[list[int]], collate: Callable[[list[Any]], Any]) -> list[Any]:
        """The samples of these numbers, batch by batch.

        Raises:
            ValueError: where PyTorch's own collate function finds samples of different sizes.
        """
        try:
            return self._read(batches, collate)
        except RuntimeError as error:
            if collate is not default_collate or OF_DIFFERENT_SIZES not in str(error):
                raise
            remedy = "Give a DataLoader whose collate_fn pads them, or samples of one size."
            raise ValueError(f"data: its samples are of different sizes, and make no batch. {remedy}") from error

    def _read(self, batches: list[list[int]], collate: Callable[[list[Any]], Any]) -> list[Any]:
        workers = 0 if self._here else self.num_workers
        if workers is None:
            plain = is_plain_data(self.dataset) and isinstance(collate, FunctionType)
            workers = 0 if plain or not _can_fork() else 1
        try:
            return self._load(batches, workers, collate)
        except RuntimeError:
            if workers == 0:
                raise
            # data that cannot be read in another process or sent from it (tensors on a GPU, open handles, functions,
            # locks) is read in this one, from then on
            read = self._load(batches, 0, collate)
            self._here = True
            return read

    def _load(self, batches: list[list[int]], workers: int, collate: Callable[[list[Any]], Any]) -> list[Any]:
        rows = _plain_rows(self.dataset) if collate is default_collate else None
        if rows is not None:
            # the same batches without a Python call for each sample
            if len({len(numbers) for numbers in batches}) != 1:
                return [rows(torch.tensor(numbers, device="cpu")) for numbers in batches]
            count, size = len(batches), len(batches[0])
            columns = [c.view(count, size, *c.shape[1:]) for c in rows(torch.tensor(batches, device="cpu").view(-1))]
            return [[column[k] for column in columns] for k in range(count)]
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=partial(_sendable, collate) if workers else collate,
            num_workers=workers,
            generator=generator(self.seed, LOADER),
            multiprocessing_context="fork" if workers and _can_fork() else None,
            timeout=TIMEOUT if workers else 0,
            worker_init_fn=partial(_alone, self.worker_init_fn) if workers else None,
        )
        with preserve_generators(self.dataset):
            with may_have_children(), _numbers_on_cpu():
                batches_read = iter(loader)
            try:
                return list(batches_read)
            finally:
                # a worker that failed would else be waited for when its iterator is collected, while training goes on
                getattr(batches_read, "_shutdown_workers", _nothing_to_do)()


def is_plain_data(dataset: Any) -> bool:
    """Whether reading it cannot change it: tensors and lists of numbers, and subsets of those."""
    if type(dataset) is Subset:
        return is_plain_data(dataset.dataset)
    return type(dataset) in (TensorDataset, list, tuple) or isinstance(dataset, Tensor)


def _plain_rows(dataset: Any) -> Optional[Callable[[Tensor], list[Tensor]]]:
    """Several rows at once of a dataset whose items are just rows of tensors, or a subset of such; None for others."""
    if type(dataset) is TensorDataset and len(dataset.tensors) > 1:
        return lambda numbers: [tensor[numbers] for tensor in dataset.tensors]
    if type(dataset) is Subset:
        inner = _plain_rows(dataset.dataset)
        if inner is not None:
            indices = torch.as_tensor(dataset.indices, device="cpu")
            return lambda numbers: inner(indices[numbers])
    return None


def _can_fork() -> bool:
    return "fork" in multiprocessing.get_all_start_methods()


@contextmanager
def may_have_children() -> Iterator[None]:
    """Let a daemonic process, such as one of ``multiprocessing.Pool``, start processes.

    It may not, since it is ended without a word and would leave them behind. Those of a loader end with their parent.
    """
    config: dict[str, Any] = getattr(multiprocessing.current_process(), "_config", {})
    daemonic = config.get("daemon")
    if not daemonic:
        yield
        return
    config["daemon"] = False
    try:
        yield
    finally:
        config["daemon"] = daemonic


def _numbers_on_cpu() -> AbstractContextManager[Any]:
    """Where a loader begins: it draws a number from its generator, which is one of the CPU whatever
    ``torch.set_default_device`` says."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@contextmanager
def preserve_generators(dataset: Any) -> Iterator[None]:
    """Put back the random generators that a dataset holds as attributes, its own and those of datasets inside it."""
    restore: list[Callable[[], object]] = []
    for part in _datasets_in(dataset):
        for item in vars(part).values():
            if isinstance(item, RANDOM):
                restore.append(partial(set_random_state, item, random_state(item)))
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _datasets_in(dataset: Any) -> Iterator[Dataset[Any]]:
    """A dataset and those inside it, each once."""
    stack, seen = [dataset], set()
    while stack:
        item = stack.pop()
        if id(item) in seen or not isinstance(item, Dataset):
            continue
        seen.add(id(item))
        yield item
        stack += [*vars(item).values(), *getattr(item, "datasets", [])]


def _alone(worker_init_fn: Optional[Callable[[int], None]], worker: int) -> None:
    """How a process begins that reads: of what a fork shares with its parent, it has its own."""
    _open_files_anew()
    info = get_worker_info()
    own = OwnMemory()
    for part in _datasets_in(info.dataset if info is not None else None):
        own.give(part)
    if worker_init_fn is not None:
        worker_init_fn(worker)


def _open_files_anew() -> None:
    """Have files that were open for reading at places of their own: to read on here would move training on in them."""
    with suppress(OSError):  # a system without /proc
        for fd in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):  # a file that may not be opened any more
                _open_anew(fd)


def _open_anew(fd: int) -> None:
    import fcntl  # where there is /proc, there is this

    # those of a temporary file without a name would have a new one made
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~(getattr(os, "O_TMPFILE", 0) | os.O_NOFOLLOW)
    if flags & os.O_ACCMODE == os.O_WRONLY or fd in STANDARD or not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    own = os.open(f"/proc/self/fd/{fd}", flags)
    os.lseek(own, os.lseek(fd, 0, os.SEEK_CUR), os.SEEK_SET)
    os.dup2(own, fd, os.get_inheritable(fd))
    os.close(own)


def _sendable(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """A batch that another process can be sent.

    Raises:
        RuntimeError: where it cannot. The queue between the processes would drop it, and whoever reads wait for ever.
    """
    batch = collate(samples)
    for leaf in tree_flatten(batch)[0]:
        if leaf is None or isinstance(leaf, PLAIN):
            continue
        try:
            if isinstance(leaf, Tensor) and leaf.is_leaf and leaf.layout == torch.strided:
                continue  # it goes by shared memory: pickling it here would be work for nothing
            ForkingPickler.dumps(leaf)
        except Exception as error:
            raise RuntimeError(f"a batch of this data cannot be sent: {type(error).__name__}: {error}") from None
    return batch


def _nothing_to_do() -> None:
    pass
