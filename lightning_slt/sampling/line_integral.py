"""Whether the loss rises as its gradient says: where it does not, chains follow another loss than the one they report.

The gradient of ``detach()``, of rounding and of ``int()`` is not that of the loss (the signs that
``parametrizations.orthogonal`` keeps on the diagonal of a Householder weight are read with ``int()``: chains that move
them set columns to zero, and feel nothing). Along the line from ``w*`` to where a chain is, the loss must rise by the
integral of its slope.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lightning_slt.functional.convergence import standard_error
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.segment import Segment

STEEP = 1.5
"""Loss in units of half the work of the gradient, 1 on a square and 2 on a kink, from which on the lines are looked at:
on a plateau it is more as well."""
LINES, FIRST, POINTS = 4, 8, 40
"""Chains of a rank whose lines are looked at; the parts of a line at first; points on it in the end."""
UNSEEN = 0.5
"""Share of the rise of the loss that the integral may lack; by its own error it is off by less than a tenth on a narrow
minimum with a plateau around it."""


def misfit_of_gradient(chains: Chains, segment: Segment, good: Tensor) -> tuple[str, ...]:
    """Why chains do not sample the posterior of their loss; empty where they do, as far as is known.

    To be called on all ranks at once, when the chains have ended: their memory is used.

    Args:
        chains: where the draws have ended.
        segment: the draws.
        good: ``[chains]`` bool, which of them count.
    """
    if not bool(good.any()) or chains.layout.sharded:
        return ()
    level, work = float(segment.difference[good].mean()), float(segment.grad_dot[good].mean())
    if not level - 3 * standard_error(segment.difference[good]) > STEEP * max(work / 2, 0.0):
        return ()
    told = chains.collective.exchange(lambda: _of_rank(chains, segment, good))
    rise, seen = (sum(values) for values in zip(*told, strict=True))
    if not rise > 0 or abs(rise - seen) <= UNSEEN * rise:
        return ()
    return (
        f"the loss rises from w* to the chains by {rise:.2g}, and its gradient says {seen:.2g}: it is not that of the "
        "loss (int(), round() or detach() in the module, parametrizations.orthogonal with orthogonal_map='householder')"
        ". Leave such weights out with restrict, or give a loss_fn(module, batch) whose gradient is its own",
    )


def _of_rank(chains: Chains, segment: Segment, good: Tensor) -> tuple[float, float]:
    """The rise of the loss over lines of this rank's chains, and the integral of its slope, both summed."""
    fine = {number for number, is_good in zip(segment.chains, good.tolist(), strict=True) if is_good}
    rows = [k for k, number in enumerate(chains.numbers) if number in fine]
    rows = rows[: max(min(LINES, len(chains.numbers) - 1), 1)]  # the memory of the last chain is needed
    rise = seen = 0.0
    with preserve_rng(chains.seed), chains.objective.active():
        for row in rows:
            with chains.line(row) as look:
                more, of_it = _along(look)
            rise, seen = rise + more, seen + of_it
    return rise, seen


def _along(look: Callable[[float], tuple[float, float]]) -> tuple[float, float]:
    """The rise of the loss along a line, and the integral of its slope by the trapezoid rule, whose worst part is
    halved as long as there are points left."""
    at = {k / FIRST: look(k / FIRST) for k in range(FIRST + 1)}
    while True:
        ends = sorted(at)
        parts = [(b - a) * (at[a][1] + at[b][1]) / 2 for a, b in pairwise(ends)]
        rises = [at[b][0] - at[a][0] for a, b in pairwise(ends)]
        if len(at) >= POINTS:
            return sum(rises), sum(parts)
        worst = int(torch.tensor([abs(r - p) for r, p in zip(rises, parts, strict=True)]).nan_to_num().argmax())
        middle = (ends[worst] + ends[worst + 1]) / 2
        at[middle] = look(middle)
