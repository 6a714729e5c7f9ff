"""lightning_slt: ``estimate_llc`` with the same step size as the others.

Variant "calibrated" leaves step size, burn-in and thinning to it (``--lr`` and ``--burnin`` then say nothing, and
``chain_steps`` does not count what calibration took); variants "sequential" and "batched" fix the path of the chains.
"""

from __future__ import annotations

import _path  # noqa: F401
from harness import Outcome, Settings, run
from models import Case
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import SGLD, __version__, estimate_llc


def estimate(case: Case, settings: Settings) -> Outcome:
    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return case.batch_loss(module(x), y)

    calibrated = settings.variant == "calibrated"
    result = estimate_llc(
        case.module,
        TensorDataset(case.x, case.y),
        loss_fn,
        sampler=None if calibrated else SGLD(lr=settings.lr),
        nbeta=case.nbeta,
        localization=case.localization,
        num_chains=settings.chains,
        num_draws=settings.draws,
        num_burnin_steps=None if calibrated else settings.burnin,
        num_steps_bw_draws=None if calibrated else 1,
        batch_size=case.batch_size,
        seed=settings.seed,
        method=settings.variant if settings.variant in ("sequential", "batched") else "auto",
    )
    return Outcome(llc=float(result.mean), se=float(result.se))


if __name__ == "__main__":
    run("ours", __version__, estimate)
