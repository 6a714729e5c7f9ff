"""What the examples have in common: their command line, their logger, and the plain-word summary at the end.

None of it is needed to use the monitor; see the few lines of ``main`` in each example for that.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, Union

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lightning_slt import Estimate, SLTMonitor
from lightning_slt.config import load

C = TypeVar("C")

MEANING = {
    "negative": "chains ran downhill, the weights were not at a minimum yet: expected early in training",
    "the chains have not reached": "chains had not spread to their full width; a larger num_draws gives them time",
    "chains drift": "chains were still moving away at their end; a larger num_draws gives them time",
    "chains have not mixed": "chains disagree with each other; a larger num_draws or num_chains helps",
    "step size": "the chains' step size did not suit these weights",
    "no chain": "the loss became infinite or NaN along every chain",
}
"""Beginnings of the reasons in ``Estimate.reasons``, in words for a first reader."""


def command_line(script: str, schema: type[C], fast: Sequence[str], about: str) -> tuple[C, Path, Union[Logger, bool]]:
    """Settings, output folder and logger, from the YAML file beside the script and the command line.

    Args:
        script: the example's ``__file__``.
        schema: dataclass of its settings.
        fast: overrides under ``--fast``.
        about: one line for ``--help``.
    """
    path = Path(script)
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--config", type=Path, default=path.with_suffix(".yaml"), help="YAML file (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs") / path.stem, help="output folder (%(default)s)")
    parser.add_argument("--logger", choices=("wandb", "csv", "none"), default="wandb", help="wandb is offline here")
    parser.add_argument("--fast", action="store_true", help="seconds, to see that it runs; the numbers mean little")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. trainer.max_epochs=5 monitor.seed=1")
    args = parser.parse_args()
    try:
        config = load(args.config, [*(fast if args.fast else ()), *args.overrides], schema=schema)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    args.output.mkdir(parents=True, exist_ok=True)
    logger: Union[Logger, bool] = False
    if args.logger == "wandb":
        logger = WandbLogger(project="lightning-slt-examples", save_dir=args.output, offline=True)
    elif args.logger == "csv":
        logger = CSVLogger(args.output, name="csv")
    # matrices this small are multiplied faster by one thread than by several that wait for each other
    torch.set_num_threads(1)
    # of no concern here: data in memory needs no loader processes, an epoch may be one step, and Lightning's own debts
    for message in ("does not have many workers", "smaller than the logging interval", "LeafSpec"):
        warnings.filterwarnings("ignore", f".*{message}.*")
    return config, args.output, logger


def summarise(monitor: SLTMonitor, logger: Union[Logger, bool], pictures: Sequence[Path] = ()) -> None:
    """Print where the results are and what they say.

    Args:
        monitor: after training.
        logger: that of the trainer.
        pictures: made by the example itself.
    """
    folder, estimates = monitor.folder, monitor.estimates
    assert folder is not None
    figures = folder / "figures"
    wandb_folder = None
    if isinstance(logger, WandbLogger):
        wandb_folder = Path(logger.experiment.dir).parent
        logger.experiment.finish()  # first: it prints a summary of its own
    print(f"\n--- Where the results are: {folder}")
    for picture in [*pictures, figures / "history.png"]:
        print(f"  picture of the run         {picture}")
    print(f"  pictures of the chains     {figures}{os.sep}chains_step_*.png ({len(list(figures.glob('chains_*')))})")
    if (folder / "report.html").exists():  # not where a server shows the run
        print(f"  the run as one page        {folder / 'report.html'}")
    print(f"  all numbers                {folder / 'estimates.jsonl'}, {folder / 'history.csv'}")
    if wandb_folder is not None:
        print(f"  wandb, offline             {wandb_folder}")
        print(f"    to see it in a browser:  wandb sync {wandb_folder}")
    elif isinstance(logger, CSVLogger):
        print(f"  rows of the CSV logger     {logger.log_dir}{os.sep}metrics.csv")

    valid = [e for e in estimates if e.valid]
    print(f"\n--- What they say: {len(estimates)} estimates of the learning coefficient (LLC), {len(valid)} valid")
    if valid:
        print(f"  first valid  {describe(valid[0])}")
        print(f"  last valid   {describe(valid[-1])}")
    for text, steps in reasons(estimates):
        print(f"  not valid    {steps}: {text}")
    if estimates:
        spent, share = sum(e.seconds for e in estimates), estimates[-1].overhead
        print(f"  measuring took {spent:.0f} s, {share:.0%} of this run; training itself was not changed by it")


def describe(estimate: Estimate) -> str:
    """One estimate in a line."""
    return f"step {estimate.step}: LLC {estimate.mean:.2f} ± {estimate.se:.2f}, training loss {estimate.init_loss:.4g}"


def reasons(estimates: Sequence[Estimate]) -> list[tuple[str, str]]:
    """Why estimates are not valid, neighbours with the same first reason together: ``(reason, steps)``."""

    def reason(estimate: Estimate) -> str:
        if estimate.valid:
            return ""
        first = estimate.reasons[0] if estimate.reasons else "no reason given"
        if math.isfinite(estimate.mean) and estimate.num_bad_chains:
            return f"{estimate.num_bad_chains} of {estimate.num_chains} chains diverged"
        return next((text for start, text in MEANING.items() if first.startswith(start)), first)

    found = []
    for text, group in itertools.groupby(estimates, key=reason):
        steps = [e.step for e in group]
        if text:
            found.append((text, f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"))
    return found
