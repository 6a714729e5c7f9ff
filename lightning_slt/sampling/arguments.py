"""Arguments that are of another kind than what is asked for: what they are, and what to give instead."""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Sequence
from typing import Any, Optional

import torch
from lightning.fabric.wrappers import _FabricDataLoader, _FabricModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_slt.sampling.step_call import LOW_PRECISION

log = logging.getLogger(__name__)

_ORDER = "Give the module first, then its data."


def check_module(name: str, module: Any) -> None:
    """Refuse what is no module.

    Raises:
        TypeError: naming what it is.
    """
    if not isinstance(module, nn.Module):
        kind = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"{name}: got {kind}, which is no nn.Module. {_ORDER}")


def check_device(name: str, device: Any) -> None:
    """Refuse a device that is not there. None is let through.

    Raises:
        ValueError: with what torch says of it.
    """
    if device is None:
        return
    try:
        torch.empty(1, device=device)
    except Exception as error:  # each kind of device has its own
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name}={str(device)!r}: cannot be used here: {said}. Give another device, or None for that of the module."
        ) from error


def check_data(name: str, data: Any, num_samples: Optional[int] = None) -> None:
    """Refuse what has a length and items but no samples: text, a dict of columns, a pair of whole tensors.

    A short list of equal arrays may be either: it is read as samples, with a warning.

    Args:
        name: of the argument.
        num_samples: given beside it; a list or a tuple is then one of batches.

    Raises:
        TypeError: naming what it is and how to make a dataset of it.

    Example:
        >>> import torch
        >>> check_data("data", (torch.zeros(20, 3), torch.zeros(20)))
        Traceback (most recent call last):
        TypeError: data: got a tuple of 2 arrays, which is no dataset. Wrap them in TensorDataset(X, Y).
    """
    if isinstance(data, nn.Module):
        raise TypeError(f"{name}: got {type(data).__name__}, which is a module and no data. {_ORDER}")
    if isinstance(data, (str, bytes)):
        raise TypeError(
            f"{name}={data!r}: got {type(data).__name__}, which is no data. Load it and give a Dataset, a DataLoader "
            "or an iterable of batches."
        )
    if isinstance(data, (dict, UserDict)) and any(isinstance(key, str) for key in data):
        raise TypeError(
            f"{name}: got {type(data).__name__} with the keys {list(data)[:8]}, which is no dataset. Wrap its tensors "
            "in TensorDataset(X, Y), or choose one of the datasets in it."
        )
    if isinstance(data, (tuple, list)) and data and all(isinstance(without_fabric(part), DataLoader) for part in data):
        raise TypeError(
            f"{name}: got {len(data)} DataLoaders. Give one of a ConcatDataset of their datasets, or an iterable of "
            "their batches with num_samples."
        )
    if num_samples is not None or not isinstance(data, (tuple, list)) or not _may_be_columns(data):
        return
    alike = len({(tuple(x.shape), str(x.dtype)) for x in data}) == 1
    if isinstance(data, list) and alike:
        log.warning(
            f"{name}: a list of {len(data)} arrays of shape {tuple(data[0].shape)} is read as {len(data)} samples. If "
            "they are columns, wrap them in TensorDataset(X, Y)."
        )
        return
    raise TypeError(
        f"{name}: got a {type(data).__name__} of {len(data)} arrays, which is no dataset. Wrap them in "
        "TensorDataset(X, Y)."
    )


_COLUMNS = 8
"""More arrays than these are samples."""


def _may_be_columns(data: Sequence[Any]) -> bool:
    """Whether these may be the columns of a dataset: few arrays, each with an entry for every sample."""
    if not 0 < len(data) <= _COLUMNS or not all(len(getattr(x, "shape", ())) > 0 for x in data):
        return False
    return len({len(x) for x in data}) == 1 and len(data[0]) > len(data)


def without_fabric(value: Any) -> Any:
    """A module or a loader as it was before Lightning's Fabric set it up; anything else as it is.

    Fabric's own module is not of the class that it holds, names the weights otherwise, and wants ``fabric.backward``;
    its loader is no DataLoader. A module with weights in half precision stays: Fabric's converts what goes in and out.
    """
    if isinstance(value, _FabricModule):
        half = any(p.dtype in LOW_PRECISION for p in value.parameters())
        return value if half else value.module
    return value._dataloader if isinstance(value, _FabricDataLoader) else value


def no_restriction(entry: Any, name: Optional[str] = None) -> TypeError:
    """What to say of an entry of ``restrict`` that names no weights.

    Args:
        entry: what was given.
        name: of the parameter that it is, where it is one.
    """
    if isinstance(entry, Tensor):
        kind = "a Parameter" if isinstance(entry, nn.Parameter) else "a Tensor"
        remedy = f"Give its name, restrict={name!r}" if name is not None else "Give the name of the parameter"
        return TypeError(f"restrict: got {kind} of shape {tuple(entry.shape)}. {remedy}, or the submodule it is in.")
    return TypeError(
        f"restrict={entry!r}: got {type(entry).__name__}. Give the name of a parameter or of a submodule, a glob, a "
        "submodule, or a list of these."
    )


__all__ = [
    "check_data",
    "check_device",
    "check_module",
    "no_restriction",
    "without_fabric",
]
