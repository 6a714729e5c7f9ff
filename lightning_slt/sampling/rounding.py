"""What the rounding of weights does to chains: of very large ones the last digit is not small beside a step."""

from __future__ import annotations

import math

import torch

from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.layout import BLOCK

MAX_WEIGHT_ROUNDING = 0.01
"""Variance that rounding adds to the noise of a step, as a share of it. The LLC has that too much, and more from where
the drift, 0.3 to 0.4 of the noise at steps that are calibrated, is itself rounded away: on two regressions 2 and 6 % at
0.025, 18 and 36 % at 0.1."""
ROUNDINGS = 3
"""Of the weights in a step of SGLD: pull, gradient and noise are each added to them. With momenta it is one."""
ROUNDED_AT_ONCE = 8
"""Parts of a block whose rounding is looked at one after another: it takes five times their own memory."""


def weight_rounding(chains: Chains, lr: float) -> float:
    r"""The variance that the rounding of weights adds to that of the noise, as a share of it: mean over the weights of

    .. math:: \min\left( \frac{3 \, \mathrm{ulp}(w^*_i)^2}{12 \, \epsilon P_i}, \; 1 \right)

    with 1 in place of 3 for a sampler with momenta. A number rounded to a grid of spacing ulp is off by a variance of
    ``ulp² / 12``, and a step rounds :data:`ROUNDINGS` times. Noise that nothing takes away heats as that of the step
    does. Where the spacing is wider than a step, chains stand still or leap: that counts as 1.

    Args:
        lr: epsilon, the step size.

    Returns:
        0 for a sampler in the metric of the curvature, whose steps are no multiple of each weight's own noise.
    """
    if getattr(chains.sampler, "metric", None) is not None:
        return 0.0
    anchor, preconditioner, layout = chains.objective.anchor, chains.preconditioner, chains.layout
    roundings = 1 if chains.sampler.calibration == "curvature" else ROUNDINGS  # of those with momenta
    largest = torch.tensor(math.inf, dtype=anchor.dtype, device=anchor.device)
    total = torch.zeros((), dtype=torch.float64, device=anchor.device)
    for block, share in layout.blocks(BLOCK.get(anchor.device.type, 2**24) // ROUNDED_AT_ONCE):
        size = anchor[block].abs()
        ulp = torch.nextafter(size, largest).sub_(size)
        added = ulp.double().square_().mul_(roundings / 12.0 / lr)
        if preconditioner is not None:
            added /= preconditioner[block]
        total += share * added.clamp_(max=1.0).sum()
    return float(layout.sum(total)) / layout.num_weights


def misfit_of_rounding(chains: Chains, lr: float) -> tuple[str, ...]:
    """Why chains of step size ``lr`` are not those of the posterior; empty where their weights are fine enough."""
    share = weight_rounding(chains, lr)
    if share <= MAX_WEIGHT_ROUNDING:
        return ()
    kind = str(chains.objective.anchor.dtype).removeprefix("torch.")
    said = f"rounding them adds {share:.0%} to the noise of a step"
    remedy = "a float64 module, or smaller weights (a scale taken out, a constant part in a buffer)"
    return (f"the weights are too large for {kind}, {said}: {remedy}",)
