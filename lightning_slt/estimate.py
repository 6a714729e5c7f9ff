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

from lightning_slt.functional.posterior import LocalPosterior, default_nbeta
from lightning_slt.kinds import check_count, check_flag, check_number, not_negative, positive
from lightning_slt.reasons import Kind
from lightning_slt.record import Estimate
from lightning_slt.sampling.anchor import coupling, let_pass, open_window
from lightning_slt.sampling.arguments import check_data
from lightning_slt.sampling.batch_size import enlarge
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.budget import MAX_STEPS_BW_DRAWS, Budget, Drawn
from lightning_slt.sampling.calibration import draw
from lightning_slt.sampling.chains import Chains, Progress
from lightning_slt.sampling.collective import Alone, Collective
from lightning_slt.sampling.given_data import source_of
from lightning_slt.sampling.layout import Layout
from lightning_slt.sampling.memory import ChainMemory
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.restriction import Restriction
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.samplers import SGLD, KineticLangevin, Sampler, as_sampler
from lightning_slt.sampling.segment import STATS_EVERY
from lightning_slt.sampling.steps import LossFn, NoLossError
from lightning_slt.sampling.unlike import array_named
from lightning_slt.sampling.weight_reader import WeightReader
from lightning_slt.verdict import read_llc

log = logging.getLogger(__name__)

MIN_LOCALIZATION, MAX_LOCALIZATION = 1.0, 100.0


CHANCE = frozenset(kind.name for kind in (Kind.NOT_MIXED, Kind.DRIFTING, Kind.NOT_ARRIVED, Kind.TOO_WIDE))
"""What is wrong with where chains have been, and not with the weights or the loss."""


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
        check_count("seed", self.seed, -(2**63), optional=False)
        if self.seed >= 2**64:  # generators take 64 bits, and would give the numbers of another seed
            raise ValueError(f"seed={self.seed}: must be below 2**64. Give a smaller one.")
        for name, least in (("num_burnin_steps", 0), ("num_steps_bw_draws", 1)):
            check_count(name, getattr(self, name), least, ", or None to have it chosen")
        for name in ("num_chains", "num_draws", "num_burnin_steps", "num_steps_bw_draws", "seed"):
            if getattr(self, name) is not None:  # NumPy's whole numbers among them
                object.__setattr__(self, name, int(getattr(self, name)))
        check_number("nbeta", self.nbeta, True, positive, "must be positive; leave it None for n / log n.")
        remedy = "must not be negative; leave it None to have it chosen."
        check_number("localization", self.localization, True, not_negative, remedy)
        for name in ("tolerance", "tolerance_llc"):
            check_number(name, getattr(self, name), True, positive, "the standard error to reach must be positive.")
        if self.method not in ("auto", "sequential", "batched"):
            raise ValueError(f"method={self.method!r}: must be 'auto', 'sequential' or 'batched'.")
        if self.method == "batched" and self.num_chains == 1:
            raise ValueError("method='batched': num_chains=1 makes no batch. Leave it 'auto', or give more chains.")

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
        TypeError: for neither of the two.

    Example:
        >>> tolerance_settings("5%"), tolerance_settings(0.5), tolerance_settings(None)
        ({'tolerance': 0.05}, {'tolerance_llc': 0.5}, {})
    """
    if tolerance is None:
        return {}
    if not isinstance(tolerance, str):
        remedy = "the standard error to reach, in units of the LLC, must be positive; leave it None for 3 % of it."
        check_number("tolerance", tolerance, False, positive, remedy)
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
    estimate = read_llc(drawn, chains)
    go_on_where_unsettled(drawn, chains, estimate, memory)
    return estimate.replace(seconds=time.perf_counter() - start)


def go_on_where_unsettled(drawn: Drawn, chains: Chains, estimate: Estimate, memory: Optional[ChainMemory]) -> None:
    """Keep the ends of warm chains that have not settled, though their trace was flat: from the same start and with the
    same noise they would do as badly at every firing to come. To be called on all ranks at once."""
    if memory is not None and drawn.repeats and not CHANCE.isdisjoint(estimate.kinds):
        memory.keep(chains)


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
        first = collective.rank == 0

        def begin() -> tuple[float, Optional[bool]]:
            loss = _start(objective, source, sampler)
            coupled = coupling(objective, source) if first else None  # minibatches are of one kind on all ranks
            if not coupled:
                enlarge(objective, source)
            return loss, coupled

        loss, source.coupled = collective.exchange(begin)[0]
        log.debug(f"loss at w* on the first minibatch: {loss:.6g}")
        if source.coupled:
            collective.exchange(lambda: let_pass(objective, source))
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


def _start(objective: Objective, source: MinibatchSource, sampler: Sampler) -> float:
    """The loss at ``w*``; what chains of this sampler cannot start from is refused."""
    loss = open_window(objective, source)
    if not objective.layout.all_finite(objective.anchor):
        raise NonFiniteLossError("some of the current weights are not finite: there is no minimum to study.")
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the loss at the current weights is {loss}: there is no minimum to study.")
    if sampler.full_batch and objective.draws:
        raise ValueError(
            f"sampler={type(sampler).__name__}() accepts or rejects by the difference of two losses, and the step "
            "draws random numbers, which move it: use SGLD(), or a loss_fn that draws none."
        )
    return loss


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
        batch_size: None for that of the DataLoader; of a Dataset 64, or 256 where the network is small
            (:mod:`~lightning_slt.sampling.batch_size`).
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
    check_flag("full_batch", full_batch)
    check_data("data", data, num_samples)
    seed = settings.seed
    # a validation hook of Lightning's runs in inference mode, in which there are no gradients
    with torch.inference_mode(False), preserve_rng(seed):
        objective = Objective(module, loss_fn, restrict, device, weights=state_dict_of(weights))
        full_batch = full_batch or (sampler is not None and sampler.full_batch)
        source = source_of(data, batch_size, objective.device, seed, num_samples, full_batch)
        if nbeta is None and source.num_samples is not None:
            default_nbeta(source.num_samples)
        try:
            with array_named("data", data, source):
                estimate = measure_llc(objective, source, settings)
        except NoLossError as error:
            raise ValueError(str(error)) from error
        if isinstance(sampler, KineticLangevin) and source.batch_size < (source.num_samples or math.inf):
            log.warning(
                f"sampler=KineticLangevin(): minibatches of {source.batch_size} heat its chains, and little of that "
                "can be taken off. Give full_batch=True, or leave the sampler None."
            )
        return estimate


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
    if not isinstance(inner, Mapping):
        raise TypeError(f"weights['state_dict']: expected a state_dict, got {type(inner).__name__}.")
    names = [name for name in inner if not isinstance(name, str)]
    if names:
        raise TypeError(f"weights: expected a state_dict, with names for keys; got {names[0]!r}.")
    return dict(inner)
