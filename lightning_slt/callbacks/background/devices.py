"""The names of the devices that a background worker may have: ``"cuda:1"``, ``"cpu"``, ``"cpu:0-1"``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch

_CORES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True)
class WorkerDevice:
    """Where one worker runs.

    Attributes:
        device: as torch names it.
        cores: the CPU cores that it is pinned to; empty for none.

    Example:
        >>> WorkerDevice.parse("cpu:0-1,4"), WorkerDevice.parse("cuda:1").device
        (WorkerDevice(device='cpu', cores=(0, 1, 4)), 'cuda:1')
    """

    device: str
    cores: tuple[int, ...] = ()

    @staticmethod
    def parse(name: str) -> WorkerDevice:
        """From its name.

        Raises:
            ValueError: naming ``devices``, the value, and what is understood.
        """
        kind, _, rest = name.partition(":")
        if kind == "cpu" and (not rest or _CORES.fullmatch(rest)):
            cores: set[int] = set()
            for part in rest.split(",") if rest else []:
                first, _, last = part.partition("-")
                cores |= set(range(int(first), int(last or first) + 1))
            if cores or not rest:
                return WorkerDevice("cpu", tuple(sorted(cores)))
        elif kind == "cuda" and (rest.isdigit() or not rest):
            return WorkerDevice(f"cuda:{int(rest or 0)}")
        raise ValueError(
            f"devices={name!r}: expected 'cuda:1' for a GPU, 'cpu' for the CPU, or 'cpu:2-3' for cores of it."
        )

    def check(self) -> None:
        """Whether this machine has it.

        Raises:
            ValueError: naming ``devices`` and what there is.
        """
        if self.device.startswith("cuda"):
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if int(self.device.partition(":")[2]) >= count:
                raise ValueError(f"devices={self.device!r}: this machine shows {count} GPUs, numbered from 0.")
        missing = [core for core in self.cores if core >= (os.cpu_count() or 1)]
        if missing:
            raise ValueError(
                f"devices='cpu:{','.join(map(str, self.cores))}': there is no core {missing[0]}; this machine has "
                f"{os.cpu_count()}, numbered from 0."
            )

    def enter(self, threads: int) -> torch.device:
        """Make this process one that runs there; with cores of its own, as many threads as cores.

        Args:
            threads: otherwise.
        """
        if self.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)
        torch.set_num_threads(len(self.cores) or threads)
        device = torch.device(self.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device


def worker_devices(
    names: Optional[Sequence[str]], training: Optional[torch.device], num_training: int = 1
) -> list[WorkerDevice]:
    """The devices that were asked for, or those that are spare.

    Args:
        names: None for the CPU where training is on the CPU, and for the GPUs that training does not use.
        training: a device that training uses; only asked for where no names are given.
        num_training: how many of its kind training uses.

    Raises:
        ValueError: for a name that is not understood, for none, and where no GPU is spare.
    """
    if names is not None:
        found = [WorkerDevice.parse(name) for name in names]
        if not found:
            raise ValueError("devices=[]: name at least one, or leave it None for what is spare.")
        return found
    if training is None or training.type != "cuda":
        return [WorkerDevice("cpu")]
    used = {training.index or 0} if num_training == 1 else set(range(num_training))
    spare = [WorkerDevice(f"cuda:{i}") for i in range(torch.cuda.device_count()) if i not in used]
    if not spare:
        raise ValueError(
            "devices=None: training uses every GPU that this machine shows. Name devices, such as ['cpu'], or measure "
            "inside training: execution='inline'."
        )
    return spare


__all__ = ["WorkerDevice", "worker_devices"]
