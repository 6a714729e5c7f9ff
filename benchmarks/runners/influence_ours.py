"""lightning_slt: ``estimate_influence`` with all its defaults; the variant is the power of ``shrinkage``, if any."""

from __future__ import annotations

import _path  # noqa: F401
from influence_harness import InfluenceCase, Scores, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_slt import __version__, estimate_influence


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def score(case: InfluenceCase, variant: str) -> Scores:
    result = estimate_influence(
        case.module,
        TensorDataset(case.x, case.y),
        TensorDataset(case.query_x, case.query_y),
        loss_fn,
        shrinkage=float(variant) if variant else None,
    )
    yield "", result.matrix


if __name__ == "__main__":
    run(__version__, score)
