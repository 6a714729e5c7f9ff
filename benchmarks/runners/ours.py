"""lightning_slt: ``estimate_llc`` with the same step size as the others.

Variant "calibrated" leaves step size, burn-in and thinning to it (``--lr`` and ``--burnin`` then say nothing, and
``chain_steps`` does not count what calibration took); "warm" is the second firing of a run, with the memory of a first
one that is not measured, of other noise; variants "sequential" and "batched" fix the path of the chains.
"""

from __future__ import annotations

import _path  # noqa: F401
from harness import Outcome, Settings, run
from models import Case
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import SGLD, __version__, estimate_llc
from lightning_slt.estimate import ChainSettings, measure_llc, tolerance_settings
from lightning_slt.sampling.given_data import source_of
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.objective import Objective

MEMORY = ChainMemory()
OTHER_SEED = 1000
"""Added to the seed of the firing that goes before: what it leaves is independent of what is measured."""


def estimate(case: Case, settings: Settings) -> Outcome:
    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return case.batch_loss(module(x), y)

    if settings.variant == "warm":
        return fire(case, settings, settings.seed)
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
        tolerance=settings.tolerance,
    )
    return Outcome(llc=float(result.mean), se=float(result.se))


def fire(case: Case, settings: Settings, seed: int) -> Outcome:
    """One firing of a training run: what :class:`~lightning_slt.SLTMonitor` does, without the run."""

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return case.batch_loss(module(x), y)

    objective = Objective(case.module, loss_fn)
    source = source_of(TensorDataset(case.x, case.y), case.batch_size, objective.device, seed)
    chosen = ChainSettings(
        nbeta=case.nbeta,
        localization=case.localization,
        num_chains=settings.chains,
        num_draws=settings.draws,
        seed=seed,
        **tolerance_settings(settings.tolerance),  # type: ignore[arg-type]
    )
    result = measure_llc(objective, source, chosen, memory=MEMORY)
    return Outcome(llc=float(result.mean), se=float(result.se))


def prepare(case: Case, settings: Settings) -> None:
    """The firing before the one that is measured."""
    if settings.variant == "warm":
        MEMORY.forget()
        fire(case, settings, settings.seed + OTHER_SEED)


if __name__ == "__main__":
    run("ours", __version__, estimate, prepare)
