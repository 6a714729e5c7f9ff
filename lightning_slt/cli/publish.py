"""``lightning-slt publish``: the workspace "Structure over training" in a wandb project."""

from __future__ import annotations

import argparse
import json

NAME = "publish"
HELP = "Put the workspace 'Structure over training' into a wandb project; needs a server and a login."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and of which keys."""
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="the wandb project")
    parser.add_argument(
        "--prefix",
        default="slt",
        help="keys of the monitor, slt or slt_<name>; exp-slt of WandbLogger(prefix='exp') (default: %(default)s)",
    )
    parser.add_argument(
        "--loss",
        action="append",
        default=[],
        metavar="KEY",
        help="a loss that the module logs, drawn beside; repeatable",
    )
    parser.add_argument("--print", action="store_true", dest="show", help="print the workspace as JSON, send nothing")


def run(arguments: argparse.Namespace) -> int:
    """Sends it, or prints it."""
    from lightning_slt.publish.workspace import build_workspace, send, serialised

    entity, _, project = arguments.project.partition("/")
    if not entity or not project or "/" in project:
        raise ValueError(f"{arguments.project!r}: expected ENTITY/PROJECT, as in the address of the project.")
    try:
        if arguments.show:
            print(json.dumps(serialised(build_workspace(entity, project, arguments.prefix, arguments.loss)), indent=1))
            return 0
        address, missing = send(entity, project, arguments.prefix, arguments.loss)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    if missing is not None:
        print(f"without its custom charts, which the server did not take ({missing})")
    print(address)
    return 0
