"""What a monitor says of a run beside its numbers: how it measures, why a number is none, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_slt.callbacks.overhead import OverheadBudget
from lightning_slt.callbacks.said import Voice
from lightning_slt.callbacks.schedule import Schedule, steps_of_run
from lightning_slt.callbacks.turns import Ahead
from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.publish.diagnoses import beside_sentence, invalid_sentence, kinds_of
from lightning_slt.publish.phrases import count_of, number
from lightning_slt.publish.sink import RunCost
from lightning_slt.publish.words import cost_words, duration
from lightning_slt.record import Estimate
from lightning_slt.warned import warn

LARGE_OVERHEAD = 0.25
"""Share of wall-clock above which a monitor without a budget says what can be done."""
LONG = 60.0
"""Seconds of the firings to come, from which on the first one says how many there are."""


def say_how(voice: Voice, step: int, estimate: Estimate, influence: Optional[InfluenceEstimate]) -> None:
    """What there is to be said of the first firing, of the first notes, and of the first samples left out.

    Args:
        voice: of the monitor.
        step: that both are of, which they may not know yet.
        estimate, influence: of a firing.
    """
    if voice.first("method"):
        chains = count_of(estimate.num_chains, f"{estimate.method} chain")
        n = f"{estimate.num_samples:,}" if estimate.num_samples is not None else "not known"
        rank_zero_info(
            f"{voice.who}: {chains} over {count_of(estimate.num_weights, 'weight')} "
            f"({estimate.method_reason}), n = {n}, nbeta = {number(estimate.nbeta, 4)}, localization = "
            f"{number(estimate.localization, 4)}, step size {estimate.step_size:.2g}"
        )
        if influence is not None:
            if influence.notes:
                voice.first("notes")
            queries = count_of(len(influence.query_index), "query", "queries")
            asked = f"of {count_of(len(influence.train_index), 'training sample')} on {queries}"
            asked = "; ".join([asked, *influence.notes])
            why_not = f"step {step}: influence is not valid: {'; '.join(influence.reasons)} ({asked})"
            rank_zero_info(f"{voice.who}: {why_not if influence.reasons else f'influence {asked}'}")
    if influence is not None and influence.notes and voice.first("notes"):
        rank_zero_info(f"{voice.who}: of influence from here on: {'; '.join(influence.notes)}")
    if influence is not None and influence.dropped and voice.first("dropped"):
        named = ", ".join(f"{d.kind} {d.index} ({d.reason})" for d in influence.dropped[:5])
        warn(f"{voice.who}: {len(influence.dropped)} samples are left out of influence: {named}")


def say_how_far(voice: Voice, estimate: Estimate, step_given: bool) -> None:
    """Why an estimate is not valid, each kind of reason once in a run; or, once, that it is of weights at no minimum.

    Args:
        voice: of the monitor.
        estimate: any.
        step_given: whether ``lr`` or ``num_burnin_steps`` was.
    """
    if estimate.valid:
        if estimate.beside_minimum and voice.first("beside a minimum"):
            rank_zero_info(f"{voice.who}: {beside_sentence(estimate)}")
        return
    kinds = kinds_of(estimate)
    fresh = {kind for kind in dict.fromkeys(kinds) if voice.first(f"not valid: {kind}")}
    new = [reason for reason, kind in zip(estimate.reasons, kinds, strict=True) if kind in fresh]
    if new:
        rank_zero_info(f"{voice.who}: {invalid_sentence(estimate, new, step_given)}")


def warn_of_other_weights(voice: Voice, estimate: Estimate, before: int) -> None:
    """That the newest point of a curve is of another number of weights than ``before``: once of the same two numbers,
    since layers that are held and set free in turn may change them at every firing."""
    if estimate.num_weights != before and voice.first(f"{before} weights, then {estimate.num_weights}"):
        warn(
            f"{voice.who}: from step {estimate.step} on {estimate.num_weights:,} weights move, before it "
            f"{before:,} did: what is measured is another quantity. Another restrict=, or another model, that goes "
            "on from a checkpoint wants a name= of its own; where layers were set free, read it in two parts."
        )


def say_cost(voice: Voice, cost: RunCost) -> None:
    """What measuring cost a run that is over, and what came to nothing."""
    failed = f"; {count_of(len(voice.failures), 'measurement')} failed" if voice.failures else ""
    rank_zero_info(f"{voice.who}: measuring cost this run {cost_words(cost)}{failed}")


def say_all_failed(voice: Voice) -> None:
    """The run is over, and has nothing to show: why was said as it happened, which may be long ago."""
    steps = voice.failures
    many = "the one measurement" if len(steps) == 1 else f"all {len(steps):,} measurements"
    rank_zero_info(f"{voice.who}: no estimates: {many} failed; why was said at step {steps[0]}")


def say_what_is_due(voice: Voice, seconds: float, ahead: Ahead) -> None:
    """After the first firing, where those to come are long as well: nobody should wait for the end to learn it."""
    if ahead.firings * seconds > LONG and voice.first("what is due"):
        due = "1 more is" if ahead.firings == 1 else f"{ahead.firings:,} more are"
        rank_zero_info(
            f"{voice.who}: this firing took {duration(seconds)}, and about {due} due in this run. "
            "Later ones are cheaper where they start from its chains"
        )


def warn_if_large(voice: Voice, estimates: Sequence[Estimate], at_end: Optional[float]) -> None:
    """Say once what can be done, where the cadence alone takes much of the run.

    Args:
        voice: of the monitor.
        estimates: of the run so far.
        at_end: the share that measuring will have had of the whole run; None where that cannot be told, and the share
            so far stands for it.
    """
    # the first firings of a run come close together, and prove nothing
    if len(estimates) <= 3:
        return
    so_far = estimates[-1].overhead
    at_end = so_far if at_end is None else at_end
    if min(so_far, at_end) > LARGE_OVERHEAD and voice.first("overhead"):
        ahead = f", and will have taken about {at_end:.0%} at its end" if abs(at_end - so_far) > 0.05 else ""
        warn(
            f"{voice.who}: measuring has taken {so_far:.0%} of this run's wall-clock so far{ahead}. Measure "
            "more seldom, or with fewer num_chains or num_draws. max_overhead=0.05 bounds the share, but suits runs of "
            "about 10,000 batches and more: a shorter one may measure nothing."
        )


def warn_of_no_influence(voice: Voice, reason: str) -> None:
    """Why influence is left out."""
    warn(
        f"{voice.who}: influence is left out of this run from here on, the learning coefficient is measured all the "
        f"same. {reason}"
    )


def say_when_first(voice: Voice, budget: OverheadBudget, step: int, trainer: Trainer) -> None:
    """At which step the budget covers the first firing: it may be late in a run, or beyond its end."""
    ahead = math.ceil(budget.batches_to_first / trainer.accumulate_grad_batches)
    total = steps_of_run(trainer)
    of = f" (this run has {total:,}); a larger max_overhead, or fewer num_chains, brings it forward" if total else ""
    rank_zero_info(
        f"{voice.called(f'max_overhead={budget.max_overhead:g}')}: the first firing comes at about step "
        f"{step + ahead:,}{of}"
    )


def warn_of_nothing(voice: Voice, budget: OverheadBudget) -> None:
    """The budget never sufficed: what a firing would have cost, and what can be done."""
    predicted = budget.wanted_size * budget.predicted_seconds
    warn(
        f"{voice.called(f'max_overhead={budget.max_overhead:g}')}: nothing was measured. The smallest firing would "
        f"have cost about {predicted:.3g} s, which {predicted / budget.rate:.3g} s of training earn, and training "
        f"lasted {budget.trained_seconds:.3g} s. Raise max_overhead, make a firing cheaper (num_chains, num_draws, "
        "batch_size), or train for longer."
    )


def warn_of_left_out(voice: Voice, step: int) -> None:
    """A run is resumed at its end, from a checkpoint written before the measurement there, and not trained on."""
    warn(
        f"{voice.who}: the measurement at step {step:,} is left out: the checkpoint was written before it, and nothing "
        "is left to train. It is made where training goes on from there (a larger max_epochs); lightning-slt sweep "
        "measures the checkpoint by itself."
    )


def warn_of_no_step(voice: Voice, schedule: Schedule, trainer: Trainer, last_step: int) -> None:
    """The run was over before the first step that the schedule names: nothing else would say so."""
    warn(
        f"{voice.called(str(schedule))}: nothing was measured: this run ended at step {last_step:,}, after "
        f"{count_of(trainer.current_epoch, 'whole epoch')}, before the first firing. Name earlier steps, or none: then "
        "20 firings are spread over the run."
    )


__all__ = [
    "say_all_failed",
    "say_cost",
    "say_how",
    "say_how_far",
    "say_what_is_due",
    "say_when_first",
    "warn_if_large",
    "warn_of_left_out",
    "warn_of_no_influence",
    "warn_of_no_step",
    "warn_of_nothing",
    "warn_of_other_weights",
]
