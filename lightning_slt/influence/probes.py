"""The samples whose influence is read: training samples, and queries or none; chosen, read once, and grouped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

from lightning_slt.kinds import check_count
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.samples import GroupFn, Samples, choose_samples, default_group, group_name


@dataclass(frozen=True)
class ProbeSet:
    """The samples whose influence is read: training samples, and queries or none.

    Attributes:
        train, query: the samples; without queries, the training samples are the queries.
        train_group, query_group: their groups; None where there are none.
        per_token: every token of a query is a row of its own.
    """

    train: Samples
    query: Optional[Samples] = None
    train_group: Optional[list[Optional[str]]] = None
    query_group: Optional[list[Optional[str]]] = None
    per_token: bool = False

    @property
    def num_samples(self) -> int:
        """All of them."""
        return len(self.train.index) + (len(self.query.index) if self.query is not None else 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of how the samples were read."""
        notes = []
        for kind, samples in (("training samples", self.train), ("queries", self.query)):
            if samples is not None and samples.changed:
                notes.append(
                    f"the dataset gives other {kind} when read again (random augmentation?), such as numbers "
                    f"{samples.changed[:3]}: each is measured as it was read once"
                )
        return tuple(notes)


def groups_of(
    source: DatasetSource,
    index: Sequence[int],
    group_fn: Optional[GroupFn],
    classes: Optional[Sequence[Optional[str]]] = None,
) -> Optional[list[Optional[str]]]:
    """The group of each sample; None where no sample has one.

    Args:
        source, index: the samples.
        group_fn: None for the class, where there is one: as many labels as samples are no classes.
        classes: labels that are known to be classes.

    Raises:
        ValueError: where ``group_fn`` raises, naming the sample.
    """
    function = group_fn or default_group
    with preserve_rng():
        told = source.read_items(index, partial(_tried, function))
    for i, (_, error) in zip(index, told, strict=True):
        if error is not None:
            if group_fn is None:
                return None
            raise ValueError(f"group_fn failed on sample {i}: {error}")
    found: list[Optional[str]] = [group for group, _ in told]
    known = {g for g in found if g is not None}
    few = len(known) <= max(len(found) // 2, 1) or known <= set(classes or ())
    return found if known and (group_fn is not None or few) else None


def _tried(function: GroupFn, sample: Any) -> tuple[Optional[str], Optional[str]]:
    """The group of a sample, or what is wrong with it: an exception of another process would not say which sample."""
    try:
        group = function(sample)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return group_name(group), None


def probe_set(
    train: DatasetSource,
    query: Optional[DatasetSource],
    max_train: Optional[int],
    max_query: Optional[int],
    seed: int,
    group_fn: Optional[GroupFn] = None,
    per_token: bool = False,
) -> ProbeSet:
    """Choose and read the samples: all of a source up to the limit, else a reproducible subset.

    Raises:
        ValueError: for a limit below 1; for ``per_token`` without queries; where ``group_fn`` fails.
    """
    for name, limit in (("max_train", max_train), ("max_query", max_query)):
        check_count(name, limit, otherwise=", or None for all samples")
    if per_token and query is None:
        raise ValueError("per_token=True: give query_data, whose tokens become the rows.")
    parts: list[tuple[Samples, Optional[list[Optional[str]]]]] = []
    for source, limit in ((train, max_train), (query, max_query)):
        if source is None:
            continue
        n = source.num_indexed
        samples = Samples.of(source, choose_samples(n, limit, seed))
        # queries may be few: what is a class is seen by the training samples
        known = parts[0][1] if parts else None
        parts.append((samples, groups_of(source, samples.index, group_fn, known)))
    first, *rest = parts
    if not rest:
        return ProbeSet(first[0], train_group=first[1], per_token=per_token)
    return ProbeSet(first[0], rest[0][0], first[1], rest[0][1], per_token)
