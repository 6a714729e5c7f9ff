"""devinterp 2.0: ``llc`` as its documentation calls it, on a Hugging Face dataset with an "input_ids" column.

It only knows sequences of token ids. A transformer case is its home ground; for the others the column holds the index
of a sample (twice: it wants two tokens or more), and ``loss_fn`` looks the sample up, at the cost of one indexing.
Variant "plain" hands it an ordinary torch Dataset, which it accepts although its annotation does not: faster.
It averages burn-in steps into its LLC, and always writes its draws to a zarr store: here to one that is thrown away.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import torch
from datasets import Dataset
from devinterp.slt.llc import llc
from harness import Outcome, Settings, mean_and_se, run
from models import Case
from torch import Tensor, nn


class PlainDataset(torch.utils.data.Dataset):
    """The same rows without Hugging Face's layer."""

    def __init__(self, input_ids: Tensor) -> None:
        self.input_ids = input_ids

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index]}


def estimate(case: Case, settings: Settings) -> Outcome:
    if case.kind == "transformer":
        input_ids, loss_fn = case.x, None  # its own next-token cross-entropy
    else:
        input_ids = torch.arange(case.n)[:, None].repeat(1, 2)

        def loss_fn(model: nn.Module, rows: Tensor) -> Tensor:
            chosen = rows[:, 0]
            return case.sample_losses(model(case.x[chosen]), case.y[chosen])[:, None]

    dataset: Any = PlainDataset(input_ids)
    if settings.variant != "plain":
        dataset = Dataset.from_dict({"input_ids": input_ids.numpy()}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder:
        result = llc(
            case.module,
            dataset,
            observables={},
            lr=settings.lr,
            n_beta=case.nbeta,
            loss_fn=loss_fn,
            num_chains=settings.chains,
            num_draws=settings.draws,
            num_burnin_steps=settings.burnin,
            batch_size=case.batch_size,
            localization=case.localization,
            init_seed=settings.seed,
            device="cpu",
            output_path=Path(folder) / "samples.zarr",
        )
        return mean_and_se(torch.from_numpy(result["llc_per_chain"].values))


if __name__ == "__main__":
    run("devinterp2", version("devinterp"), estimate)
