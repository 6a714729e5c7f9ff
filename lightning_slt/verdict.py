"""The verdict on chains: the learning coefficient that their draws give, and every reason why it is not valid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from lightning_slt.functional.convergence import standard_error
from lightning_slt.functional.learning_coefficient import Summary, summarise
from lightning_slt.functional.owed import gain_of, owed_by
from lightning_slt.functional.posterior import default_nbeta
from lightning_slt.reasons import (
    DOWNHILL,
    LOSS_TOO_LARGE,
    NBETA_TOO_LARGE,
    NOT_ACCEPTED,
    NOT_ARRIVED,
    TOO_WIDE,
    Kind,
    Reason,
    sentences,
)
from lightning_slt.record import Estimate
from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.eval_mode import misfit_of_eval
from lightning_slt.sampling.lean import lean_of
from lightning_slt.sampling.line_integral import look_along_lines
from lightning_slt.sampling.minibatch_heat import MAX_NOISE_HEAT, held_by_thermostat, too_hot
from lightning_slt.sampling.readings import Heat, diverged, heat_of, steepness_of, virial_readings
from lightning_slt.sampling.rounding import misfit_of_rounding
from lightning_slt.sampling.segment import Segment
from lightning_slt.sampling.step_size import HEAT, LEAST_SCALE, NOISE_HEAT
from lightning_slt.sampling.sums import misfit_of_sum

MAX_ROUNDING = 0.1
"""Share of the LLC that the last digit of a loss may be, where it is not within the error: losses at ``w*`` may all be
rounded to the same side."""
LEAST_DIGIT = 1e-3
"""What the last digit of a loss may be in units of the LLC, however small that is: it is counted in the error then."""
MIN_VIRIAL = 0.7
"""Virial ratio below which chains that have used their budget have not reached their width: the number is not valid.
Between the two lie singular models, whose free directions take longest and matter least."""
MAX_VIRIAL = 1.4
"""Virial ratio above which, beyond its error, chains are wider than the posterior: minibatches or a step of the search
have thrown them there, and the step that is right since is too small to bring them back."""
MIN_ACCEPTANCE = 0.1
"""Share of the steps that are accepted below which chains that have not settled are said to stand still: a smaller step
helps them, and more draws hardly do."""
MAX_HEAT = 0.25
"""Share of the estimate that may be step-size heat before it is called invalid."""
UNSURE_NOISE = 1.0 / 3.0
"""Share of the minibatches' heat, as it is taken off, that is counted as an error where the loss is no square. On a
ReLU classifier of 150 samples, batches of 64, 1.1 of 17.05 was taken off, and the estimates of 12 seeds stayed 0.7 too
high; on the digits the whole of it, not weighted, is too much."""
NO_SQUARE = 4.0
"""That share, for each unit by which the LLC is apart from half the work of the gradient beyond its error: on a square
these are the same, and the heat is exact."""
LITTLE_HEAT = 0.02
"""The same of a step that was given, below which it is the step that keeps chains from their width: a larger one would
do. Half or a quarter of what a step that is found has."""
LARGE_LOSS = 3.0
"""Times a negative log-likelihood that a loss seems to be (:func:`_scale_of_loss`), above which its scale is
named: those of 9 and of 10,000 times both seem to be 3.6 and more, a likelihood 0.9 to 1.1."""
MOST_NOISE = 20.0
"""Times the heat of discretisation that minibatches may have for the former to be seen beside it."""
NOTED_HEAT = 0.04
"""Share of the LLC that is heat of the step beyond which covariances over the same chains say so: it is in them."""
BAD_FOR_COVARIANCES = frozenset(
    {
        Kind.HEAT_OF_STEP,
        Kind.HEAT_OF_MINIBATCHES,
        Kind.OSCILLATES,
        Kind.NOT_ARRIVED,
        Kind.TOO_WIDE,
        Kind.WEIGHTS_TOO_COARSE,
    }
)
"""What covariances over the same chains are not valid for either: their heat and their width."""
HOT = frozenset({Kind.HEAT_OF_STEP, Kind.HEAT_OF_MINIBATCHES, Kind.OSCILLATES})
"""What makes covariances over the same chains too large by half and more, of however small a firing."""
OF_ALL_READINGS = frozenset({Kind.WEIGHTS_TOO_COARSE, Kind.EVAL_MODE, Kind.SUM, Kind.GRADIENT})
"""What nothing that is read off the chains is valid for."""


def read_llc(drawn: Drawn, chains: Chains) -> Estimate:
    """What the draws say of the learning coefficient."""
    return _judge(drawn, chains)[0]


def fit_for_covariances(drawn: Drawn, chains: Chains) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Whether these draws are those of the posterior, for what is read off them without a correction.

    The heat of a step is taken off a learning coefficient; in covariances of losses it stays, about twice. Of what the
    learning coefficient of the same chains says, it is the heat and the width of the chains that counts here.

    Returns:
        Reasons why covariances over them are not valid, and notes.
    """
    llc, verdict = _judge(drawn, chains)
    reasons = tuple(_of_llc(reason) for reason in verdict if reason.kind in BAD_FOR_COVARIANCES)
    more, notes = _heat_in_covariances(drawn, chains, llc)
    reasons += more
    return (reasons, ()) if reasons else ((), notes)


