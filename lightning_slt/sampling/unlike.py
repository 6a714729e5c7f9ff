"""Data and samples that are made of other things than the step wants: one array without targets, or samples that differ
from a batch of the training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.probe import CoupledLossError
from lightning_slt.sampling.samples import Samples
from lightning_slt.sampling.steps import NoLossError

SHOWN = 4
"""Entries of a container that are shown in a message."""


@contextmanager
def unlike_named(name: str, samples: Optional[Samples], source: MinibatchSource) -> Iterator[None]:
    """Around a call on samples: the errors inside are raised as :func:`naming_unlike` has them.

    Raises:
        ValueError: also where no minibatch has a loss.
    """
    try:
        yield
    except NoLossError as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        named = naming_unlike(error, {name: samples}, source)
        if named is error:
            raise
        raise named from error


class OneArrayError(ValueError):
    """The step fails on data that is one array."""


@contextmanager
def array_named(name: str, data: Any, source: MinibatchSource) -> Iterator[None]:
    """Around a call on data that may be one array: where the step fails on it, what it was read as is said.

    Samples that are rows of one array are what an autoencoder wants, and what is left of a classifier's data where the
    targets were forgotten: only the step can tell.

    Args:
        name: of the argument.
        data: as it was given.
        source: what it was read as: where a minibatch of it has had a loss, it is not the data that is wrong.

    Raises:
        OneArrayError: for what the step raised, naming the argument and the remedy.
    """
    try:
        yield
    except Exception as error:
        out_of_memory = isinstance(error, torch.cuda.OutOfMemoryError)
        if not isinstance(data, (Tensor, np.ndarray)) or out_of_memory or _raised_here(error):
            raise
        if source.window(0).anchor_loss:
            raise
        sizes = ", ".join(["batch", *map(str, data.shape[1:])])
        raise OneArrayError(
            f"{name}: got one array of shape {tuple(data.shape)}, which is read as {len(data)} samples without "
            f"targets: the step is given a single tensor [{sizes}], and fails. If there are targets, give "
            f"{name}=TensorDataset(X, y). {type(error).__name__}: {error}"
        ) from error


def _raised_here(error: BaseException) -> bool:
    """Whether it is this package that says something, and not the step or what it calls."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] == __name__.partition(".")[0]


def naming_unlike(error: Exception, given: Mapping[str, Optional[Samples]], source: MinibatchSource) -> Exception:
    """The error that the step gives on samples, with what is wrong about them where their structure shows it.

    Args:
        error: that came up.
        given: samples by the name of the argument that gives them.
        source: the chains' minibatches, which have the structure that the step expects.
    """
    # it is the loss, or the training data, whatever the samples have besides
    if isinstance(error, (CoupledLossError, OneArrayError)):
        return error
    for name, samples in given.items():
        if not samples or not samples.batches:
            continue
        try:
            ours, expected = samples.batches[0], source.window(0)[0]
        except Exception:  # what is wrong is the data, which the error says
            return error
        # further down a list may be one of the samples, such as the targets of a detector
        listed = isinstance(expected, (list, tuple)) and isinstance(ours, (list, tuple))
        if (listed and len(ours) != len(expected)) or _differ(ours, expected):
            return ValueError(
                f"{name}: its samples give the step {_shape(ours)}, and a batch of the training data is "
                f"{_shape(expected)}. Give {name}=Dataset whose samples, once collated, have that structure (for "
                f"several loaders: a sample for each, in a container like theirs). {type(error).__name__}: {error}"
            )
        apart = _other_tensors("batch", ours, expected) if _is_of_tensors(error) else None
        if apart is not None:
            place, its, theirs = apart
            return ValueError(
                f"{name}: {place} of its samples is {its}, and of a batch of the training data {theirs}. Give "
                f"{name}=Dataset with samples like those of training, if that is what the step fails on. "
                f"{type(error).__name__}: {error}"
            )
    return error


def _is_of_tensors(error: Exception) -> bool:
    """Whether it may be for their sizes or types that torch has raised it."""
    return isinstance(error, (RuntimeError, IndexError)) and not isinstance(error, torch.cuda.OutOfMemoryError)


def _other_tensors(place: str, ours: Any, expected: Any) -> Optional[tuple[str, str, str]]:
    """Where the first tensor is whose samples have other sizes, or are whole numbers in place of others, and what both
    are; None where there is none."""
    pairs: list[tuple[Any, Any, Any]] = []
    if isinstance(expected, Mapping):
        pairs = [(repr(key), ours[key], value) for key, value in expected.items()]
    elif isinstance(expected, (list, tuple)):
        pairs = [(k, *both) for k, both in enumerate(zip(ours, expected, strict=False))]
    elif isinstance(ours, Tensor) and isinstance(expected, Tensor):
        its, theirs = _tensor(ours), _tensor(expected)
        return (place, its, theirs) if its != theirs else None
    found = (_other_tensors(f"{place}[{key}]", a, b) for key, a, b in pairs)
    return next((apart for apart in found if apart is not None), None)


def _tensor(value: Tensor) -> str:
    """``float32 [batch, 3, 8]``."""
    sizes = ["batch", *map(str, value.shape[1:])] if value.ndim else []
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"


def _differ(ours: Any, expected: Any) -> bool:
    """Whether a container stands where none is expected, the other way round, or lacks something."""
    if isinstance(expected, Mapping):
        return not isinstance(ours, Mapping) or any(k not in ours or _differ(ours[k], v) for k, v in expected.items())
    if isinstance(expected, (list, tuple)):
        if not isinstance(ours, (list, tuple)):
            return True
        return any(_differ(a, b) for a, b in zip(ours, expected, strict=False))
    return isinstance(ours, (Mapping, list, tuple))


def _shape(value: Any) -> str:
    """``{'a': [Tensor, Tensor]}``."""
    if isinstance(value, Mapping):
        shown = [f"{name!r}: {_shape(part)}" for name, part in list(value.items())[:SHOWN]]
        return "{" + ", ".join(shown + ["..."] * (len(value) > SHOWN)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join([_shape(part) for part in value[:SHOWN]] + ["..."] * (len(value) > SHOWN)) + "]"
    return "Tensor" if isinstance(value, Tensor) else type(value).__name__
