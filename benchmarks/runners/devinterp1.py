"""devinterp 1.3: ``sample`` with LLCEstimator, a shuffling DataLoader, SGMCMC.sgld, and its default initial loss."""

from __future__ import annotations

from importlib.metadata import version

import _path  # noqa: F401
import torch
from devinterp.optim import SGMCMC
from devinterp.slt.llc import LLCEstimator
from devinterp.slt.sampler import sample
from harness import Outcome, Settings, mean_and_se, run
from models import Case
from torch.utils.data import DataLoader, TensorDataset


def estimate(case: Case, settings: Settings) -> Outcome:
    def evaluate(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return case.batch_loss(model(x), y)

    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=case.batch_size, shuffle=True, drop_last=True)
    llc = LLCEstimator(settings.chains, settings.draws, init_loss=None, nbeta=case.nbeta)
    sample(
        case.module,
        loader,
        callbacks=[llc],
        evaluate=evaluate,
        sampling_method=SGMCMC.sgld,
        optimizer_kwargs={"lr": settings.lr, "nbeta": case.nbeta, "localization": case.localization},
        num_draws=settings.draws,
        num_chains=settings.chains,
        num_burnin_steps=settings.burnin,
        seed=settings.seed,
        verbose=False,
    )
    return mean_and_se(llc.llc_per_chain)


if __name__ == "__main__":
    run("devinterp1", version("devinterp"), estimate)