def read_both(drawn: Drawn, chains: Chains) -> tuple[Estimate, tuple[str, ...], tuple[str, ...]]:
    """What the draws say of the learning coefficient, and what covariances over them have against them beside what is
    said of that.

    Returns:
        The learning coefficient, reasons why covariances are not valid, and notes.
    """
    llc, verdict = _judge(drawn, chains)
    reasons, notes = _heat_in_covariances(drawn, chains, llc)
    more = tuple(reason.sentence for reason in verdict if reason.kind in OF_ALL_READINGS)
    hot = tuple(_of_llc(reason) for reason in verdict if reason.kind in HOT)
    return llc, (*reasons, *hot, *more), () if hot else notes


def _of_llc(reason: Reason) -> str:
    return f"the learning coefficient of these chains: {reason.sentence}"


def _heat_in_covariances(drawn: Drawn, chains: Chains, llc: Estimate) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the heat that stays in covariances over these chains: reasons why they are not valid, and notes."""
    segment, posterior = drawn.segment, chains.posterior
    good = ~diverged(segment, posterior.nbeta, chains.layout.num_weights)
    reasons, notes = held_by_thermostat(segment, chains.sampler.heating(drawn.lr), posterior, good)
    return reasons, (*_heat_noted(llc), *notes)


def _heat_noted(llc: Estimate) -> tuple[str, ...]:
    """What covariances over the chains of this learning coefficient have of the heat of the step; none where little."""
    heat = max(llc.step_bias - max(llc.lean, 0.0), 0.0) / (llc.mean + llc.step_bias) if llc.mean > 0 else 0.0
    if not heat > NOTED_HEAT:
        return ()
    said = f"the finite step adds {heat:.0%} to the LLC (taken off), and about {2 * heat:.0%} to covariances"
    return (f"{said} (not taken off)",)


def _judge(drawn: Drawn, chains: Chains) -> tuple[Estimate, tuple[Reason, ...]]:
    segment, posterior, d = drawn.segment, chains.posterior, chains.layout.num_weights
    good = ~diverged(segment, posterior.nbeta, d)
    cooled = _without_heat(drawn, chains, good)
    summary = summarise(cooled.trace, ~good)
    heating = chains.sampler.heating(drawn.lr)
    width = (heating.virial_step, posterior, d, good, heating.noise_alone)
    ratios = virial_readings(segment.second_half(), *width).mean(dim=1)
    reached = virial_readings(segment, *width)
    owed = 0.0
    if bool(good.any()):
        error, steepness = standard_error(reached), steepness_of(segment, posterior, good)
        # the heat came off by one factor: what is gained late has hardly any
        gain = gain_of(cooled.trace[good] / cooled.kept, reached) if _slowest_last(drawn, chains) else math.inf
        owed = owed_by(summary.mean, float(reached.mean()), error, d, steepness, gain)
    init_loss = segment.anchor_loss
    digit = _unseen_digit(init_loss, summary, chains)
    if summary.mean + digit >= 0:
        # below zero by rounding alone: the loss does not depend on these weights, and no chain has run downhill
        told = tuple(reason for reason in summary.verdict if reason.kind is not Kind.NEGATIVE)
        summary = dataclasses.replace(summary, verdict=told)
    of_data = _reasons_of_data(segment)
    # the search shrinks the step at what is not finite, beside which weights of any size become coarse
    coarse = () if of_data else misfit_of_rounding(chains, drawn.lr)
    acceptance = _acceptance(segment, good)
    standing = acceptance is not None and acceptance < MIN_ACCEPTANCE
    downhill = tuple(_reasons_of_descent(cooled.trace[good], ratios, summary, digit))
    of_width = tuple(_reasons_of_width(ratios, cooled, summary, drawn, chains, standing or bool(downhill)))
    looked = look_along_lines(chains, drawn, good)
    verdict = (
        *of_data,
        *_reasons_of_acceptance(acceptance, drawn.lr, (*summary.verdict, *of_width)),
        *summary.verdict,
        *downhill,
        *_reasons_of_heat(cooled, summary, drawn, chains),
        *of_width,
        *_reasons_of_rounding(init_loss, digit, chains),
        *(Reason(Kind.WEIGHTS_TOO_COARSE, sentence) for sentence in coarse),
        *(Reason(Kind.EVAL_MODE, sentence) for sentence in misfit_of_eval(chains.objective)),
        *(Reason(Kind.SUM, sentence) for sentence in misfit_of_sum(chains.objective, chains.source, posterior.nbeta)),
        *(Reason(Kind.GRADIENT, sentence) for sentence in looked.misfit),
        *(_reasons_of_oscillation(cooled, drawn) if looked.oscillates else ()),
    )
    estimate = Estimate(
        mean=summary.mean,
        se=math.hypot(summary.se, owed, cooled.lean, cooled.unsure, digit),
        per_chain=summary.per_chain,
        trace=cooled.trace.float(),
        rhat=summary.rhat,
        ess=summary.ess,
        valid=not verdict,
        reasons=sentences(verdict),
        kinds=tuple(reason.kind.name for reason in verdict),
        nbeta=posterior.nbeta,
        localization=posterior.localization,
        init_loss=init_loss,
        chain_loss=init_loss + summary.mean / posterior.nbeta,
        num_samples=chains.source.num_samples,
        num_weights=d,
        step_size=drawn.lr,
        step_bias=summary.mean * (1.0 / cooled.kept - 1.0),
        virial=float(ratios.mean()),
        acceptance=acceptance,
        owed=owed,
        lean=cooled.lean,
        unsure_heat=cooled.unsure,
        finite_share=float(segment.finite.double().mean()),
        num_bad_chains=int((~summary.good).sum()),
        num_chains=chains.num_chains,
        num_draws=drawn.num_draws,
        num_burnin_steps=drawn.num_burnin_steps,
        num_steps_bw_draws=drawn.num_steps_bw_draws,
        batch_size=chains.source.batch_size,
        seed=chains.seed,
        method=chains.method,
        method_reason=chains.reason,
    )
    return estimate, verdict


def _acceptance(segment: Segment, good: Tensor) -> Optional[float]:
    if segment.acceptance is None or not bool(good.any()):
        return None
    return float(segment.acceptance[good].mean())


def _reasons_of_data(segment: Segment) -> tuple[Reason, ...]:
    lost = sum(not math.isfinite(loss) for loss in segment.anchors.values())
    if not lost:
        return ()
    seen = f"{lost} of the {len(segment.anchors)} minibatches that chains have met"
    sentence = f"the loss at the current weights is not finite for {seen}: look for their samples"
    return (Reason(Kind.NOT_FINITE, sentence),)


@dataclass(frozen=True, eq=False)
class _WithoutHeat:
    """A trace of the LLC integrand with the heat of the step taken off.

    Attributes:
        trace: ``[num_chains, num_draws]`` float64.
        kept: its mean over the good chains, as a share of what it was; 1 where nothing is taken off.
        heat: what the estimate is judged by, as a share of it; NaN where there is no heat, or no positive estimate to
            hold it against.
        noisy: the minibatches' part of it is what keeps the step small.
        lean: of the step (:func:`~lightning_slt.sampling.lean.lean_of`), in LLC units: taken off with the heat, where
            it is above zero, and an error of its own size, since it holds to first order alone.
        scale: of the loss, see :func:`_scale_of_loss`; 0 where it is not known.
        unsure: what is not sure of the minibatches' heat that is taken off, in LLC units.
    """

    trace: Tensor
    kept: float
    heat: float
    noisy: bool
    lean: float = 0.0
    scale: float = 0.0
    unsure: float = 0.0


def _without_heat(drawn: Drawn, chains: Chains, good: Tensor) -> _WithoutHeat:
    segment, posterior, d = drawn.segment, chains.posterior, chains.layout.num_weights
    raw = posterior.nbeta * segment.difference
    trace = raw.reshape(len(raw), drawn.num_draws, drawn.num_steps_bw_draws).mean(dim=2)
    heating = chains.sampler.heating(drawn.lr)
    if not (heating.step > 0 and bool(good.any())):
        return _WithoutHeat(trace, 1.0, math.nan, False)
    found = heat_of(segment, heating.step, posterior, good, heating.noise_alone, d if heating.thermostat else 0)
    noisy = found.noise / NOISE_HEAT > 2 * found.discretisation / HEAT
    scale = _scale_of_loss(found, posterior.nbeta, chains.source.batch_size)
    level = float(trace[good].mean())
    if not level > 0:
        return _WithoutHeat(trace, 1.0, math.nan, noisy, scale=scale)
    # where noise is shared there is no lean at first order; but neither can those chains stay where it is too steep
    lean = 0.0 if _has_momenta(chains) else lean_of(segment, drawn.lr, posterior, good)
    above = max(lean, 0.0)  # one below zero is an error alone
    leans = 0.0 if heating.noise_alone else above
    share = (found.total + leans) / level
    judged = found.total if _has_momenta(chains) else found.of_sgld + above
    if not 0 < share < 2 * MAX_HEAT:
        return _WithoutHeat(trace, 1.0, judged / level, noisy, lean, scale)
    kept = 1.0 - share
    # what a chain has beyond that share is taken off it too: the mean stays as it is, and the error of the heat
    # is counted together with that of the loss it goes along with
    own = found.each + leans - share * trace[good].mean(dim=1)
    trace[good] -= (own / kept).unsqueeze(1)
    # held against what the step was chosen by, where what there is of it is taken off
    unsure = _unsure_share(segment, good) * max(found.noise, 0.0)
    return _WithoutHeat(trace * kept, kept, judged / max(level, LEAST_SCALE), noisy, lean, scale, unsure)


def _unsure_share(segment: Segment, good: Tensor) -> float:
    """How much of the minibatches' heat is not sure: none on a square, and :data:`UNSURE_NOISE` far from one."""
    half_work = 0.5 * segment.grad_dot[good].mean(dim=1)
    beyond = segment.difference[good].mean(dim=1) - half_work
    if len(beyond) < 2 or not float(half_work.mean()) > 0:
        return UNSURE_NOISE
    apart = abs(float(beyond.mean())) - float(beyond.std()) / math.sqrt(len(beyond))
    return min(UNSURE_NOISE, NO_SQUARE * max(apart, 0.0) / float(half_work.mean()))


