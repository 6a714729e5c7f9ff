"""Warnings: in whose name something is said, and that saying it ends no training."""

from __future__ import annotations

import logging
import warnings

from lightning.fabric.utilities.rank_zero import rank_zero_warn

_log = logging.getLogger(__name__)


def speaker(prefix: str = "slt", arguments: str = "", kind: str = "SLTMonitor") -> str:
    """What a callback calls itself where it says something: with its prefix, where others may speak too.

    Args:
        prefix: the group in front of its keys.
        arguments: those that are meant, as they are written in its call.
        kind: of callback.

    Example:
        >>> print(speaker(), speaker("slt_2"), speaker("slt_2", "num_samples=None"), sep=", ")
        SLTMonitor, SLTMonitor (slt_2), SLTMonitor(num_samples=None) (slt_2)
    """
    return kind + (f"({arguments})" if arguments else "") + ("" if prefix == "slt" else f" ({prefix})")


def warn(message: str, every_rank: bool = False) -> None:
    """Warn, from where it is called, on the first rank: nothing that this package has to say ends a run.

    Where a filter makes errors of warnings (``-W error``) it is logged, with the level of a warning.

    Args:
        message: what is said.
        every_rank: on the rank that calls, whichever it is.
    """
    try:
        if every_rank:
            warnings.warn(message, stacklevel=3)
        else:
            rank_zero_warn(message, stacklevel=5)
    except Warning:
        _log.warning(message)


__all__ = ["speaker", "warn"]
