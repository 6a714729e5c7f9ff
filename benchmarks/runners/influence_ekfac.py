"""kronfluence 1.0: EK-FAC factors once, then the scores of a grid of dampings; full batches (fastest)."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from typing import Any

import _path  # noqa: F401
import torch
from influence_harness import PREPARATION, InfluenceCase, Scores, run
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

DAMPINGS = (ScoreArguments().damping_factor, None, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 1e-2, 2e-2)
"""Its default, its heuristic (a tenth of the mean eigenvalue), and a grid."""


class Classification(Task):
    """Cross-entropy; the Fisher factors are of labels drawn from the model, as is its default."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, y = batch
        logits = model(x)
        if sample:
            with torch.no_grad():
                y = torch.multinomial(logits.softmax(-1), 1).flatten()
        return F.cross_entropy(logits, y, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def score(case: InfluenceCase, variant: str) -> Scores:
    torch.manual_seed(0)
    train, query = TensorDataset(case.x, case.y), TensorDataset(case.query_x, case.query_y)
    with tempfile.TemporaryDirectory() as folder:
        task = Classification()
        analyzer = Analyzer(
            "case",
            prepare_model(case.module, task),
            task,
            cpu=True,
            output_dir=folder,
            disable_tqdm=True,
            disable_model_save=True,
        )
        analyzer.fit_all_factors(
            "factors", train, per_device_batch_size=len(train), factor_args=FactorArguments(strategy="ekfac")
        )
        yield PREPARATION, None
        for k, damping in enumerate(DAMPINGS):
            analyzer.compute_pairwise_scores(
                f"scores{k}",
                "factors",
                query_dataset=query,
                train_dataset=train,
                per_device_query_batch_size=len(query),
                per_device_train_batch_size=len(train),
                score_args=ScoreArguments(damping_factor=damping),
            )
            yield (
                "heuristic" if damping is None else f"{damping:g}",
                analyzer.load_pairwise_scores(f"scores{k}")["all_modules"],
            )


if __name__ == "__main__":
    run(version("kronfluence"), score)