def _scale_of_loss(found: Heat, nbeta: float, batch_size: int) -> float:
    """How many times a negative log-likelihood the loss seems to be: by how much more the gradients of single samples
    scatter than its curvature says.

    Of a log-likelihood the covariance C of these gradients is the curvature H, of c times one it is c H. The heat of
    the minibatches is in proportion to ``nbeta² tr(C) / batch_size``, that of discretisation to ``nbeta tr(H)``. The
    latter is a difference, and no more than a hint beside noise that is :data:`MOST_NOISE` times as large.

    Returns:
        0 where minibatches add no heat, and where they would hide that of discretisation for a log-likelihood too
        (an nbeta far above the batch size); infinity where discretisation adds none.

    Example:
        >>> _scale_of_loss(Heat(0.125, 0.25, 0.5, 1.0, torch.zeros(1)), nbeta=20.0, batch_size=40)
        8.0
    """
    noise = found.noise / found.weight if found.weight > 0 else 0.0
    if not noise > 0 or LARGE_LOSS * nbeta > MOST_NOISE * batch_size:
        return 0.0
    own = found.discretisation / max(found.steepness, 1.0)
    return noise / own * batch_size / nbeta if own > 0 else math.inf


def _slowest_last(drawn: Drawn, chains: Chains) -> bool:
    """Whether directions are reached the later the less the loss holds them, see
    :func:`~lightning_slt.functional.owed.gain_of`."""
    return not (drawn.warm or chains.sampler.preconditioned or _has_momenta(chains))


