"""``lightning-slt config``: the settings of a monitor with their defaults, as YAML to start from."""

from __future__ import annotations

import argparse

NAME = "config"
HELP = "Print the settings of the callbacks with their defaults, as commented YAML."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments yet."""


def run(arguments: argparse.Namespace) -> int:
    """Prints the defaults."""
    from omegaconf import OmegaConf

    from lightning_slt.config import MonitorConfig

    print(OmegaConf.to_yaml(OmegaConf.structured(MonitorConfig)))
    return 0
