"""``lightning-slt sweep``: the curve of a run from its stored checkpoints."""

from __future__ import annotations

import argparse

NAME = "sweep"
HELP = "Measure stored checkpoints: learning coefficient, influence and transitions over the whole curve."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files, the settings and where to measure."""
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="files, or a folder of *.ckpt")
    parser.add_argument("--config", required=True, help="a YAML file with module, data and what the chains shall do")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a setting of the file; repeatable"
    )
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

    from lightning_slt.config import load
    from lightning_slt.sweep import SweepConfig, sweep
    from lightning_slt.sweep.executors import on_cluster

    if arguments.job and arguments.cluster is None:
        raise ValueError(f"--job {arguments.job[0]}: is for jobs; name a --cluster too.")
    config = load(arguments.config, arguments.set, schema=SweepConfig)
    executor = None
    if arguments.cluster is not None:
        pairs = [item.partition("=") for item in arguments.job]
        parameters = {key: yaml.safe_load(value) for key, _, value in pairs}
        executor = on_cluster(Path(config.folder) / "jobs", arguments.cluster, parameters)
    result = sweep(
        [Path(path) for path in arguments.checkpoints], config, executor, lambda line: print(line, flush=True)
    )
    for transition in result.transitions:
        print(
            f"transition at step {transition.step:g} ({transition.onset:g} to {transition.end:g}): "
            f"LLC {transition.llc_change:+.3g}, loss {transition.loss_change:+.3g}"
        )
    print(
        f"{len(result.estimates)} points of {result.weights} weights ({result.measured} measured now), "
        f"{len(result.transitions)} transitions, in {result.folder}"
    )
    return 1 if result.failed or result.unread else 0