def _has_momenta(chains: Chains) -> bool:
    return chains.sampler.calibration == "curvature"


def _reasons_of_heat(cooled: _WithoutHeat, summary: Summary, drawn: Drawn, chains: Chains) -> Iterator[Reason]:
    heat = cooled.heat
    if not summary.mean > 0:
        return
    if _has_momenta(chains):
        if heat >= MAX_NOISE_HEAT:
            yield Reason(Kind.HEAT_OF_MINIBATCHES, too_hot(heat, "estimate"))
    elif heat >= MAX_HEAT:
        too_large = f"step size {drawn.lr:.2g} is too large"
        if chains.sampler.heating(drawn.lr).noise_alone:
            yield Reason(Kind.STEP_TOO_LARGE, f"{too_large}: SGLD would have {heat:.0%} heat at it")
        else:
            yield Reason(Kind.HEAT_OF_STEP, f"{too_large}: {heat:.0%} of the estimate is heat of the step")


def _reasons_of_oscillation(cooled: _WithoutHeat, drawn: Drawn) -> Iterator[Reason]:
    """A loss that goes up and down within a step is not raised by its heat as one that only rises is."""
    heat = 1.0 - cooled.kept
    if heat >= LITTLE_HEAT:
        seen = "the loss goes up and down many times from w* to the chains"
        left = f"{heat:.0%} of the estimate was taken off as heat of the step, which need not be there"
        yield Reason(
            Kind.OSCILLATES, f"{seen}: {left}. A smaller lr than {drawn.lr:.2g} has less of it, and wants more draws"
        )


