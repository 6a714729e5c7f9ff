"""What a run showed, in plain words: the one place that the report and the terminal take their sentences from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional

from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.publish.run import MonitorRecord, Run
from lightning_slt.reasons import DRIFTING, NEGATIVE, NOT_ARRIVED, NOT_MIXED, TOO_WIDE
from lightning_slt.record import Estimate
from lightning_slt.transition_record import TransitionLog, TransitionReport, Verdict, size_text
from lightning_slt.transitions import Transition
from lightning_slt.transitions.evidence import MIN_POINTS

Level = Literal["good", "note", "bad"]

KIND_WORDS = {
    "A": "structure was built",
    "B": "structure was simplified",
    "C": "structure was lost",
    "D": "structure grew without a gain in loss",
}
"""What the kinds of a transition mean."""

_NAMED = 5
"""Suspects that a sentence names."""
_EACH = 5
"""Diverged firings that are told one by one, and stretches of steps that a sentence names."""

_REASONS: tuple[tuple[str, str, str], ...] = (
    (NEGATIVE, "chains ran downhill: the weights were at no minimum", "Usual early in training and at a saddle."),
    (DRIFTING, "chains were still moving at their end", "More draws (num_draws) give them time."),
    (NOT_MIXED, "chains disagree with each other", "More draws (num_draws) or chains (num_chains) help."),
    (
        NOT_ARRIVED,
        "chains had not spread to their full width",
        "More draws (num_draws) help; leave num_burnin_steps to calibration.",
    ),
    (TOO_WIDE, "chains had been thrown wide and not come back", "A larger batch_size makes their steps less noisy."),
    (
        "step size",
        "the chains' step size did not suit the weights",
        "Give a smaller lr, or leave lr and num_burnin_steps to calibration.",
    ),
    ("no chain", "every chain left the finite numbers", "A smaller step or a larger localization holds them."),
)
"""Beginnings of the reasons of an estimate, what they mean in plain words, and what can be done."""
_ADVISED = (NOT_ARRIVED, TOO_WIDE)
"""Those that say themselves what can be done."""


@dataclass(frozen=True)
class Remark:
    """One thing to know.

    Attributes:
        level: ``"bad"`` where a number may not be read, ``"note"`` where it may, with care.
        text: a sentence.
        steps: those it is about, in order; empty for the whole run.
    """

    level: Level
    text: str
    steps: tuple[int, ...] = ()


def number(value: Optional[float], digits: int = 3) -> str:
    """A number for a person: so many significant digits, and thousands apart.

    Example:
        >>> number(12.3456), number(0.00012345), number(1234567.0), number(float("nan"))
        ('12.3', '0.000123', '1,230,000', 'n/a')
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size > 8:
        return _scientific(value, digits)
    rounded = round(value, digits - 1 - size)
    return f"{rounded:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def _scientific(value: float, digits: int = 3) -> str:
    return f"{'−' if value < 0 else ''}{abs(value):.{digits - 1}e}"


def signed(value: float) -> str:
    """A change.

    Example:
        >>> signed(2.5), signed(-0.0361)
        ('+2.50', '−0.0361')
    """
    return f"{'+' if value > 0 else ''}{number(value)}"


_LARGE = 1e7
"""From here on a number and its error together are too wide for a column."""


def with_error(value: float, error: float) -> str:
    """A number with its standard error, both to the digits that the error leaves.

    Example:
        >>> with_error(11.8234, 0.512), with_error(3.5, float("nan")), with_error(1234.5, 56.0)
        ('11.8 ± 0.5', '3.50', '1,230 ± 60')
        >>> with_error(-1.0612e13, 4.7e11)
        '−1.06e+13 ± 5e+11'
    """
    if not math.isfinite(value):
        return "n/a"
    if not (math.isfinite(error) and error > 0):
        return number(value)
    size = math.floor(math.log10(error))
    # rounding may carry over to the next power of ten
    size = math.floor(math.log10(round(error, -size)))
    places = max(0, -size)
    if max(abs(value), error) >= _LARGE:
        return f"{_scientific(value) if abs(value) >= _LARGE else number(value)} ± {error:.0e}"
    if places > 6:
        return f"{number(value)} ± {error:.0e}"
    return f"{round(value, -size):,.{places}f}".replace("-", "−") + f" ± {round(error, -size):,.{places}f}"


