"""One call, no Trainer: the learning coefficient of a module in a notebook, or of a stored checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from lightning_slt.functional.learning_coefficient import NEGATIVE, NOT_ARRIVED, TOO_WIDE, summarise
from lightning_slt.functional.posterior import LocalPosterior, default_nbeta
from lightning_slt.record import Estimate
from lightning_slt.sampling.anchor import open_window
from lightning_slt.sampling.arguments import check_count, check_data, check_number
from lightning_slt.sampling.batches import MinibatchSource, source_of
from lightning_slt.sampling.calibration import MAX_STEPS_BW_DRAWS, MAX_VIRIAL, MIN_VIRIAL, Budget, Drawn, draw
from lightning_slt.sampling.chains import Chains, Progress
from lightning_slt.sampling.collective import Alone, Collective
from lightning_slt.sampling.layout import Layout
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.readings import diverged, heat_of, virial_of_chains
from lightning_slt.sampling.restriction import Restriction
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.samplers import SGLD, KineticLangevin, Sampler, as_sampler
from lightning_slt.sampling.segment import STATS_EVERY
from lightning_slt.sampling.step_size import HEAT, LEAST_SCALE, NOISE_HEAT
from lightning_slt.sampling.steps import LossFn, NoLossError
from lightning_slt.sampling.sums import nbeta_of_sum
from lightning_slt.sampling.weight_reader import WeightReader

log = logging.getLogger(__name__)

MAX_ROUNDING = 0.1
"""Share of the LLC that the last digit of a loss may be, where it is not within the error: losses at ``w*`` may all be
rounded to the same side."""
MAX_HEAT = 0.25
"""Share of the estimate that may be step-size heat before it is called invalid."""
MAX_NOISE_HEAT = 0.08
"""The same of the minibatches' heat of a sampler with momenta: 0.4 to 1.0 of what is taken off was there."""
IS_HEAT = "is heat"
"""In the reasons that say so."""
NOTED_HEAT = 0.04
"""Share of the LLC that is heat of the step beyond which covariances over the same chains say so: it is in them."""
MIN_LOCALIZATION, MAX_LOCALIZATION = 1.0, 100.0


class NonFiniteLossError(ValueError):
    """The loss at the weights under study is not finite: there is no minimum to study."""


