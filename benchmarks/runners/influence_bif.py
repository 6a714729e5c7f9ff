"""devinterp 2.0: ``sample`` and ``compute_bif``, which is what its ``bif`` calls; 4 chains x 400 draws.

Rows are sample indices that its ``loss_fn`` looks up (see devinterp2.py). Its SGLD has no default step size, inverse
temperature or localisation: a grid of them, from which the table takes the best. Covariances over all draws of all
chains together, positive where helpful. Variant "one:NBETA:LOCALIZATION:LR" runs that setting alone.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from importlib.metadata import version
from pathlib import Path

import _path  # noqa: F401
import torch
from devinterp.slt.bif import compute_bif
from devinterp.slt.sampling import sample
from influence_harness import InfluenceCase, Scores, run
from torch import Tensor, nn
from torch.nn import functional as F

CHAINS, DRAWS, BATCH_SIZE = 4, 400, 100
STEPS = (0.1, 0.3)
"""Step sizes, times the inverse of ``nbeta * CURVATURE + localization``."""
CURVATURE = 2.0
"""About the largest eigenvalue of the Hessian of these networks."""


def grid(case: InfluenceCase) -> list[tuple[float, float, float]]:
    """``(nbeta, localization, lr)``."""
    n = len(case.x)
    settings = []
    for nbeta, damping, step in itertools.product((n / math.log(n), 10.0 * n), (0.02, 0.2), STEPS):
        localization = damping * nbeta
        settings.append((nbeta, localization, step / (nbeta * CURVATURE + localization)))
    return settings


class Rows(torch.utils.data.Dataset):
    """Indices of samples, twice: it wants two tokens or more."""

    def __init__(self, index: Tensor) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        return {"input_ids": self.index[k].repeat(2)}


def score(case: InfluenceCase, variant: str) -> Scores:
    n, x, y = len(case.x), torch.cat([case.x, case.query_x]), torch.cat([case.y, case.query_y])

    def loss_fn(model: nn.Module, rows: Tensor) -> Tensor:
        chosen = rows[:, 0]
        return F.cross_entropy(model(x[chosen]), y[chosen], reduction="none")[:, None]

    train, query = Rows(torch.arange(n)), Rows(torch.arange(n, len(x)))
    settings = [tuple(map(float, variant.split(":")[1:]))] if variant.startswith("one:") else grid(case)
    for nbeta, localization, lr in settings:
        with tempfile.TemporaryDirectory() as folder:
            samples = sample(
                case.module,
                train,
                {"train": (train, n // BATCH_SIZE), "query": (query, len(query) // BATCH_SIZE)},
                lr=lr,
                n_beta=nbeta,
                localization=localization,
                num_chains=CHAINS,
                num_draws=DRAWS,
                batch_size=BATCH_SIZE,
                loss_fn=loss_fn,
                device="cpu",
                output_path=Path(folder) / "samples.zarr",
            )
            found = compute_bif(samples, correlation_method="sequence", compute_covariance=True, device="cpu")
            order = torch.from_numpy(found["input_ids"].values)[:, 0].argsort()
            matrix = torch.from_numpy(found["influences"].values)[order][:, order]
        yield f"{nbeta:.6g}:{localization:.6g}:{lr:.6g}", matrix[n:, :n]


if __name__ == "__main__":
    run(version("devinterp"), score)