def listed(items: Sequence[str]) -> str:
    """Items as a person lists them.

    Example:
        >>> listed(["a"]), listed(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" and {items[-1]}" if items else ""


def count_of(count: int, one: str, many: Optional[str] = None) -> str:
    """A number of things.

    Example:
        >>> count_of(1, "estimate"), count_of(3, "estimate"), count_of(0, "estimate")
        ('1 estimate', '3 estimates', 'no estimates')
    """
    return f"{f'{count:,}' if count else 'no'} {one if count == 1 else many or one + 's'}"


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
    return f"{text}; {valid:,} of the {len(estimates):,} estimates are valid."


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def _course(estimates: Sequence[Estimate]) -> list[str]:
    """From where to where the LLC and the loss went, over what may be read."""
    valid = [e for e in estimates if e.valid]
    if not valid:
        return []
    first, last = valid[0], valid[-1]
    if len(valid) == 1:
        return [f"{_at(first)} it was {with_error(first.mean, first.se)} at a loss of {number(first.init_loss)}."]
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


def _at(estimate: Estimate) -> str:
    return f"At step {estimate.step:,}" if estimate.step is not None else "There"


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
        text.append(preference_sentence(report.tempered, report.num_samples))
    return text


def preference_sentence(verdict: Verdict, n: Optional[int]) -> str:
    """Which phase a posterior prefers."""
    known = f" at the {n:,} samples of this run" if n is not None else ""
    sign = "+" if verdict.log_odds > 0 else ""
    if verdict.preferred == "undecided":
        text = f"Which phase the posterior prefers{known} is undecided"
    else:
        text = f"The posterior prefers the phase {verdict.preferred} it{known}"
    text += f" (log-odds of the new phase {sign}{with_error(verdict.log_odds, verdict.log_odds_se)})"
    if verdict.critical_n is not None:
        text += f"; both would be equal at about {size_text(verdict.critical_n)} samples"
    return text + "."


# ----------------------------------------------------------------------------------------------------- diagnostics


def diagnosis(estimate: Estimate) -> list[Remark]:
    """What is to be known of one estimate; empty where there is nothing."""
    remarks: list[Remark] = []
    steps = (estimate.step,) if estimate.step is not None else ()
    left_out = bad_chains(estimate)
    kept = estimate.num_chains - len(left_out)
    if left_out:
        who = f"{'chain' if len(left_out) == 1 else 'chains'} {listed([str(c) for c in left_out])} diverged"
        where = f" at step {estimate.step:,}" if estimate.step is not None else ""
        if estimate.valid:
            rest = f"left out; the estimate is that of the other {kept}"
            remarks.append(Remark("note", f"{who}{where}; {rest}", steps))
        else:
            remarks.append(Remark("bad", f"{who}{where}; estimate left out", steps))
    for reason in estimate.reasons:
        if left_out and _is_divergence(reason):
            continue
        remarks.append(Remark("bad", reason_words(reason), steps))
    if not estimate.valid and not remarks:
        remarks.append(Remark("bad", "not valid; no reason was recorded", steps))
    return remarks


def bad_chains(estimate: Estimate) -> list[int]:
    """Numbers of the chains that were left out."""
    return [c for c, mean in enumerate(estimate.per_chain.tolist()) if not math.isfinite(mean)]


def reason_words(reason: str) -> str:
    """A reason in plain words, its numbers behind; one that is not known stays as it is.

    Example:
        >>> reason_words("chains have not mixed: R-hat 1.38 > 1.1, error 5.9")
        'chains disagree with each other (R-hat 1.38 > 1.1, error 5.9)'
    """
    words, _ = _meaning(reason)
    if words == reason or reason.startswith(NEGATIVE) or ": " not in reason:
        return words
    if reason.startswith(_ADVISED):  # what follows is advice; the number is in brackets before it
        found = re.search(r"\(([^)]*)\)", reason)
        return f"{words} ({found[1]})" if found else words
    return f"{words} ({reason.split(': ', 1)[1]})"


def _meaning(reason: str) -> tuple[str, str]:
    """What it means, and what can be done."""
    return next(((words, advice) for start, words, advice in _REASONS if reason.startswith(start)), (reason, ""))


def kind_of_reason(reason: str) -> str:
    """What reasons of one kind have in common, whatever their numbers are.

    Example:
        >>> kind_of_reason("chains drift: second half minus first half is -9 ± 2")
        'chains were still moving at their end'
        >>> kind_of_reason("losses of 0.25 are too coarse") == kind_of_reason("losses of 1e-05 are too coarse")
        True
    """
    if _is_divergence(reason):
        return "chains diverged"
    words, _ = _meaning(reason)
    return words if words != reason else re.sub(r"[\d\W]+", " ", re.sub(r"\d[\d.,]*(e[+-]?\d+)?", " ", reason))


def invalid_sentence(estimate: Estimate, reasons: Sequence[str]) -> str:
    """One estimate that is not valid, in a line of the log: the reasons as the record has them, and what helps.

    Args:
        estimate: that is not valid.
        reasons: those of its reasons that are to be told.
    """
    found = f"LLC {with_error(estimate.mean, estimate.se)} is not valid" if math.isfinite(estimate.mean) else "no LLC"
    # of chains that run downhill more draws make no estimate, whatever else is said of them
    downhill = [reason for reason in estimate.reasons if reason.startswith(NEGATIVE)]
    advice = dict.fromkeys(_meaning(reason)[1] for reason in downhill or reasons if not reason.startswith(_ADVISED))
    return " ".join([f"{_at_step(estimate)}{found}: {'; '.join(reasons)}.", *filter(None, advice)])


def outcome_of(estimates: Sequence[Estimate]) -> str:
    """How many there are of a run, how many of them are valid, and the last of these; else why the last one is not."""
    count, valid = count_of(len(estimates), "estimate"), [e for e in estimates if e.valid]
    if valid:
        last = valid[-1]
        many = ("all valid" if len(valid) > 1 else "valid") if len(valid) == len(estimates) else f"{len(valid):,} valid"
        return f"{count}, {many}; {_at_step(last)}LLC {with_error(last.mean, last.se)}"
    last = estimates[-1]
    why = "; ".join(remark.text for remark in diagnosis(last))
    return f"{count}, {'not' if len(estimates) == 1 else 'none'} valid ({_at_step(last)}{why})"


def _at_step(estimate: Estimate) -> str:
    return f"step {estimate.step}: " if estimate.step is not None else ""


def diagnostics(estimates: Sequence[Estimate]) -> list[Remark]:
    """What is to be known of the chains of a run: first each chain that diverged, then the other reasons.

    Estimates that suffer from the same come as one remark, with the advice; of more than a handful of diverged chains
    there is one remark as well.
    """
    diverged: list[Remark] = []
    reasons: dict[tuple[str, str], list[int]] = {}
    for place, estimate in enumerate(estimates):
        remarks = diagnosis(estimate)
        if bad_chains(estimate):
            diverged.append(remarks[0])
        for reason in estimate.reasons:
            if not _is_divergence(reason):
                places = reasons.setdefault(_meaning(reason), [])
                places += [place] if place not in places[-1:] else []
        if not estimate.valid and not estimate.reasons and not bad_chains(estimate):
            reasons.setdefault((remarks[0].text, ""), []).append(place)
    if len(diverged) > _EACH:
        lost = [r for r in diverged if r.level == "bad"]
        places = [place for place, e in enumerate(estimates) if bad_chains(e)]
        text = f"chains diverged at {_where(estimates, places)}; {count_of(len(lost), 'estimate')} left out"
        diverged = [Remark("bad" if lost else "note", text, tuple(step for r in diverged for step in r.steps))]
    found = [Remark(r.level, _sentence(r.text), r.steps) for r in diverged]
    for (words, advice), places in reasons.items():
        steps = tuple(step for place in places if (step := estimates[place].step) is not None)
        many = f"{count_of(len(places), 'estimate')}: " if len(places) > 1 else ""
        text = f"{_sentence(words)[:-1]} ({many}{_where(estimates, places)})."
        found.append(Remark("bad", f"{text} {advice}".strip(), steps))
    return found


def _is_divergence(reason: str) -> bool:
    return "diverged or became non-finite" in reason


def _where(estimates: Sequence[Estimate], places: Sequence[int]) -> str:
    """Steps of some estimates, neighbours as a range."""
    ranges: list[list[int]] = []
    for place in places:
        if ranges and place == ranges[-1][1] + 1:
            ranges[-1][1] = place
        else:
            ranges.append([place, place])

    def step(place: int) -> str:
        known = estimates[place].step
        return f"{known:,}" if known is not None else f"number {place}"

    texts = [step(a) if a == b else f"{step(a)} to {step(b)}" for a, b in ranges]
    if len(texts) > _EACH + 1:
        texts = [*texts[:_EACH], f"{len(texts) - _EACH} more stretches"]
    single = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    return f"step{'' if single else 's'} {listed(texts)}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


def diagnostics_sentence(estimates: Sequence[Estimate]) -> str:
    """How the chains did over all."""
    valid = [e for e in estimates if e.valid]
    bad = sum(e.num_bad_chains for e in estimates)
    total = sum(e.num_chains for e in estimates)
    text = f"{len(valid):,} of {count_of(len(estimates), 'estimate')} {'is' if len(estimates) == 1 else 'are'} valid"
    text += f"; {bad:,} of {total:,} chains were left out" if bad else "; no chain was left out"
    worst = max((e.rhat for e in valid if math.isfinite(e.rhat)), default=math.nan)
    least = min((e.ess for e in valid if math.isfinite(e.ess)), default=math.nan)
    if math.isfinite(worst):
        text += f"; among the valid ones R-hat is at most {worst:.2f}"
    if math.isfinite(least):
        text += f" and the chains are worth at least {least:.0f} independent draws"
    return text + "."


def verdict_sentence(estimate: Estimate) -> str:
    """One estimate, and whether it may be read."""
    text = f"{_at(estimate)}: LLC {with_error(estimate.mean, estimate.se)}, loss {number(estimate.init_loss)}"
    remarks = diagnosis(estimate)
    if estimate.valid:
        note = f"; {remarks[0].text}" if remarks else ""
        return f"{text}. Valid: R-hat {number(estimate.rhat)}, worth {number(estimate.ess)} independent draws{note}."
    return f"{text}. Not valid: {'; '.join(r.text for r in remarks)}."


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
    return (
        f"Of {count_of(count, 'training sample')} looked at, the likeliest wrong labels or outliers are "
        f"number{'s' if len(named) > 1 else ''} {listed(named)}, by their mean loss over the posterior."
    )


def pairs_sentence(influence: InfluenceEstimate) -> str:
    """How far single pairs may be read."""
    if not math.isfinite(influence.passing):
        return "Single pairs were not kept at this firing."
    return (
        f"{influence.passing:.1%} of the single pairs are further than 3 standard errors from zero; by chance alone "
        f"{influence.chance:.1%} would be."
    )


def seconds_of(run: Run) -> float:
    """What measuring took in this run, all its monitors together; NaN where no record says."""
    spent = [e.seconds for monitor in run.monitors for e in monitor.estimates if math.isfinite(e.seconds)]
    return sum(spent) if spent else math.nan


def cost_of(run: Run) -> str:
    """What measuring took, all the monitors of the run together."""
    seconds = seconds_of(run)
    if not math.isfinite(seconds):
        return ""
    text = f"Measuring took {duration(seconds)} in all"
    # each counts its own firings alone, against the same clock
    newest = [[e.overhead for e in m.estimates if math.isfinite(e.overhead)][-1:] for m in run.monitors]
    if any(newest):
        share = min(sum(each[0] for each in newest if each), 1.0)
        text += f", {share:.0%} of the run's wall-clock" if share >= 0.01 else f", {share:.1%} of the run's wall-clock"
    return text + "; training itself was left as it was."


def duration(seconds: float) -> str:
    """A time for a person.

    Example:
        >>> duration(0.034), duration(7.26), duration(340.0), duration(7500.0)
        ('0.034 s', '7.3 s', '5 min 40 s', '2 h 5 min')
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
