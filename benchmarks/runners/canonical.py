"""canonical-interp 0.2.7: all chains in one vmap, the gradient compiled in its default mode unless variant is "eager".

Its update step is compiled in either case (a decorator). Its loader is cycled with itertools.cycle, so the batches of
the first pass come again, and all chains see the same ones; its initial loss is over the whole loader.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib.metadata import version

import _path  # noqa: F401
import torch
from canonical_interp.slt import LLCEstimator
from harness import Outcome, Settings, mean_and_se, run
from models import Case
from torch.utils.data import DataLoader, TensorDataset


def estimate(case: Case, settings: Settings) -> Outcome:
    estimator = LLCEstimator(
        draws=settings.draws,
        chains=settings.chains,
        burnin_steps=settings.burnin,
        steps_bw_draws=1,
        learning_rate=settings.lr,
        localization=case.localization,
        nbeta=case.nbeta,
    )
    # drop_last: a smaller last batch would be compiled a second time
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=case.batch_size, shuffle=True, drop_last=True)
    compiled = settings.variant != "eager"
    # Compiled, it traces the backward of its own gradient, which SDPA's CPU kernel lacks ("derivative for
    # aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented"). Under no_grad, which
    # torch.func.grad does not heed, there is none to trace and it runs.
    with torch.no_grad() if compiled and case.kind == "transformer" else nullcontext():
        estimator.estimate_llc(
            case.module,
            loader,
            criterion_fn=case.batch_loss,
            seed=settings.seed,
            compile="reduce-overhead" if compiled else False,
            show_progress=False,
        )
    metrics = estimator.get_metrics()
    assert metrics is not None
    return mean_and_se(metrics["llcs"])


if __name__ == "__main__":
    torch.manual_seed(0)
    run("canonical", version("canonical-interp"), estimate)
