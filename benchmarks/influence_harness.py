"""What the influence runners share: the case, the clock, and the JSON lines; torch and numpy only.

A runner yields its scores one by one; the processor seconds of each are those since the one before (the first: since
the case was loaded), its own imports lie outside. Scores are ``[queries, train]``, positive where a training sample
lowers the loss of the query.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from models import mlp
from torch import Tensor, nn

PREPARATION = "preparation"
"""Label of what comes before all scores of a runner, and belongs to each of them."""


@dataclass(frozen=True)
class InfluenceCase:
    """A trained classifier, its training data and the queries."""

    module: nn.Sequential
    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor


Scores = Iterator[tuple[str, Tensor | None]]
"""A label, and the scores (None for :data:`PREPARATION`)."""


def load_influence_case(path: Path) -> InfluenceCase:
    """Read what ``retraining.write_cases`` wrote."""
    with np.load(path) as stored:
        arrays = {key: torch.from_numpy(stored[key]) for key in stored.files}
    module = mlp(tuple(arrays["sizes"].tolist()))
    module.load_state_dict({key[2:]: value for key, value in arrays.items() if key.startswith("w.")})
    return InfluenceCase(module, *(arrays[key] for key in ("x", "y", "query_x", "query_y")))


def run(version: str, score: Callable[[InfluenceCase, str], Scores]) -> None:
    """Parse the arguments, time every score, print one JSON line for each and write them all to ``--output``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", type=Path, required=True, help="a .npz of retraining.write_cases")
    parser.add_argument("--output", type=Path, required=True, help="the scores by label, a .npz")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", default="", help="a mode of the tool, where it has one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    case = load_influence_case(arguments.case)
    found: dict[str, np.ndarray] = {}
    scores = score(case, arguments.variant)
    while True:
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            entry = next(scores, None)
        seconds = time.process_time() - start
        if entry is None:
            break
        label, matrix = entry
        if matrix is not None:
            found[label] = matrix.numpy()
        print(json.dumps({"version": version, "label": label, "seconds": seconds}), flush=True)
    np.savez(arguments.output, **found)