def _reasons_of_acceptance(acceptance: Optional[float], lr: float, others: tuple[Reason, ...]) -> Iterator[Reason]:
    """``others``: reasons why the chains have not settled; where there are none few accepted steps were enough."""
    if others and acceptance is not None and acceptance < MIN_ACCEPTANCE:
        yield Reason(
            Kind.NOT_ACCEPTED, f"{NOT_ACCEPTED} ({100 * acceptance:.2g}% at a step size of {lr:.2g}): a smaller lr"
        )


def _reasons_of_descent(trace: Tensor, ratios: Tensor, summary: Summary, digit: float) -> Iterator[Reason]:
    """Chains run away from a maximum each as far as it happens to, and the error of their mean is as large as the mean:
    every one of them is below ``w*``, goes on down, and is driven outwards harder than a posterior would hold it.

    Args:
        trace: ``[chains kept, num_draws]``.
        ratios: ``[chains kept]``, the virial ratio of each.
        digit: the last one of the losses in units of the LLC, where the error does not show it.
    """
    if any(reason.kind is Kind.NEGATIVE for reason in summary.verdict) or not summary.mean + digit < 0:
        return
    half = trace.shape[1] // 2
    falls = trace[:, -half:].mean(dim=1) < trace[:, :half].mean(dim=1)
    if bool((falls & (trace.mean(dim=1) < 0) & (ratios < -1.0)).all()):
        yield Reason(Kind.NEGATIVE, f"{DOWNHILL}: the weights are not at a minimum (chains run downhill)")


