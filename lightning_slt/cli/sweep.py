"""``lightning-slt sweep``: the curve of a run from its stored checkpoints."""

from __future__ import annotations

import argparse

from lightning_slt.cli.given import add_settings, settings_and_paths, settings_of

NAME = "sweep"
HELP = "Measure stored checkpoints: learning coefficient, influence and transitions over the whole curve."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files, the settings and where to measure."""
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="*", help="files, or a folder of *.ckpt")
    add_settings(parser)
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        help="measure in jobs of a cluster, through submitit: pip install 'lightning_slt[cluster]'",
    )
    parser.add_argument(
        "--job",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="what a job needs, as submitit names it: timeout_min=60, gpus_per_node=1, slurm_partition=gpu; repeatable",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures what is not measured yet, and prints the curve; 1 where a checkpoint could not be measured."""
    from pathlib import Path

    import yaml

    from lightning_slt.sweep import sweep
    from lightning_slt.sweep.checkpoint import SUFFIX
    from lightning_slt.sweep.executors import on_cluster

    if arguments.job and arguments.cluster is None:
        raise ValueError(f"--job {arguments.job[0]}: is for jobs; name a --cluster too.")
    settings, more = settings_and_paths(arguments.config[1:], SUFFIX)
    paths = [Path(path) for path in (*arguments.checkpoints, *more)]
    config = settings_of(arguments, settings)
    executor = None
    if arguments.cluster is not None:
        pairs = [item.partition("=") for item in arguments.job]
        parameters = {key: yaml.safe_load(value) for key, _, value in pairs}
        executor = on_cluster(Path(config.folder) / "jobs", arguments.cluster, parameters)
    result = sweep(paths, config, executor, lambda line: print(line, flush=True))
    for transition in result.transitions:
        print(
            f"transition at step {transition.step:g} ({transition.onset:g} to {transition.end:g}): "
            f"LLC {transition.llc_change:+.3g}, loss {transition.loss_change:+.3g}"
        )
    print(
        f"{_counted(len(result.estimates), 'point')} of {result.weights} weights ({result.measured} measured now), "
        f"{_counted(len(result.transitions), 'transition')}, in {result.folder}"
    )
    return 1 if result.failed or result.unread else 0


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
