"""What a run showed, in plain words: where the report and the terminal take their sentences from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.publish.diagnoses import at_step
from lightning_slt.publish.phrases import count_of, listed, number, signed, with_error
from lightning_slt.publish.run import MonitorRecord, Run
from lightning_slt.publish.sink import RunCost
from lightning_slt.publish.susceptibility_rows import WHOLE_SHIFT, cells, step_at
from lightning_slt.record import Estimate
from lightning_slt.susceptibility_record import SusceptibilityEstimate
from lightning_slt.transition_record import TransitionLog, TransitionReport, Verdict, critical_interval, size_text
from lightning_slt.transitions import Transition
from lightning_slt.transitions.evidence import MIN_POINTS

KIND_WORDS = {
    "A": "structure was built",
    "B": "structure was simplified",
    "C": "structure was lost",
    "D": "structure grew without a gain in loss",
}
"""What the kinds of a transition mean."""

SUSCEPTIBILITY = (
    "How a component of the model answers to data: what a small share of that data in the place of training data would "
    "do to its learning coefficient. Below zero the data holds the component more tightly, above zero it loosens it."
)
"""What susceptibility is, for a newcomer."""

_NAMED = 5
"""Suspects and components that a sentence names."""


# --------------------------------------------------------------------------------------------------- the whole run


def headline(run: Run) -> list[str]:
    """What the run showed, in a few sentences."""
    monitor = run.main
    sentences = [_measured(monitor), *_course(monitor.estimates)]
    sentences.append(transitions_sentence(monitor.transitions, monitor.estimates))
    suspects = suspects_sentence(monitor.influences[-1]) if monitor.influences else ""
    others = run.monitors[1:]
    if others:
        sentences.append(
            f"Beside it {listed([m.name for m in others])} {'was' if len(others) == 1 else 'were'} measured."
        )
    sentences += [suspects] if suspects else []
    for each in run.monitors:
        sentences += [susceptibility_sentence(each.susceptibilities)] if each.susceptibilities else []
    cost = cost_of(run)
    sentences += [cost] if cost else []
    if monitor.status == "failed":
        sentences.append("The run did not end well: training stopped on an error, or its process died.")
    elif monitor.status == "running":
        sentences.append("The run was still going when this was written.")
    return sentences


def _measured(monitor: MonitorRecord) -> str:
    estimates = monitor.estimates
    steps = [e.step for e in estimates if e.step is not None]
    where = ""
    if steps:
        where = f" at step {steps[0]:,}" if len(steps) == 1 else f" between steps {steps[0]:,} and {steps[-1]:,}"
    text = f"The local learning coefficient (LLC) was measured {_times(len(estimates))}{where}"
    valid = sum(e.valid for e in estimates)
    if valid == len(estimates):
        return f"{text}; {'the estimate is' if valid == 1 else 'all estimates are'} valid."
    if valid == 0:
        return f"{text}; not one estimate is valid, so no number here may be read as a learning coefficient."
    return f"{text}; {valid:,} of the {len(estimates):,} estimates {'is' if valid == 1 else 'are'} valid."


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def _course(estimates: Sequence[Estimate]) -> list[str]:
    """From where to where the LLC and the loss went, over what may be read."""
    valid = [e for e in estimates if e.valid]
    if not valid:
        return []
    first, last = valid[0], valid[-1]
    if len(valid) == 1:
        return [f"{at_step(first)} it was {with_error(first.mean, first.se)} at a loss of {number(first.init_loss)}."]
    text = (
        f"Over the valid estimates it went from {_beginning(first)} to "
        f"{with_error(last.mean, last.se)} (step {last.step or 0:,})"
    )
    peak = max(valid, key=lambda e: e.mean)
    spread = 3 * math.hypot(_finite(peak.se), _finite(last.se))
    if peak is not first and peak is not last and peak.mean - max(first.mean, last.mean) > spread:
        text += f", with a peak of {with_error(peak.mean, peak.se)} at step {peak.step or 0:,}"
    return [f"{text}, while the loss went from {number(first.init_loss)} to {number(last.init_loss)}."]


def _beginning(first: Estimate) -> str:
    """Where the curve begins: a number that is not positive beyond its error is told as about 0."""
    found, step = with_error(first.mean, first.se), f"step {first.step or 0:,}"
    return f"{found} ({step})" if first.interval[0] > 0 else f"about 0 ({found}, {step})"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


# ----------------------------------------------------------------------------------------------------- transitions


def transitions_sentence(log: Optional[TransitionLog], estimates: Sequence[Estimate]) -> str:
    """How many there were, when, and what changed.

    Args:
        log: None where they were not watched for.
        estimates: the curve that they were looked for in.
    """
    if log is None:
        return "Transitions were not watched for (TransitionMonitor does that)."
    standing = [report for report in log.reports if report.transition.state != "retracted"]
    text = "No structural transition was flagged."
    usable = sum(e.comparable for e in estimates)
    if usable < MIN_POINTS and not (standing or log.offline):
        return f"Too few estimates to look for transitions ({usable:,}; at least {MIN_POINTS} are needed)."
    if standing:
        said = "; ".join(_change(report) for report in standing)
        many = f"{len(standing)} structural transitions were" if len(standing) > 1 else "One structural transition was"
        text = f"{many} flagged: {said}."
    more = [f"{t.step:,.0f}" for t in offline_only(log)]
    if more:
        also = " also" if standing else ""
        text += f" The whole curve{also} shows {'one' if len(more) == 1 else 'some'} at "
        text += f"step{'s' if len(more) > 1 else ''} {listed(more)}, seen only afterwards."
    return text


def _change(report: TransitionReport) -> str:
    t = report.transition
    if report.before is not None and report.after is not None:
        before, after = report.before, report.after
        text = f"LLC from {number(before.llc)} to {number(after.llc)}, loss from {number(before.loss)} to "
        text += number(after.loss)
    else:
        text = f"LLC {signed(t.llc_change)}, loss {signed(t.loss_change)}"
    doubt = "; still provisional" if t.state == "provisional" else ""
    return f"at step {t.step:,.0f} {KIND_WORDS[t.kind]} ({text}{doubt})"


def offline_only(log: TransitionLog) -> list[Transition]:
    """Those that only the whole curve shows."""
    matched = {report.refined.id for report in log.reports if report.refined is not None}
    return [t for t in log.offline if t.id not in matched]


def transition_title(t: Transition) -> str:
    """Short: when, and what it means."""
    return f"Step {t.step:,.0f}: {KIND_WORDS[t.kind]}"


def transition_sentences(report: TransitionReport) -> list[str]:
    """All that is known of a transition, a sentence each."""
    t = report.transition
    known = {"confirmed": "later points confirmed it", "retracted": "later points took it back"}
    state = known.get(t.state, "it is provisional: too few points have followed to judge it")
    between = f"between steps {t.onset:,.0f} and {t.end:,.0f}"
    text = [f"Kind {t.kind}, {between}; it was known at step {t.known_at:,.0f}, and {state}."]
    before, after = report.before, report.after
    if before is not None and after is not None:
        text.append(
            f"The LLC went from {with_error(before.llc, before.llc_se)} to {with_error(after.llc, after.llc_se)}, the "
            f"loss from {with_error(before.loss, before.loss_se)} to {with_error(after.loss, after.loss_se)}."
        )
    else:
        text.append(
            f"The LLC changed by {with_error(t.llc_change, t.llc_change_se)}, the loss by "
            f"{with_error(t.loss_change, t.loss_change_se)}."
        )
    if t.boundary is not None:
        text.append(
            f"The learning rate jumped or the data was loaded anew at step {t.boundary:,.0f}: that may be all it is."
        )
    if report.refined is not None and abs(report.refined.step - t.step) > 0:
        text.append(f"The whole curve puts it at step {report.refined.step:,.0f}.")
    if report.components:
        moved = ", ".join(f"{c.name} {signed(c.change)}" for c in report.components[:3])
        text.append(f"Change of the components, the one that moved most first: {moved}.")
    samples = [str(sample.index) for sample in report.samples if sample.stands_out]
    if samples:
        text.append(f"Samples whose numbers moved most: {', '.join(samples)}.")
    if report.tempered is not None:
        text.append(preference_sentence(report.tempered, report.num_samples, "the posterior that was sampled"))
    if report.untempered is not None:
        text.append(preference_sentence(report.untempered, report.num_samples, "the posterior at beta = 1"))
    return text


def preference_sentence(verdict: Verdict, n: Optional[int], posterior: str) -> str:
    """Which phase ``posterior`` prefers."""
    known = f" at the {n:,} samples of this run" if n is not None else ""
    sign = "+" if verdict.log_odds > 0 else ""
    if verdict.preferred == "undecided":
        text = f"Which phase {posterior} prefers{known} is undecided"
    else:
        text = f"{posterior[0].upper()}{posterior[1:]} prefers the phase {verdict.preferred} it{known}"
    text += f" (log-odds of the new phase {sign}{with_error(verdict.log_odds, verdict.log_odds_se)})"
    if verdict.critical_n is not None:
        text += f"; both would be equal at about {size_text(verdict.critical_n)} samples, {critical_interval(verdict)}"
    return text + "."


# ------------------------------------------------------------------------------------------- influence and the cost


def suspects_sentence(influence: InfluenceEstimate) -> str:
    """Which samples are likely mislabels or outliers."""
    count = len(influence.train_index)
    if not influence.valid:
        why = "; ".join(influence.reasons) or "no reason given"
        return f"Influence was measured on {count_of(count, 'training sample')}, and is not valid: {why}."
    if not count:
        return ""
    named = [str(int(influence.train_index[j])) for j in influence.suspects(_NAMED)]
    over = " at all firings so far" if influence.suspicion is not None else ""
    return (
        f"Of {count_of(count, 'training sample')} looked at, the likeliest wrong labels or outliers are "
        f"number{'s' if len(named) > 1 else ''} {listed(named)}, by their mean loss over the posterior{over}."
    )


def pairs_sentence(influence: InfluenceEstimate) -> str:
    """How far single pairs may be read."""
    if not math.isfinite(influence.passing):
        return "Single pairs were not kept at this firing."
    return (
        f"{influence.passing:.1%} of the single pairs are further than 3 standard errors from zero; by chance alone "
        f"{influence.chance:.1%} would be."
    )


def susceptibility_sentence(history: Sequence[SusceptibilityEstimate]) -> str:
    """Of which components it was measured, and what stands out most at the last firing that is valid.

    Args:
        history: not empty.
    """
    named = list(dict.fromkeys(name for found in history for name in found.components))
    more = len(named) - _NAMED
    names = [*named[:_NAMED], f"{more} more"] if more > 0 else named
    text = f"Susceptibility to data was measured {_times(len(history))}, of {_noun(named)} {listed(names)}"
    places = [place for place, found in enumerate(history) if found.valid]
    if not places:
        return f"{text}; not one firing is valid, so none of it may be read."
    last = places[-1]
    rows = cells(history[last])
    # of groups where there are some: the whole shift is their mean
    most = max((cell for row in rows[1:] or rows for cell in row), key=lambda cell: cell.stands_out)
    where = f"at step {step_at(history, last):,}"
    if not most.clear:
        return f"{text}; {where} none of it is further than 3 standard errors from zero."
    effect = "loosened" if most.chi > 0 else "held more tightly"
    by = WHOLE_SHIFT if most.group is None else f"data of group “{most.group}”"
    return (
        f"{text}; {where} what stands out most is {most.component}, {effect} by {by} ({with_error(most.chi, most.se)})."
    )


def _noun(named: Sequence[str]) -> str:
    return "component" if len(named) == 1 else "components"


def susceptibility_verdict(history: Sequence[SusceptibilityEstimate]) -> str:
    """Whether the last firing may be read, why not, and how many may.

    Args:
        history: not empty.
    """
    last = history[-1]
    text = f"Step {step_at(history, len(history) - 1):,}: "
    if last.valid:
        text += f"valid, from {last.num_chains} chains of {last.num_draws:,} draws for each component."
    else:
        text += f"not valid, none of its numbers may be read: {'; '.join(last.reasons) or 'no reason was recorded'}."
    if len(history) > 1:
        valid = sum(found.valid for found in history)
        some = f"{valid:,} of the {len(history):,} firings {'is' if valid == 1 else 'are'} valid"
        every = f"{'Both' if valid == 2 else f'All {valid:,}'} firings are valid"
        text += f" {every if valid == len(history) else some}."
    return text


def seconds_of(run: Run) -> float:
    """What measuring took in this run, all its monitors together; NaN where no record says."""
    known = [seconds for seconds in map(_seconds, run.monitors) if math.isfinite(seconds)]
    return sum(known) if known else math.nan


def _seconds(monitor: MonitorRecord) -> float:
    """By its clock at the end; of a run that has none, what its firings took."""
    if monitor.cost is not None:
        return monitor.cost.seconds
    spent = [e.seconds for e in monitor.estimates if math.isfinite(e.seconds)]
    return sum(spent) + monitor.beside_seconds if spent else math.nan


def cost_of(run: Run) -> str:
    """What measuring took, all the monitors of the run together."""
    seconds = seconds_of(run)
    if not math.isfinite(seconds):
        return ""
    left = "training itself was left as it was."
    costs = [monitor.cost for monitor in run.monitors if monitor.cost is not None]
    if len(costs) == len(run.monitors):
        # each counts its own firings alone, against the same clock
        whole = RunCost(seconds, max(cost.run_seconds for cost in costs))
        return f"Measuring cost this run {cost_words(whole)}; {left}"
    text = f"Measuring took {duration(seconds)} in all"
    shares = [e.overhead for e in run.main.estimates if math.isfinite(e.overhead)]
    # those of several monitors are of different moments, and add to nothing
    if shares and len(run.monitors) == 1:
        text += f", {_share(shares[-1])} of the run's wall-clock up to its last firing"
    return f"{text}; {left}"


def cost_words(cost: RunCost) -> str:
    """The seconds, and what part of the run they are.

    Example:
        >>> cost_words(RunCost(14.0, 18.0)), cost_words(RunCost(0.5, 100.0))
        ('14 s, 78% of its wall-clock', '0.5 s, 0.5% of its wall-clock')
    """
    return f"{duration(cost.seconds)}, {_share(cost.share)} of its wall-clock"


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"


def duration(seconds: float) -> str:
    """A time for a person.

    Example:
        >>> duration(0.034), duration(7.26), duration(59.6), duration(340.0), duration(7500.0)
        ('0.034 s', '7.3 s', '1 min 0 s', '5 min 40 s', '2 h 5 min')
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
