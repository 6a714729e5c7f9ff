"""What a batch is made of: samples for several loaders side by side, and which samples differ from a training batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional

from torch.utils.data import DataLoader, default_collate

from lightning_slt.influence import ProbeSet
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.unlike import naming_unlike

Collate = Callable[[list[Any]], Any]


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
    given = {"probe": probes.train, "query": probes.query} if probes is not None else {}
    return naming_unlike(error, given, source)


__all__ = ["SideBySide", "collate_of", "explained"]
