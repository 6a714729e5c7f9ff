"""What is to be known of estimates, above all why they are not valid, in plain words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional

from lightning_slt.publish.meanings import OF_FOUND_STEP, OF_GIVEN_STEP, OF_STEP, meaning_of
from lightning_slt.publish.phrases import count_of, listed, number, with_error
from lightning_slt.reasons import DOWNHILL, NEGATIVE, NOT_ARRIVED
from lightning_slt.record import Estimate

Level = Literal["good", "note", "bad"]

_EACH = 5
"""Diverged firings that are told one by one, and stretches of steps that a sentence names."""

_BESIDE = "Usual early in training, while the learning rate is large, under weight decay and under dropout."


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


def at_step(estimate: Estimate) -> str:
    return f"At step {estimate.step:,}" if estimate.step is not None else "There"


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
    if estimate.valid and estimate.beside_minimum:
        higher = f"at which the LLC is about {number(estimate.slope, 2)} higher"
        remarks.append(Remark("note", f"the weights were beside a minimum, {higher}", steps))
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
    meaning = meaning_of(reason)
    words = meaning.words
    if meaning.advises:  # what follows is advice; the number is in brackets before it
        found = re.search(r"\(([^)]*)\)", reason)
        return f"{words} ({found[1]})" if found else words
    if words == reason or reason.startswith((NEGATIVE, DOWNHILL)) or ": " not in reason:
        return words
    return f"{words} ({reason.split(': ', 1)[1]})"


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
    words = meaning_of(reason).words
    return words if words != reason else re.sub(r"[\d\W]+", " ", re.sub(r"\d[\d.,]*(e[+-]?\d+)?", " ", reason))


def kinds_of(estimate: Estimate) -> tuple[str, ...]:
    """The kind of each of its reasons, whatever it is worded like; by the wording where no kind is known."""
    if len(estimate.kinds) == len(estimate.reasons):
        return estimate.kinds
    return tuple(kind_of_reason(reason) for reason in estimate.reasons)


def invalid_sentence(estimate: Estimate, reasons: Sequence[str], step_given: Optional[bool] = None) -> str:
    """One estimate that is not valid, in a line of the log: the reasons as the record has them, and what helps.

    Args:
        estimate: that is not valid.
        reasons: those of its reasons that are to be told.
        step_given: whether ``lr`` or ``num_burnin_steps`` was; None where that is not known.
    """
    found = f"LLC {with_error(estimate.mean, estimate.se)} is not valid" if math.isfinite(estimate.mean) else "no LLC"
    decisive = [reason for reason in estimate.reasons if meaning_of(reason).decides]
    first = [reason for reason in decisive if meaning_of(reason).is_first]
    advice = dict.fromkeys(
        _advice(reason, [estimate], step_given)
        for reason in first or decisive or reasons
        if not meaning_of(reason).advises or (_is_short(estimate) and _asks_for_draws(reason))
    )
    return " ".join([f"{_labelled(estimate)}{found}: {'; '.join(reasons)}.", *filter(None, advice)])


def _advice(reason: str, estimates: Sequence[Estimate], step_given: Optional[bool]) -> str:
    """What can be done about a reason that these estimates have."""
    advice = meaning_of(reason).advice
    if advice == OF_STEP and step_given is not None:
        return OF_GIVEN_STEP if step_given else OF_FOUND_STEP
    short = sum(map(_is_short, estimates))
    if not short or not meaning_of(reason).wants_draws:
        return advice
    some = "" if short == len(estimates) else "some "
    of_budget = f"max_overhead keeps {some}firings short: a larger one gives them more draws, num_draws does not."
    return f"{advice} {of_budget}" if some else of_budget


def _is_short(estimate: Estimate) -> bool:
    """Whether a budget made the firing smaller than what was asked for."""
    return estimate.firing_size < 1.0


def _asks_for_draws(reason: str) -> bool:
    return reason.startswith(NOT_ARRIVED) and "more draws" in reason


def beside_sentence(estimate: Estimate) -> str:
    """One valid estimate of weights that are at no minimum, in a line of the log."""
    found = f"LLC {with_error(estimate.mean, estimate.se)}"
    higher = f"at which it would be about {number(estimate.slope, 2)} higher"
    return f"{_labelled(estimate)}{found} is of weights beside a minimum, {higher}. {_BESIDE}"


def outcome_of(estimates: Sequence[Estimate]) -> str:
    """How many there are of a run, how many of them are valid, and the last of these; else why the last one is not."""
    count, valid = count_of(len(estimates), "estimate"), [e for e in estimates if e.valid]
    if valid:
        last = valid[-1]
        many = ("all valid" if len(valid) > 1 else "valid") if len(valid) == len(estimates) else f"{len(valid):,} valid"
        return f"{count}, {many}; {_labelled(last)}LLC {with_error(last.mean, last.se)}"
    last = estimates[-1]
    why = "; ".join(remark.text for remark in diagnosis(last))
    return f"{count}, {'not' if len(estimates) == 1 else 'none'} valid ({_labelled(last)}{why})"


def _labelled(estimate: Estimate) -> str:
    return f"step {estimate.step}: " if estimate.step is not None else ""


def diagnostics(estimates: Sequence[Estimate], step_given: Optional[bool] = None) -> list[Remark]:
    """What is to be known of the chains of a run: first each chain that diverged, then the other reasons.

    Estimates that suffer from the same come as one remark, with the advice; of more than a handful of diverged chains
    there is one remark as well.

    Args:
        estimates: of the run.
        step_given: whether ``lr`` or ``num_burnin_steps`` was; None where that is not known.
    """
    diverged: list[Remark] = []
    reasons: dict[tuple[str, str], list[int]] = {}
    wordings: dict[tuple[str, str], str] = {}
    for place, estimate in enumerate(estimates):
        remarks = diagnosis(estimate)
        if bad_chains(estimate):
            diverged.append(remarks[0])
        for reason in estimate.reasons:
            if not _is_divergence(reason):
                meaning = meaning_of(reason)
                known = meaning.words, meaning.advice
                places = reasons.setdefault(known, [])
                wordings.setdefault(known, reason)
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
        first = wordings.get((words, advice), "")
        if not meaning_of(first).decides and all(_is_decided(estimates[place]) for place in places):
            advice = ""
        elif advice:
            advice = _advice(first, [estimates[place] for place in places], step_given)
        found.append(Remark("bad", f"{text} {advice}".strip(), steps))
    return [*found, *_beside_minima(estimates)]


def _beside_minima(estimates: Sequence[Estimate]) -> list[Remark]:
    """Of the valid ones whose weights are at no minimum, together."""
    places = [place for place, e in enumerate(estimates) if e.valid and e.beside_minimum]
    if not places:
        return []
    steps = tuple(step for place in places if (step := estimates[place].step) is not None)
    most = number(max(estimates[place].slope for place in places), 2)
    many = f"{count_of(len(places), 'estimate')}: " if len(places) > 1 else ""
    higher = f"by about {most}{' at the most' if len(places) > 1 else ''}"
    text = (
        f"The weights were beside a minimum ({many}{_where(estimates, places)}), at which the LLC is higher: {higher}."
    )
    return [Remark("note", f"{text} {_BESIDE}", steps)]


def _is_decided(estimate: Estimate) -> bool:
    return any(meaning_of(reason).decides for reason in estimate.reasons)


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
    are = "is" if 1 in (len(valid), len(estimates)) else "are"
    text = f"{len(valid):,} of {count_of(len(estimates), 'estimate')} {are} valid"
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
    text = f"{at_step(estimate)}: LLC {with_error(estimate.mean, estimate.se)}, loss {number(estimate.init_loss)}"
    remarks = diagnosis(estimate)
    if estimate.valid:
        note = "".join(f"; {remark.text}" for remark in remarks)
        return f"{text}. Valid: R-hat {number(estimate.rhat)}, worth {number(estimate.ess)} independent draws{note}."
    return f"{text}. Not valid: {'; '.join(r.text for r in remarks)}."
