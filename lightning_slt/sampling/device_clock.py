"""The time on a device that is told what to do ahead of doing it."""

from __future__ import annotations

import time

import torch


def seconds_on(device: torch.device) -> float:
    """The clock, once the device has done what it was told; only differences mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


__all__ = ["seconds_on"]