def _reasons_of_width(
    ratios: Tensor, cooled: _WithoutHeat, summary: Summary, drawn: Drawn, chains: Chains, explained: bool
) -> Iterator[Reason]:
    """
    Args:
        ratios: ``[chains kept]``, the virial ratio of each.
        explained: why is said elsewhere, and more draws do not help.
    """
    if any(reason.kind is Kind.NEGATIVE for reason in summary.verdict):
        return
    virial = float(ratios.mean())
    error = float(ratios.std()) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    at = f"(virial ratio {round(virial, 2) + 0.0:.2f})"  # no minus before a zero
    if virial < MIN_VIRIAL:
        said = f"{NOT_ARRIVED} in {drawn.num_burnin_steps + drawn.segment.steps} steps {at}"
        yield Reason(Kind.NOT_ARRIVED, said if explained else _with_remedy(said, cooled, chains))
    elif virial > MAX_VIRIAL and virial - 1.0 > error:
        said = f"{TOO_WIDE} {at}"
        yield Reason(Kind.TOO_WIDE, said if explained else f"{said}: a larger batch_size, or more draws")


def _with_remedy(said: str, cooled: _WithoutHeat, chains: Chains) -> str:
    """What is said of chains that have not reached their width, and what lets them.

    A step that was given is small because it was given: where it has little heat a larger one would do.

    The noise of minibatches grows with the square of nbeta, the force of the loss with nbeta: above n it is nbeta that
    keeps the step small. So it is with a loss on a large scale, such as the squared error of targets in thousands: c
    times a negative log-likelihood is one at c times ``nbeta``.
    """
    n, nbeta, batch = chains.source.num_samples, chains.posterior.nbeta, "a larger batch_size"
    given = chains.sampler.lr is not None and chains.sampler.calibration == "heat"
    if given and not cooled.heat >= LITTLE_HEAT:
        return f"{said}: a larger lr, or none given, to have it found"
    noisy = cooled.noisy and not given
    if noisy and n is not None and nbeta > n >= 2:
        usual = f"{nbeta:.3g}; n / log n is {default_nbeta(n):.3g}"
        return f"{NBETA_TOO_LARGE} ({usual}), {said}: a smaller nbeta, or {batch}"
    if noisy and cooled.scale > LARGE_LOSS:
        nats = "one in nats (a squared error divided by 2 sigma², sigma the scale of the noise in the targets)"
        return f"{LOSS_TOO_LARGE}, {said}: {nats}; where it is, {batch}, or more draws"
    more = f", {batch} (the minibatches' noise keeps the step small)" if noisy else ""
    return f"{said}: more draws{more}; a stronger localization settles sooner, but measures another number"


def _unseen_digit(init_loss: float, summary: Summary, chains: Chains) -> float:
    """The last digit of the losses in units of the LLC, where the Monte-Carlo error does not show it; else 0.

    Args:
        init_loss: the mean loss at ``w*``.
        summary: of the trace.
        chains: that it is of.
    """
    digit = chains.posterior.nbeta * torch.finfo(chains.objective.dtype).eps * abs(init_loss)
    return digit if digit / math.sqrt(12.0) > max(summary.se, MAX_ROUNDING * abs(summary.mean)) else 0.0


def _reasons_of_rounding(init_loss: float, digit: float, chains: Chains) -> Iterator[Reason]:
    """``digit``: see :func:`_unseen_digit`. A small one is an error like others, and counted: an LLC of nothing, as of
    weights that the loss does not depend on, has no other."""
    if digit > LEAST_DIGIT:
        kind = str(chains.objective.dtype).removeprefix("torch.")
        said = f"their last digit is {digit:.2g} of the LLC"
        yield Reason(Kind.TOO_COARSE, f"losses of {init_loss:.2g} are too coarse in {kind}: {said}")