@dataclass(frozen=True)
class ChainSettings:
    """What is asked of the chains; None is chosen by calibration. The names are those of :func:`estimate_llc`.

    Raises:
        ValueError: naming the argument, its value and what to do.
        TypeError: for an argument of another kind, likewise.
    """

    sampler: Optional[Sampler] = None
    num_chains: int = 8
    num_draws: int = 200
    num_burnin_steps: Optional[int] = None
    num_steps_bw_draws: Optional[int] = None
    nbeta: Optional[float] = None
    localization: Optional[float] = None
    seed: int = 0
    method: str = "auto"
    tolerance: float = 0.03
    max_steps_bw_draws: int = MAX_STEPS_BW_DRAWS
    second_moment: Optional[Tensor] = None
    """``[d]`` mean squared gradients, for a preconditioned sampler to start from."""
    tolerance_llc: Optional[float] = None
    """The standard error to reach in units of the LLC, in place of ``tolerance``, which is a share of it."""

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_draws"):
            check_count(name, getattr(self, name), optional=False)
        check_count("seed", self.seed, -(2**64), optional=False)
        for name, least in (("num_burnin_steps", 0), ("num_steps_bw_draws", 1)):
            check_count(name, getattr(self, name), least, ", or None to have it chosen")
        for name in ("num_chains", "num_draws", "num_burnin_steps", "num_steps_bw_draws", "seed"):
            if getattr(self, name) is not None:  # NumPy's whole numbers among them
                object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("nbeta", "localization", "tolerance", "tolerance_llc"):
            check_number(name, getattr(self, name))
        if self.nbeta is not None and not (math.isfinite(self.nbeta) and self.nbeta > 0):
            raise ValueError(f"nbeta={self.nbeta}: must be positive; leave it None for n / log n.")
        if self.localization is not None and not (math.isfinite(self.localization) and self.localization >= 0):
            raise ValueError(
                f"localization={self.localization}: must not be negative; leave it None to have it chosen."
            )
        for name in ("tolerance", "tolerance_llc"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: the standard error to reach must be positive.")
        if self.method not in ("auto", "sequential", "batched"):
            raise ValueError(f"method={self.method!r}: must be 'auto', 'sequential' or 'batched'.")

    def budget(self) -> Budget:
        """What the chains may cost, for the calibration."""
        return Budget(
            self.num_draws,
            self.num_burnin_steps,
            self.num_steps_bw_draws,
            self.sampler.lr if self.sampler is not None else None,
            self.tolerance,
            self.max_steps_bw_draws,
            self.second_moment,
            self.tolerance_llc,
        )


def tolerance_settings(tolerance: float | str | None) -> dict[str, float]:
    """What ``tolerance`` of :func:`estimate_llc` says, as fields of :class:`ChainSettings`.

    Raises:
        ValueError: for text that is not a percentage, or a number that is not positive.

    Example:
        >>> tolerance_settings("5%"), tolerance_settings(0.5), tolerance_settings(None)
        ({'tolerance': 0.05}, {'tolerance_llc': 0.5}, {})
    """
    if tolerance is None:
        return {}
    if not isinstance(tolerance, str):
        return {"tolerance_llc": float(tolerance)}
    try:
        share = float(tolerance.strip().removesuffix("%")) / 100
    except ValueError:
        share = math.nan
    if not tolerance.strip().endswith("%") or not (math.isfinite(share) and share > 0):
        raise ValueError(
            f"tolerance={tolerance!r}: must be a positive percentage of the LLC such as '5%', or a number in its units."
        )
    return {"tolerance": share}


def default_localization(anchor: Tensor, layout: Optional[Layout] = None) -> float:
    """The gamma at which a free direction moves by the weights' own scale, ``d / |w*|²``, within [1, 100].

    A fixed 100 hides the singular directions of small models with weights of order one (an LLC of 7-12 for 35-37 at
    1000); a fixed 1 lets the many weights of a network wander ten times their own size. What a
    value costs on a model whose answer is known is tabled in docs/choosing.md.

    Args:
        anchor: ``[d]``, the weights that move.
        layout: which of them ``anchor`` has; None for all.
    """
    layout = layout or Layout(anchor.numel())
    square, d = layout.total(anchor.double().square()), layout.num_weights
    return min(max(d / square if square > 0 else MIN_LOCALIZATION, MIN_LOCALIZATION), MAX_LOCALIZATION)


def measure_llc(
    objective: Objective,
    source: MinibatchSource,
    settings: ChainSettings,
    collective: Optional[Collective] = None,
    progress: Optional[Progress] = None,
    memory: Optional[ChainMemory] = None,
) -> Estimate:
    """Run the chains and read the learning coefficient off them: the one function behind every road to an estimate.

    Args:
        objective: the loss on a private copy of the module.
        source: minibatches.
        settings: what is asked of the chains.
        collective: ranks that share them.
        progress: told about chain-steps done.
        memory: what the last firing left, to start from; brought up to date for the next.

    Raises:
        NonFiniteLossError: where the loss at ``w*`` is not finite.
        NoLossError: where the step gives no loss for any minibatch.
        ValueError: where nbeta cannot be derived, or the posterior is improper.
    """
    start = time.perf_counter()
    drawn, chains = run_chains(objective, source, settings, collective, progress, memory)
    return read_llc(drawn, chains, settings).replace(seconds=time.perf_counter() - start)


def run_chains(
    objective: Objective,
    source: MinibatchSource,
    settings: ChainSettings,
    collective: Optional[Collective] = None,
    progress: Optional[Progress] = None,
    memory: Optional[ChainMemory] = None,
    make_reader: Optional[Callable[[], WeightReader]] = None,
    read_every: Union[int, Callable[[], int]] = STATS_EVERY,
    make_sampler: Optional[Callable[[Chains], tuple[LocalPosterior, Sampler]]] = None,
    spread: bool = False,
) -> tuple[Drawn, Chains]:
    """Run chains and return what they showed; arguments and errors are those of :func:`measure_llc`.

    Args:
        make_reader: called once the loss can be asked for; what it gives reads the weights at every ``read_every``-th
            step, and what it reads is ``drawn.segment.read``.
        read_every: steps between those; a function is asked for them once there is the reader.
        make_sampler: called with the chains at ``w*``, on every rank with the same answer; gives the posterior and the
            sampler that are used in place of those of ``settings``.
        spread: chains start at draws of the Gaussian of that sampler's metric, and not at ``w*``.
    """
    collective = collective or Alone()
    nbeta = settings.nbeta
    if nbeta is None:
        if source.num_samples is None:
            raise ValueError(
                "nbeta=None: the data has no length, or makes its own batches (batch_size=None) and does not show how "
                "many samples one has, so n is not known and nbeta = n / log n cannot be derived. Give num_samples= or "
                "nbeta=."
            )
        nbeta = default_nbeta(source.num_samples)
    gamma = settings.localization
    if gamma is None:
        gamma = default_localization(objective.anchor, objective.layout)
    posterior = LocalPosterior(nbeta, gamma)
    sampler: Sampler = settings.sampler if settings.sampler is not None else SGLD()

    with preserve_rng(settings.seed):
        # before active(): only the first batches show whether the module has to be called in place
        first = collective.exchange(lambda: _finite_start(objective, source))
        log.debug(f"loss at w* on the first minibatch: {first[0]:.6g}")
        with objective.active():
            chains = Chains(
                objective,
                source,
                posterior,
                sampler,
                settings.num_chains,
                settings.seed,
                collective,
                settings.method,
                progress,
            )
            if make_sampler is not None:
                posterior, sampler = make_sampler(chains)
                settings = dataclasses.replace(settings, sampler=sampler)
                chains.sample(posterior, sampler)
                metric = getattr(sampler, "metric", None)
                if spread and metric is not None:
                    chains.spread(metric)
            if make_reader is not None:
                readers: list[WeightReader] = []
                collective.exchange(lambda: readers.append(make_reader()))
                chains.reader = readers[0]
                chains.read_every = read_every() if callable(read_every) else read_every
            drawn = draw(chains, settings.seed, settings.budget(), memory)
    return drawn, chains


def _finite_start(objective: Objective, source: MinibatchSource) -> float:
    loss = open_window(objective, source)
    if not objective.layout.all_finite(objective.anchor):
        raise NonFiniteLossError("some of the current weights are not finite: there is no minimum to study.")
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the loss at the current weights is {loss}: there is no minimum to study.")
    return loss


def read_llc(drawn: Drawn, chains: Chains, settings: ChainSettings) -> Estimate:
    """What the draws say of the learning coefficient."""
    segment, lr, between = drawn.segment, drawn.lr, drawn.num_steps_bw_draws
    posterior, d = chains.posterior, chains.layout.num_weights
    raw = posterior.nbeta * segment.difference
    trace = raw.reshape(len(raw), settings.num_draws, between).mean(dim=2)
    finite = segment.finite
    good = ~diverged(segment, posterior.nbeta, d)
    heating = chains.sampler.heating(lr)
    shared = heating.noise_alone
    hot = share = math.nan
    noisy = False
    correction = 1.0
    momenta = chains.sampler.calibration == "curvature"
    if heating.step > 0 and bool(good.any()):
        found = heat_of(segment, heating.step, posterior, good, shared, d if heating.thermostat else 0)
        noisy = found.noise / NOISE_HEAT > 2 * found.discretisation / HEAT
        level = float(trace[good].mean())
        share = found.total / level if level > 0 else math.nan
        corrected = 0 < share < 2 * MAX_HEAT
        # held against what the step was chosen by, where what there is of it is taken off
        scale = max(level, LEAST_SCALE) if corrected else level
        hot = (found.total if momenta else found.of_sgld) / scale if level > 0 else math.nan
        if corrected:
            correction = 1.0 - share
            # what a chain has beyond that share is taken off it too: the mean stays as it is, and the error of the heat
            # is counted together with that of the loss it goes along with
            own = found.each - share * trace[good].mean(dim=1)
            trace = trace.clone()
            trace[good] -= (own / correction).unsqueeze(1)
    trace = trace * correction
    summary = summarise(trace, ~good)
    reasons = summary.reasons
    if momenta and hot >= MAX_NOISE_HEAT and summary.mean > 0:
        reasons += (f"{hot:.0%} of the estimate {IS_HEAT} of the minibatches: full_batch=True, or a larger batch_size",)
    elif not momenta and hot >= MAX_HEAT and summary.mean > 0:
        heat = f"SGLD would have {hot:.0%} heat at it" if shared else f"{hot:.0%} of the estimate {IS_HEAT} of the step"
        reasons += (f"step size {lr:.2g} is too large: {heat}",)
    ratios = virial_of_chains(segment.second_half(), heating.virial_step, posterior, d, good, shared)
    virial = float(ratios.mean())
    error = float(ratios.std()) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    at = f"(virial ratio {virial:.2f})"
    downhill = any(reason.startswith(NEGATIVE) for reason in reasons)
    if virial < MIN_VIRIAL and not downhill:
        batch = ", a larger batch_size (the minibatches' noise keeps the step small)" if noisy else ""
        steps = drawn.num_burnin_steps + segment.steps
        reasons += (f"{NOT_ARRIVED} in {steps} steps {at}: more draws{batch}, or a stronger localization",)
    elif virial > MAX_VIRIAL and virial - 1.0 > error and not downhill:
        reasons += (f"{TOO_WIDE} {at}: a larger batch_size, or more draws",)
    lost = sum(not math.isfinite(loss) for loss in segment.anchors.values())
    if lost:
        seen = f"{lost} of the {len(segment.anchors)} minibatches that chains have met"
        reasons = (f"the loss at the current weights is not finite for {seen}: look for their samples", *reasons)
    init_loss = sum(segment.anchors.values()) / len(segment.anchors)
    rounding = posterior.nbeta * torch.finfo(chains.objective.dtype).eps * abs(init_loss)
    if rounding / math.sqrt(12.0) > max(summary.se, MAX_ROUNDING * abs(summary.mean)):
        kind = str(chains.objective.dtype).removeprefix("torch.")
        digit = f"their last digit is {rounding:.2g} of the LLC"
        reasons += (f"losses of {init_loss:.2g} are too coarse in {kind}: {digit}",)
    if settings.nbeta is None and chains.objective.is_sum:
        reasons += (nbeta_of_sum(chains.source.batch_size),)
    return Estimate(
        mean=summary.mean,
        se=summary.se,
        per_chain=summary.per_chain,
        trace=trace.float(),
        rhat=summary.rhat,
        ess=summary.ess,
        valid=not reasons,
        reasons=reasons,
        nbeta=posterior.nbeta,
        localization=posterior.localization,
        init_loss=init_loss,
        chain_loss=init_loss + summary.mean / posterior.nbeta,
        num_samples=chains.source.num_samples,
        num_weights=d,
        step_size=lr,
        step_bias=summary.mean * (1.0 / correction - 1.0),
        virial=virial,
        finite_share=float(finite.double().mean()),
        num_bad_chains=int((~summary.good).sum()),
        num_chains=settings.num_chains,
        num_draws=settings.num_draws,
        num_burnin_steps=drawn.num_burnin_steps,
        num_steps_bw_draws=between,
        batch_size=chains.source.batch_size,
        seed=settings.seed,
        method=chains.method,
        method_reason=chains.reason,
    )


def fit_for_covariances(
    drawn: Drawn, chains: Chains, settings: ChainSettings
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Whether these draws are those of the posterior, for what is read off them without a correction.

    The heat of a step is taken off a learning coefficient; in covariances of losses it stays, about twice. Of what the
    learning coefficient of the same chains says, it is the heat and the width of the chains that counts here.

    Returns:
        Reasons why covariances over them are not valid, and notes.
    """
    llc = read_llc(drawn, chains, settings)
    reasons = tuple(
        f"the learning coefficient of these chains: {reason}"
        for reason in llc.reasons
        if IS_HEAT in reason or reason.startswith((NOT_ARRIVED, TOO_WIDE))
    )
    heat = llc.step_bias / (llc.mean + llc.step_bias) if llc.mean > 0 else 0.0
    if reasons or not heat > NOTED_HEAT:
        return reasons, ()
    return (), (
        f"{heat:.0%} of the LLC of these chains is heat of the step; covariances have about twice that too much",
    )


def estimate_llc(
    module: nn.Module,
    data: Any,
    loss_fn: Optional[LossFn] = None,
    *,
    sampler: Optional[Union[Sampler, Mapping[str, Any]]] = None,
    nbeta: Optional[float] = None,
    localization: Optional[float] = None,
    num_chains: int = 8,
    num_draws: int = 200,
    num_burnin_steps: Optional[int] = None,
    num_steps_bw_draws: Optional[int] = None,
    batch_size: Optional[int] = None,
    weights: Optional[Mapping[str, Any]] = None,
    restrict: Restriction = None,
    seed: int = 0,
    device: Optional[torch.device | str] = None,
    full_batch: bool = False,
    num_samples: Optional[int] = None,
    method: str = "auto",
    tolerance: Optional[float | str] = None,
) -> Estimate:
    """The local learning coefficient of a module at its weights, ``nbeta (E_w[L_n(w)] - L_n(w*))``.

    Lau et al. 2023, arXiv 2308.12108; with ``restrict`` the weight-refined one of Wang et al. 2024, arXiv 2410.02984.
    The module is not changed, nor is any global random state.

    Args:
        module: a LightningModule (its ``training_step`` is the loss), or any module with ``loss_fn``.
        data: training data: a map-style Dataset, a DataLoader, or an iterable of batches (then give ``num_samples``).
        loss_fn: ``loss_fn(module, batch)`` -> scalar or ``[batch]``.
        sampler: None for SGLD with a calibrated step; ``SGLD(lr=...)`` fixes it. Also LeimkuhlerMatthews, RMSpropSGLD,
            SGNHT, KineticLangevin (with ``full_batch``), and MALA, whose every step sees all the data. Any also as
            a mapping, such as ``{"name": "SGLD", "lr": 1e-4}``.
        nbeta: None for ``n / log n``.
        localization: gamma; None for ``d / |w*|²`` within [1, 100], see :func:`default_localization`.
        num_chains: independent chains.
        num_draws: draws of each.
        num_burnin_steps: None to burn in until the trace is flat.
        num_steps_bw_draws: steps a draw; every one of them counts in the mean. None for as many as the burn-in asks.
        batch_size: None for that of the DataLoader, else 64.
        weights: a ``state_dict`` (or a Lightning checkpoint with one) to study in place of the module's weights.
        restrict: which weights move.
        seed: determines the estimate.
        device: None for where the module is.
        full_batch: every step sees all the data.
        num_samples: n, where the data cannot tell.
        method: ``"auto"`` (the faster of the two, tried), ``"sequential"`` or ``"batched"`` (vmap).
        tolerance: the standard error at which to stop, in units of the LLC (``0.5``) or in per cent of it (``"5%"``);
            None for ``"3%"``. What directions that are reached last may still owe is held below it too. The chains end
            without it where the budget, 64 steps a draw, is used; nothing is stopped early where ``num_burnin_steps``
            is given. Shorter chains than ``num_draws`` there are not: for a wide tolerance ask for fewer draws as well.

    Returns:
        An :class:`~lightning_slt.record.Estimate`; look at ``valid`` and ``reasons`` before ``mean``.

    Raises:
        ValueError: for an argument out of range, no data, n < 2, a restriction that matches nothing, a module without a
            usable loss, a non-finite starting loss. The message names the argument and the remedy.
        TypeError: where ``data`` is no data, the loss no tensor, or another argument of another kind.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(200, 4, generator=g)
        >>> net = nn.Linear(4, 1, bias=False)
        >>> data = TensorDataset(x, net(x).detach())
        >>> est = estimate_llc(net, data, lambda m, b: (m(b[0]) - b[1]).square().mean() / 2, localization=0.1)
        >>> est.valid, abs(est.mean - 2.0) < 0.3  # d / 2
        (True, True)
    """
    sampler = as_sampler(sampler)
    settings = ChainSettings(
        sampler=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin_steps=num_burnin_steps,
        num_steps_bw_draws=num_steps_bw_draws,
        nbeta=nbeta,
        localization=localization,
        seed=seed,
        method=method,
        **tolerance_settings(tolerance),  # type: ignore[arg-type]
    )
    check_count("batch_size", batch_size)
    check_count("num_samples", num_samples, otherwise=", or None to take it from the data")
    check_data("data", data, num_samples)
    seed = settings.seed
    # a validation hook of Lightning's runs in inference mode, in which there are no gradients
    with torch.inference_mode(False), preserve_rng(seed):
        objective = Objective(module, loss_fn, restrict, device, weights=state_dict_of(weights))
        full_batch = full_batch or (sampler is not None and sampler.full_batch)
        source = source_of(data, batch_size, objective.device, seed, num_samples, full_batch)
        if nbeta is None and source.num_samples is not None:
            default_nbeta(source.num_samples)
        if isinstance(sampler, KineticLangevin) and source.batch_size < (source.num_samples or math.inf):
            log.warning(
                f"sampler=KineticLangevin(): minibatches of {source.batch_size} heat its chains, and little of that "
                "can be taken off. Give full_batch=True, or leave the sampler None."
            )
        try:
            return measure_llc(objective, source, settings)
        except NoLossError as error:
            raise ValueError(f"{error} Give loss_fn(module, batch) -> loss.") from error


def state_dict_of(weights: Optional[Mapping[str, Any]]) -> Optional[dict[str, Tensor]]:
    """The ``state_dict`` in what was given: one itself, or a Lightning checkpoint that holds one.

    Raises:
        TypeError: for a path, a module, or anything else.
    """
    if weights is None:
        return None
    if isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"weights={os.fspath(weights)!r}: expected a state_dict, got a path. Load it: "
            f"weights=torch.load({os.fspath(weights)!r}, map_location='cpu')."
        )
    if not isinstance(weights, Mapping):
        remedy = "Give its state_dict()." if isinstance(weights, nn.Module) else "Give module.state_dict()."
        raise TypeError(f"weights: expected a state_dict, got {type(weights).__name__}. {remedy}")
    inner = weights.get("state_dict", weights)
    return dict(inner)
