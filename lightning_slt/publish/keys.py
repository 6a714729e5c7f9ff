"""The names under which an estimate appears in a logger: the one place that knows them.

Keys are ``[a-z0-9_]`` between slashes: MLflow, TensorBoard and the wandb query language each refuse something else.
"""

from __future__ import annotations

import math
from typing import Optional

from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.record import Estimate

METRIC_NAMES: tuple[str, ...] = (
    "llc/mean",
    "llc/se",
    "llc/lo",
    "llc/hi",
    "diag/rhat",
    "diag/ess",
    "diag/n_bad_chains",
    "diag/nan_frac",
    "diag/valid",
    "diag/step_size",
    "diag/step_bias",
    "diag/virial",
    "diag/owed",
    "diag/lean",
    "diag/unsure_heat",
    "diag/slope",
    "diag/acceptance",
    "loss/anchor",
    "loss/chain_mean",
    "cost/seconds",
    "cost/overhead_frac",
    "cost/credit_seconds",
    "cost/predicted_seconds",
    "cost/firing_size",
    "cost/skipped",
    "step",
)
"""Every scalar that :func:`metrics_of` can give, without the prefix."""

INFLUENCE_METRIC_NAMES: tuple[str, ...] = (
    "influence/max_abs",
    "influence/top_share",
    "influence/passing",
    "influence/between_share",
    "influence/dropped",
    "influence/valid",
)
"""Every scalar that :func:`influence_metrics_of` can give, without the prefix."""

TRANSITION_METRIC_NAMES: tuple[str, ...] = (
    "transition/score",
    "transition/threshold",
    "transition/flag",
    "transition/count",
    "transition/log_odds",
)
"""Every scalar that :func:`transition_metrics_of` can give, without the prefix."""

ALL_METRIC_NAMES: tuple[str, ...] = METRIC_NAMES + INFLUENCE_METRIC_NAMES + TRANSITION_METRIC_NAMES

TABLE_NAMES: tuple[str, ...] = (
    "history",
    "curve",
    "chains",
    "transitions",
    "influence_top",
    "influence_pairs",
    "samples",
)
"""Every table under ``{prefix}/tables/`` of a wandb run."""

MEDIA_NAMES: tuple[str, ...] = (
    "history",
    "chains",
    "influence",
    "suspects",
    "trajectories",
    "free_energy",
    "samples",
)
"""Every picture under ``{prefix}/media/`` of a wandb run."""

STATUSES: tuple[str, ...] = ("running", "finished", "failed")
"""What ``{prefix}/status`` can say."""


def x_of(estimate: Estimate) -> Optional[int]:
    """The x of the row in a logger: the logger's own step at that moment, so that it lines up with the loss curve."""
    return estimate.x if estimate.x is not None else estimate.step


def metrics_of(estimate: Estimate, prefix: str = "slt") -> dict[str, float]:
    """The scalars of one estimate.

    Args:
        estimate: What was measured.
        prefix: The group in front of every key.

    Returns:
        A subset of ``{prefix}/{name}`` for ``name`` in :data:`METRIC_NAMES`. ``llc/*`` are in LLC units (nats),
        ``loss/*`` in units of the loss, ``cost/*seconds`` in seconds, ``nan_frac`` and ``overhead_frac`` are shares in
        [0, 1]. ``diag/valid`` (0.0 or 1.0) is always there; any other value that is not finite, or None, is not
        (such as what only a monitor with an overhead budget knows).

    Example:
        >>> import torch
        >>> e = Estimate(mean=2.0, se=float("nan"), per_chain=torch.ones(1), trace=torch.ones(1, 1), rhat=1.0, ess=9.0,
        ...              valid=True, reasons=(), nbeta=1.0, localization=1.0, init_loss=0.5, chain_loss=0.6,
        ...              num_samples=None, num_weights=3, step_size=1e-3)
        >>> metrics = metrics_of(e)
        >>> metrics["slt/llc/mean"], metrics["slt/diag/valid"], "slt/llc/se" in metrics
        (2.0, 1.0, False)
    """
    low, high = estimate.interval
    values: dict[str, Optional[float]] = {
        "llc/mean": estimate.mean,
        "llc/se": estimate.se,
        "llc/lo": low,
        "llc/hi": high,
        "diag/rhat": estimate.rhat,
        "diag/ess": estimate.ess,
        "diag/n_bad_chains": estimate.num_bad_chains,
        "diag/nan_frac": 1.0 - estimate.finite_share,
        "diag/valid": 1.0 if estimate.valid else 0.0,
        "diag/step_size": estimate.step_size,
        "diag/step_bias": estimate.step_bias,
        "diag/virial": estimate.virial,
        "diag/owed": estimate.owed,
        "diag/lean": estimate.lean,
        "diag/unsure_heat": estimate.unsure_heat,
        "diag/slope": estimate.slope,
        "diag/acceptance": estimate.acceptance,
        "loss/anchor": estimate.init_loss,
        "loss/chain_mean": estimate.chain_loss,
        "cost/seconds": estimate.seconds,
        "cost/overhead_frac": estimate.overhead,
        "cost/credit_seconds": estimate.credit_seconds,
        "cost/predicted_seconds": estimate.predicted_seconds,
        "cost/firing_size": estimate.firing_size,
        "cost/skipped": estimate.skipped,
        "step": estimate.step,
    }
    # Left out where not finite: wandb stores NaN as a string that breaks its min/max summary, MLflow's databases refuse
    # it, and one infinity flattens the whole panel. That nothing could be measured is said by diag/valid = 0.
    return {f"{prefix}/{k}": float(v) for k, v in values.items() if v is not None and math.isfinite(v)}


def influence_metrics_of(estimate: InfluenceEstimate, prefix: str = "slt") -> dict[str, float]:
    """The scalars of one influence estimate.

    Returns:
        A subset of ``{prefix}/{name}`` for ``name`` in :data:`INFLUENCE_METRIC_NAMES`: ``max_abs`` in squared units of
        the loss, ``top_share``, ``passing`` and ``between_share`` as shares in [0, 1], ``dropped`` a number of samples.
        ``valid`` is always there; any other value that is not finite is not.
    """
    values = {
        "influence/max_abs": estimate.max_abs,
        "influence/top_share": estimate.top_share,
        "influence/passing": estimate.passing,
        "influence/between_share": estimate.between_share,
        "influence/dropped": float(len(estimate.dropped)),
        "influence/valid": float(estimate.valid),
    }
    return {f"{prefix}/{k}": float(v) for k, v in values.items() if math.isfinite(v)}


def transition_metrics_of(
    score: float, threshold: float, flag: bool, count: int, log_odds: Optional[float] = None, prefix: str = "slt"
) -> dict[str, float]:
    """The scalars of one point of a curve that is watched for transitions.

    Args:
        score: evidence for a step that ends here; compare ``threshold``.
        threshold: from which on there is a flag.
        flag: whether a transition became known here.
        count: transitions so far that were not retracted.
        log_odds: of the newest standing one's phase after against its phase before, for the posterior that is sampled.
        prefix: The group in front of every key.

    Example:
        >>> transition_metrics_of(3.5, 12.0, False, 0)["slt/transition/flag"]
        0.0
    """
    values: dict[str, Optional[float]] = {
        "transition/score": score,
        "transition/threshold": threshold,
        "transition/flag": 1.0 if flag else 0.0,
        "transition/count": count,
        "transition/log_odds": log_odds,
    }
    return {f"{prefix}/{k}": float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
