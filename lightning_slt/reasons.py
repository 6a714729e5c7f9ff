"""Reasons why an estimate is not valid, as data: of what kind, and the sentence that says it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

NOT_MIXED, DRIFTING, NEGATIVE = "chains have not mixed", "chains drift", "negative beyond its error"
DOWNHILL = "the chains find lower losses"
NOT_ARRIVED = "the chains have not reached their width"
NBETA_TOO_LARGE = "nbeta is too large for the minibatches"
LOSS_TOO_LARGE = "the loss may be too large for the minibatches"
LARGE_INPUTS = "the inputs of a layer are large"
TOO_WIDE = "the chains are wider than the posterior"
NOT_IN_NATS = "the loss may not be in nats"
NONE_STAYED = "every chain diverged"
NOT_ACCEPTED = "hardly any step was accepted"
UNSETTLED = (NOT_MIXED, DRIFTING, NEGATIVE, DOWNHILL, NOT_IN_NATS, NOT_ARRIVED)
"""How the reasons begin that are a state of the weights: away from a minimum chains have nowhere to settle. For
sentences that were read back from a file, which may have no kind."""


class Kind(Enum):
    """What is wrong. Records have the names: they stay as they are."""

    NO_CHAIN = auto()
    """None is left: chains diverged or became non-finite."""
    DIVERGED = auto()
    """Too many chains were left out."""
    TOO_FEW_DRAWS = auto()
    """Not enough of them for an error, or to show mixing."""
    NOT_MIXED = auto()
    DRIFTING = auto()
    NEGATIVE = auto()
    """Chains run downhill."""
    NOT_IN_NATS = auto()
    """They do, and the loss is larger than most log-likelihoods."""
    HEAT_OF_STEP = auto()
    """Too much of the estimate was heat of the step."""
    HEAT_OF_MINIBATCHES = auto()
    """The same of the minibatches, in chains with momenta."""
    STEP_TOO_LARGE = auto()
    """By the rule for SGLD, of a sampler that the step itself does not heat at first order."""
    NOT_ACCEPTED = auto()
    """The chains stand still: of a sampler that accepts or rejects a step, for one that is too large."""
    NOT_ARRIVED = auto()
    """The virial ratio is below what it is at stationarity."""
    TOO_WIDE = auto()
    """It is above."""
    TOO_COARSE = auto()
    """The losses are rounded too much."""
    WEIGHTS_TOO_COARSE = auto()
    """The weights are: their last digit is not small beside a step."""
    NOT_FINITE = auto()
    """Some minibatches have no finite loss at the weights under study."""
    EVAL_MODE = auto()
    """Some weights reach the loss in training mode alone."""
    SUM = auto()
    """The loss is summed over the minibatch, and nbeta is that of a mean."""
    GRADIENT = auto()
    """It is not that of the loss."""
    OSCILLATES = auto()
    """The loss goes up and down too often for what a step adds to be taken off."""


@dataclass(frozen=True)
class Reason:
    """One reason why an estimate is not valid.

    Attributes:
        kind: to select by.
        sentence: to read; what is written to records.
    """

    kind: Kind
    sentence: str


def sentences(reasons: tuple[Reason, ...]) -> tuple[str, ...]:
    """The reasons as records have them.

    Example:
        >>> sentences((Reason(Kind.NO_CHAIN, "no chain stayed finite"),))
        ('no chain stayed finite',)
    """
    return tuple(reason.sentence for reason in reasons)
