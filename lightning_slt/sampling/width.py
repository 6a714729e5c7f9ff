"""Whether chains have the width of the posterior, and what lets them where not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Optional

from torch import Tensor

from lightning_slt.functional.learning_coefficient import Summary
from lightning_slt.functional.posterior import default_nbeta
from lightning_slt.reasons import (
    LARGE_INPUTS,
    LOSS_TOO_LARGE,
    NBETA_TOO_LARGE,
    NOT_ARRIVED,
    TOO_WIDE,
    Kind,
    Reason,
)
from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.cooling import LARGE_LOSS, WithoutHeat
from lightning_slt.sampling.input_scale import LargeInput, largest_input

MIN_VIRIAL = 0.7
"""Virial ratio below which chains that have used their budget have not reached their width: the number is not valid.
Between the two lie singular models, whose free directions take longest and matter least."""
MAX_VIRIAL = 1.4
"""Virial ratio above which, beyond its error, chains are wider than the posterior: minibatches or a step of the search
have thrown them there, and the step that is right since is too small to bring them back."""
LARGE_IN_NATS = 30.0
"""A loss from which on it is asked whether it is in nats: a cross-entropy is below the logarithm of the number of
classes, 12 of the largest vocabularies, before training already. A likelihood of whole pictures may be above."""
LITTLE_HEAT = 0.02
"""Share of the LLC that is heat of the step, below which a step that was given keeps chains from their width: a larger
one would do. Half or a quarter of what a step that is found has."""


def reasons_of_width(
    ratios: Tensor, cooled: WithoutHeat, summary: Summary, drawn: Drawn, chains: Chains, explained: bool
) -> Iterator[Reason]:
    """Reasons why the chains' width is not that of the posterior.

    Args:
        ratios: ``[chains kept]``, the virial ratio of each.
        cooled: the trace without heat.
        summary: of that.
        drawn: the draws.
        chains: that they are of.
        explained: why is said elsewhere, and more draws do not help.
    """
    if any(reason.kind is Kind.NEGATIVE for reason in summary.verdict):
        return
    virial = float(ratios.mean())
    error = float(ratios.std()) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    at = f"(virial ratio {round(virial, 2) + 0.0:.2f})"  # no minus before a zero
    if virial < MIN_VIRIAL:
        said = f"{NOT_ARRIVED} in {drawn.num_burnin_steps + drawn.segment.steps} steps {at}"
        yield Reason(Kind.NOT_ARRIVED, said if explained else _with_remedy(said, cooled, drawn, chains))
    elif virial > MAX_VIRIAL and virial - 1.0 > error:
        said = f"{TOO_WIDE} {at}"
        yield Reason(Kind.TOO_WIDE, said if explained else f"{said}: a larger batch_size, or more draws")


def _with_remedy(said: str, cooled: WithoutHeat, drawn: Drawn, chains: Chains) -> str:
    """What is said of chains that have not reached their width, and what lets them.

    A step that was given is small because it was given: where it has little heat a larger one would do.

    The noise of minibatches grows with the square of nbeta, the force of the loss with nbeta: above n it is nbeta that
    keeps the step small. So it is with a loss on a large scale, such as the squared error of targets in thousands: c
    times a negative log-likelihood is one at c times ``nbeta``.

    Where the inputs of a layer are large, the loss is far steeper along its weights than along all others, and its
    scale cannot be told by the noise.
    """
    n, nbeta, batch = chains.source.num_samples, chains.posterior.nbeta, "a larger batch_size"
    given = chains.sampler.lr is not None and chains.sampler.calibration == "heat"
    if given and not cooled.heat >= LITTLE_HEAT:
        return f"{said}: a larger lr, or none given, to have it found"
    noisy = cooled.noisy and not given
    if noisy and n is not None and nbeta > n >= 2:
        usual = f"{nbeta:.3g}; n / log n is {default_nbeta(n):.3g}"
        return f"{NBETA_TOO_LARGE} ({usual}), {said}: a smaller nbeta, or {batch}"
    large = _large_input(chains)
    if noisy and cooled.scale > LARGE_LOSS and (large is None or drawn.segment.anchor_loss > LARGE_IN_NATS):
        nats = "a squared error is when divided by 2 sigma² (sigma is the scale of the noise in the targets)"
        return f"{LOSS_TOO_LARGE}: {said}. It should be in nats, which {nats}; where it is, {batch} or more draws help"
    if large is not None:
        at = f"root mean square up to {large.size:,.0f} in {large.layer!r}"
        closer = "" if chains.sampler.preconditioned else "; for these weights sampler=RMSpropSGLD() comes closer"
        return f"{LARGE_INPUTS} ({at}), {said}: standardised inputs help, in another training{closer}"
    more = f", {batch} (the minibatches' noise keeps the step small)" if noisy else ""
    return f"{said}: more draws{more}; a stronger localization settles sooner, but measures another number"


def _large_input(chains: Chains) -> Optional[LargeInput]:
    """Of what the ranks see, on the minibatches that they hold, the largest."""
    told = chains.collective.exchange(lambda: largest_input(chains.objective, chains.window[0]))
    return max((found for found in told if found is not None), key=lambda found: found.size, default=None)
