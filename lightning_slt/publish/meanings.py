"""What the reasons of estimates mean in plain words, what can be done, and how the two go together: a row for each."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_slt.reasons import (
    DOWNHILL,
    DRIFTING,
    LARGE_INPUTS,
    LOSS_TOO_LARGE,
    NBETA_TOO_LARGE,
    NEGATIVE,
    NONE_STAYED,
    NOT_ACCEPTED,
    NOT_ARRIVED,
    NOT_IN_NATS,
    NOT_MIXED,
    TOO_WIDE,
)

OF_STEP = (
    "Where lr or num_burnin_steps is given, leave both to calibration, or give a smaller lr; where neither is, an "
    "LLC near zero is usual early in training, and at any other a smaller lr helps."
)
"""Of a step that is too large, where it is not known whether one was given."""
OF_GIVEN_STEP = "Leave both lr and num_burnin_steps to calibration, or give a smaller lr."
# calibration holds the heat against the scatter of the chains, where that is more than the LLC
OF_FOUND_STEP = "An LLC near zero is usual early in training, and at any other a smaller lr helps."
_USUAL = "Usual early in training, at a saddle, while the learning rate is large, and under strong weight decay."


@dataclass(frozen=True)
class Meaning:
    """What a reason of an estimate means.

    Attributes:
        start: how its sentence begins; the sentence itself of one that is not known.
        words: the same plainly.
        advice: what can be done.
        advises: the sentence says that itself.
        wants_draws: more of them are advised, which a budget may not allow.
        decides: beside it no advice of others is given: chains that run downhill, or stand still, need no more draws.
        is_first: nor that of others that decide.
    """

    start: str
    words: str
    advice: str = ""
    advises: bool = False
    wants_draws: bool = False
    decides: bool = False
    is_first: bool = False


_MEANINGS: tuple[Meaning, ...] = (
    Meaning(NEGATIVE, "chains ran downhill: the weights were at no minimum", _USUAL, decides=True),
    Meaning(DOWNHILL, "chains ran downhill: the weights were at no minimum", _USUAL, decides=True),
    Meaning(
        NOT_IN_NATS,
        "the loss may not have been in nats",
        "A squared error is once it is divided by twice the variance of the noise in the targets; on another scale "
        "chains may run downhill wherever training ends.",
        advises=True,
        decides=True,
        is_first=True,
    ),
    Meaning(
        NOT_ACCEPTED,
        "hardly a step of the chains was accepted",
        "A smaller lr helps; without one calibration finds it.",
        advises=True,
        decides=True,
    ),
    Meaning(
        DRIFTING,
        "chains were still moving at their end",
        "More draws (num_draws) give them time.",
        wants_draws=True,
    ),
    Meaning(
        NOT_MIXED,
        "chains disagree with each other",
        "More draws (num_draws) or chains (num_chains) help.",
        wants_draws=True,
    ),
    Meaning(
        NOT_ARRIVED,
        "chains had not spread to their full width",
        "More draws (num_draws) help; leave num_burnin_steps to calibration.",
        advises=True,
        wants_draws=True,
    ),
    Meaning(
        NBETA_TOO_LARGE,
        "nbeta was too large for the minibatches, and chains had not spread to their full width",
        "A smaller nbeta helps, or a larger batch_size; left None it is n / log n.",
        advises=True,
        decides=True,
    ),
    Meaning(
        LOSS_TOO_LARGE,
        "the loss may have been too large for the minibatches, and chains had not spread to their full width",
        "Where it is not in nats, divide it (a squared error by 2 sigma², sigma the scale of the noise in the "
        "targets); where it is, a larger batch_size helps, or more draws.",
        advises=True,
    ),
    Meaning(
        LARGE_INPUTS,
        "the inputs of a layer were large, and chains had not spread to their full width",
        "The loss is far steeper along that layer's weights than along others. Standardised inputs help, in another "
        "training; for these weights sampler=RMSpropSGLD() comes closer.",
        advises=True,
        decides=True,
    ),
    Meaning(
        TOO_WIDE,
        "chains had been thrown wide and not come back",
        "A larger batch_size makes their steps less noisy.",
        advises=True,
    ),
    Meaning("step size", "the chains' step size did not suit the weights", OF_STEP),
    Meaning(
        NONE_STAYED,
        "every chain left the posterior",
        "A smaller lr, a larger batch_size or a smaller nbeta keeps them in it.",
    ),
    Meaning(
        "no chain",
        "every chain left the finite numbers",
        "A smaller step or a larger localization holds them.",
    ),
)


def meaning_of(reason: str) -> Meaning:
    """By how it begins; of one that is not known its own words, and no advice.

    Example:
        >>> meaning_of("chains drift: second half minus first half is -9 ± 2").words
        'chains were still moving at their end'
    """
    known = (meaning for meaning in _MEANINGS if reason.startswith(meaning.start))
    return next(known, Meaning(reason, reason))
