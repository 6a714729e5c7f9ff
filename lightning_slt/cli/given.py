"""The settings of a command that measures checkpoints: a YAML file, and what the command line says beside it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from lightning_slt.sweep import SweepConfig


def add_settings(parser: argparse.ArgumentParser) -> None:
    """``--config FILE [KEY=VALUE ...]``, and ``--set KEY=VALUE`` for where something else has to stand behind the
    file."""
    parser.add_argument(
        "--config",
        nargs="+",
        required=True,
        metavar=("FILE", "KEY=VALUE"),
        help="a YAML file with module, data and what the chains shall do; then settings to override",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a setting of the file, as behind it, and after what stands there; repeatable",
    )


def settings_of(arguments: argparse.Namespace, behind: Optional[Sequence[str]] = None) -> SweepConfig:
    """The file with the settings of both forms on top; what :func:`add_settings` has added is read.

    Args:
        arguments: of the command line.
        behind: what of the items behind the file is settings; None for all of them.
    """
    from lightning_slt.config import load
    from lightning_slt.sweep import SweepConfig

    file, *rest = arguments.config
    return load(file, [*(rest if behind is None else behind), *arguments.set], schema=SweepConfig)


def settings_and_paths(items: Sequence[str], suffix: str) -> tuple[list[str], list[str]]:
    """Which of the items behind the file are settings, and which are checkpoints.

    Names of checkpoints have equals signs too (``epoch=1-step=20.ckpt``): a setting is what has one, does not end like
    a checkpoint, and is neither a file nor a folder.

    Args:
        items: as they stand behind the file.
        suffix: of checkpoints.

    Example:
        >>> settings_and_paths(["num_chains=2", "epoch=1-step=20.ckpt", "checkpoints"], ".ckpt")
        (['num_chains=2'], ['epoch=1-step=20.ckpt', 'checkpoints'])
    """
    settings = [item for item in items if "=" in item and not item.endswith(suffix) and not Path(item).exists()]
    return settings, [item for item in items if item not in settings]
