"""What a batch is made of: samples for several loaders side by side, and how samples differ from a training batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional

from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_slt.influence import ProbeSet
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.probe import CoupledLossError

Collate = Callable[[list[Any]], Any]
SHOWN = 4
"""Entries of a container that are shown in a message."""


class SideBySide:
    """Collates samples that have a part for each loader, each part as its loader does.

    Args:
        loaders: loaders in a container, such as ``{"a": loader, "b": loader}``. A sample for them is
            ``{"a": sample, "b": sample}``; another one is collated as torch does by default.
    """

    def __init__(self, loaders: Any) -> None:
        self._parts = _collates(loaders)

    def __call__(self, samples: list[Any]) -> Any:
        try:
            return _together(self._parts, samples)
        except _UnlikeError:
            return default_collate(samples)


class _UnlikeError(Exception):
    """A sample has no part for some loader."""


def _collates(loaders: Any) -> Any:
    if isinstance(loaders, Mapping):
        return {name: _collates(loader) for name, loader in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [_collates(loader) for loader in loaders]
    return collate_of(loaders) or default_collate


def _together(parts: Any, samples: list[Any]) -> Any:
    if isinstance(parts, dict):
        if not all(isinstance(sample, Mapping) and set(parts) <= set(sample) for sample in samples):
            raise _UnlikeError
        return {name: _together(part, [sample[name] for sample in samples]) for name, part in parts.items()}
    if isinstance(parts, list):
        if not all(isinstance(sample, (list, tuple)) and len(sample) == len(parts) for sample in samples):
            raise _UnlikeError
        return [_together(part, [sample[i] for sample in samples]) for i, part in enumerate(parts)]
    return parts(samples)


def collate_of(loaders: Any) -> Optional[Collate]:
    """How training puts samples together; None where that is not known.

    Args:
        loaders: those of the training data, one or a container of them.
    """
    if isinstance(loaders, (Mapping, list, tuple)):
        return SideBySide(loaders)
    # a loader that does not batch is given batches: what it does with them is no collating
    return loaders.collate_fn if isinstance(loaders, DataLoader) and loaders.batch_sampler is not None else None


def explained(error: Exception, probes: Optional[ProbeSet], source: MinibatchSource) -> Exception:
    """The error that the step gives on samples, with what is wrong about them where their structure shows it.

    Args:
        error: that came up.
        probes: the samples; None where they could not be read.
        source: the chains' minibatches, which have the structure that the step expects.
    """
    if isinstance(error, CoupledLossError):  # it is the loss, whatever the samples have besides
        return error
    for name, samples in (("probe", probes and probes.train), ("query", probes and probes.query)):
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
    return error


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


__all__ = ["SideBySide", "collate_of", "explained"]
