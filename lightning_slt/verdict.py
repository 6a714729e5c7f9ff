"""The verdict on chains: the learning coefficient that their draws give, and every reason why it is not valid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from lightning_slt.functional.convergence import standard_error, surely
from lightning_slt.functional.learning_coefficient import Summary, summarise
from lightning_slt.functional.owed import gain_of, owed_by
from lightning_slt.reasons import (
    DOWNHILL,
    NOT_ACCEPTED,
    NOT_IN_NATS,
    Kind,
    Reason,
    sentences,
)
from lightning_slt.record import Estimate
from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.cooling import MAX_HEAT, WithoutHeat, has_momenta, without_heat
from lightning_slt.sampling.eval_mode import misfit_of_eval
from lightning_slt.sampling.line_integral import look_along_lines
from lightning_slt.sampling.minibatch_heat import MAX_NOISE_HEAT, held_by_thermostat, too_hot
from lightning_slt.sampling.readings import diverged, steepness_of, virial_readings
from lightning_slt.sampling.rounding import misfit_of_rounding
from lightning_slt.sampling.segment import Segment
from lightning_slt.sampling.slope import Slope, slope_of
from lightning_slt.sampling.step_size import LEAST_SCALE
from lightning_slt.sampling.sums import misfit_of_sum
from lightning_slt.sampling.width import LARGE_IN_NATS, LITTLE_HEAT, reasons_of_width

MAX_ROUNDING = 0.1
"""Share of the LLC that the last digit of a loss may be, where it is not within the error: losses at ``w*`` may all be
rounded to the same side."""
LEAST_DIGIT = 1e-3
"""What the last digit of a loss may be in units of the LLC, however small that is: it is counted in the error then."""
MIN_ACCEPTANCE = 0.1
"""Share of the steps that are accepted below which chains that have not settled are said to stand still: a smaller step
helps them, and more draws hardly do."""
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
    llc, verdict = _judge(drawn, chains, with_slope=False)
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
    heat = llc.heat_share
    if not (llc.mean > 0 and heat > NOTED_HEAT):
        return ()
    said = f"the finite step adds {heat:.0%} to the LLC (taken off), and about {2 * heat:.0%} to covariances"
    return (f"{said} (not taken off)",)


def _judge(drawn: Drawn, chains: Chains, with_slope: bool = True) -> tuple[Estimate, tuple[Reason, ...]]:
    segment, posterior, d = drawn.segment, chains.posterior, chains.layout.num_weights
    good = ~diverged(segment, posterior.nbeta, d)
    cooled = without_heat(drawn, chains, good)
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
    of_width = tuple(reasons_of_width(ratios, cooled, summary, drawn, chains, standing or bool(downhill)))
    # first: a look along lines may use up the memory of a chain
    slope = slope_of(chains, drawn, good) if with_slope else Slope()
    looked = look_along_lines(chains, drawn, good)
    verdict = (
        *of_data,
        *_reasons_of_acceptance(acceptance, drawn.lr, (*summary.verdict, *of_width)),
        *summary.verdict,
        *downhill,
        *_reasons_of_scale((*summary.verdict, *downhill), init_loss),
        *_reasons_of_heat(cooled, summary, slope, drawn, chains),
        *of_width,
        *_reasons_of_rounding(init_loss, digit, chains),
        *(Reason(Kind.WEIGHTS_TOO_COARSE, sentence) for sentence in coarse),
        *(Reason(Kind.EVAL_MODE, sentence) for sentence in misfit_of_eval(chains.objective)),
        *(Reason(Kind.SUM, sentence) for sentence in misfit_of_sum(chains.objective, chains.source, posterior.nbeta)),
        *(Reason(Kind.GRADIENT, sentence) for sentence in looked.misfit),
        *(_reasons_of_oscillation(cooled, summary, drawn) if looked.oscillates else ()),
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
        step_bias=cooled.taken if math.isfinite(summary.mean) else math.nan,
        virial=float(ratios.mean()),
        acceptance=acceptance,
        owed=owed,
        lean=cooled.lean,
        unsure_heat=cooled.unsure,
        slope=slope.mean,
        slope_se=slope.se,
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


def _slowest_last(drawn: Drawn, chains: Chains) -> bool:
    """Whether directions are reached the later the less the loss holds them, see
    :func:`~lightning_slt.functional.owed.gain_of`."""
    return not (drawn.warm or chains.sampler.preconditioned or has_momenta(chains))


def _reasons_of_heat(
    cooled: WithoutHeat, summary: Summary, slope: Slope, drawn: Drawn, chains: Chains
) -> Iterator[Reason]:
    """Held against the estimate; where weights are surely beside a minimum, against that of the minimum. One that is
    below zero beyond its error is of weights at no minimum, whatever the step."""
    before, heat = summary.mean + cooled.taken, cooled.heat
    if not before > 0 and any(reason.kind is Kind.NEGATIVE for reason in summary.verdict):
        return
    if before > 0 and cooled.taken > 0 and surely(slope.mean, slope.se, int(summary.good.sum())) > 0:
        level = max(before, LEAST_SCALE)
        heat *= level / (level + slope.mean)
    if has_momenta(chains):
        if heat >= MAX_NOISE_HEAT:
            yield Reason(Kind.HEAT_OF_MINIBATCHES, too_hot(heat, "estimate"))
    elif heat >= MAX_HEAT:
        too_large = f"step size {drawn.lr:.2g} is too large"
        if chains.sampler.heating(drawn.lr).noise_alone:
            yield Reason(Kind.STEP_TOO_LARGE, f"{too_large}: SGLD would have {heat:.0%} heat at it")
        else:
            yield Reason(Kind.HEAT_OF_STEP, f"{too_large}: {heat:.0%} of the estimate is heat of the step")


def _reasons_of_oscillation(cooled: WithoutHeat, summary: Summary, drawn: Drawn) -> Iterator[Reason]:
    """A loss that goes up and down within a step is not raised by its heat as one that only rises is."""
    before = summary.mean + cooled.taken
    heat = cooled.taken / before if before > 0 else cooled.heat if cooled.taken > 0 else 0.0
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


def _reasons_of_scale(others: tuple[Reason, ...], init_loss: float) -> Iterator[Reason]:
    """A loss of 10,000 times a log-likelihood (the squared error of targets in hundreds) has its minimum for the chains
    where nearly every digit of the data is fitted, and training ends far from it.

    Args:
        others: of how the chains have settled.
    """
    if init_loss > LARGE_IN_NATS and any(reason.kind is Kind.NEGATIVE for reason in others):
        nats = "a squared error is once it is divided by twice the variance of the noise in the targets"
        yield Reason(Kind.NOT_IN_NATS, f"{NOT_IN_NATS} (it is {init_loss:,.0f} here): {nats}")


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
