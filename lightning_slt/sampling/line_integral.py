"""Whether the loss rises as its gradient says: where it does not, chains follow another loss than the one they report.

The gradient of ``detach()``, of rounding, of ``int()`` and of a choice (``topk()``) is not that of the loss (the signs
that ``parametrizations.orthogonal`` keeps on the diagonal of a Householder weight are read with ``int()``: chains that
move them set columns to zero, and feel nothing), nor is one that an autograd.Function scales or reverses. Along the
line from ``w*`` to where a chain is, the loss must rise by the integral of its slope.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_slt.functional.convergence import standard_error
from lightning_slt.sampling.budget import Drawn
from lightning_slt.sampling.chains import Chains
from lightning_slt.sampling.paths import multiplies_in_tensor_float
from lightning_slt.sampling.rng import preserve_rng
from lightning_slt.sampling.step_call import LOW_PRECISION

Looks = dict[float, tuple[float, float]]
"""The loss and its slope along a line, by share of the way."""


@dataclass(frozen=True)
class Line:
    """What was seen along a line.

    Args:
        parts: of each of the first parts, in their order: the rise of the loss, and the integral of its slope.
        rounding: by how much rounding alone sets the two apart on a part; None where that is told by the parts.
    """

    parts: Sequence[tuple[float, float]]
    rounding: Optional[float] = None


class Looked(NamedTuple):
    """What a look along lines from ``w*`` to the chains told.

    Args:
        misfit: why chains do not sample the posterior of their loss; empty where they do, as far as is known.
        oscillates: their gradient is its own, and it goes up and down so often that :data:`CLOSEST` looks were needed.
    """

    misfit: tuple[str, ...] = ()
    oscillates: bool = False


STEEP = 1.5
"""Loss in units of half the work of the gradient, 1 on a square and 2 on a kink, from which on the lines are looked at
closely: on a plateau it is more as well."""
FIRST = 8
"""Parts of a line at first."""
CLOSER = ((2, FIRST), (2, 2 * FIRST), (4, 5 * FIRST))
"""Chains of a rank whose lines are looked at and the parts of each: more closely as long as something seems wrong."""
CLOSEST = (10 * FIRST, 20 * FIRST)
"""Parts of the last of these lines, as long as what is missed becomes less. With sine activations (SIREN) the loss goes
up and down so often that 40 parts miss up to 0.7 of its rises and falls, 80 up to 0.2 and 160 less than 0.06."""
STAYS = 0.9
"""Share of what was missed that is missed with twice the parts where these show nothing more: jumps and wrong gradients
are missed by any number of parts (0.97 to 1.03; 0.8 to 1.1 with sine activations besides, which are looked at once
more), and of what the trapezoid rule misses a quarter to four fifths are gone. Most of what is found costs less than a
third more so."""
DEAREST = 0.05
"""What the first look may cost, as a share of the steps of the draws: smaller firings go without. Of the steps of a
warm firing, which are few, it would be more (16 % of the time on a transformer)."""
UNSEEN = 0.5
"""Share of the rise of the loss that the integral may lack; by its own error it is off by less than a tenth on a narrow
minimum with a plateau around it."""
APART = 0.1
"""Share of the rises and falls of the loss by which the integrals over the parts may differ from them. By the trapezoid
rule on the first parts they do by 0.04 on ``w1^4 w2^2``, 0.07 on ``w^8``, 0.08 on a deep linear network and 0.14 on a
transformer; by a third where half of the weights have twice or half their gradient."""
NOISE = 2.0
"""What they may differ by besides, in units of what rounding makes them (half the rise on small models in bfloat16)."""
NEAR = 1 / 512
"""Share of a line between two points at which the loss is rounded otherwise and has made hardly any jump: the nearest
code of a quantiser or the expert of a sample jump without rule along a line, as rounding does. Weights and products of
8 or 11 bits are mostly rounded alike at both."""
NARROWEST = 2.0**-24
"""Part of a line that is not halved: in float32 its ends are hardly two points. Of a jump the half that holds it stays
the worst part for ever."""
MEDIAN_OF_NORMAL = 0.6745
"""Of the size of a standard normal number."""


def look_along_lines(chains: Chains, drawn: Drawn, good: Tensor) -> Looked:
    """Whether the loss rises as its gradient says, and how smoothly.

    To be called on all ranks at once, when the chains have ended: their memory is used, and put back where the next
    firing may go on from it.

    Args:
        chains: where the draws have ended.
        drawn: the draws.
        good: ``[chains]`` bool, which of them count.
    """
    if not bool(good.any()) or chains.layout.sharded:
        return Looked()
    segment = drawn.segment
    known: dict[int, Looks] = {}  # a closer look goes on from the one before

    def along(lines: int, parts: int) -> list[Line]:
        told = chains.collective.exchange(lambda: _of_rank(chains, drawn, good, lines, parts, known))
        return [line for of_rank in told for line in of_rank]

    level, work = float(segment.difference[good].mean()), float(segment.grad_dot[good].mean())
    slow = level - 3 * standard_error(segment.difference[good]) > STEEP * max(work / 2, 0.0)
    fresh = not drawn.warm and DEAREST * segment.difference.numel() >= CLOSER[0][0] * (FIRST + 1)
    if not (slow or fresh):
        return Looked()

    def seems_wrong(looks: Sequence[Line]) -> bool:
        rise, seen = _in_all(looks)
        lacking = slow and rise > 0 and abs(rise - seen) > UNSEEN * rise
        return lacking or (fresh and _are_apart(looks))

    for lines, parts in CLOSER:
        looks = along(lines, parts)
        if not seems_wrong(looks):
            return Looked()
    missed = _missed(looks)
    for parts in CLOSEST:
        before, looks = missed, along(lines, parts)
        if not seems_wrong(looks):
            return Looked(oscillates=True)
        missed = _missed(looks)
        if missed > STAYS * before:
            break
    rise, seen = _in_all(looks)
    cancels = abs(rise - seen) < missed * abs(rise)
    between = f" ({missed:.0%} of the ups and downs on the way are missed)" if cancels else ""
    said = (
        f"the loss changes from w* to the chains by {rise:.2g}, and its gradient says {seen:.2g}{between}: it is not "
        "that of the loss (int(), round(), detach(), argmax() or topk() as in routing, samples drawn by these weights "
        "as in REINFORCE, an autograd.Function in the module, parametrizations.orthogonal with "
        "orthogonal_map='householder'). Leave such weights out with restrict, "
        "or give a loss_fn(module, batch) whose gradient is its own"
    )
    return Looked((said,))


def _in_all(lines: Sequence[Line]) -> tuple[float, float]:
    """The rise of the loss along all lines, and the integral of its slope."""
    rise, seen = (sum(part[k] for line in lines for part in line.parts) for k in range(2))
    return rise, seen


def _missed(lines: Sequence[Line]) -> float:
    """By how much rises and integrals differ on the way, as a share of the rises and falls."""
    ways = [part for line in lines for part in line.parts]
    return sum(abs(rise - seen) for rise, seen in ways) / max(sum(abs(rise) for rise, _ in ways), 1e-300)


def _are_apart(lines: Sequence[Line]) -> bool:
    """Whether rises and integrals differ by more than the trapezoid rule and rounding make them.

    Of rounding alone the difference of a part is ``e' - e``, with e that of a loss; its third difference, of which a
    smooth loss has hardly any, has 35 times the variance. Jumps have as much: only where points that are near each
    other cannot tell the two apart.
    """
    parts = torch.tensor([line.parts for line in lines], dtype=torch.float64, device="cpu")
    if not parts.numel():
        return False
    apart = parts[..., 0] - parts[..., 1]
    told = [line.rounding for line in lines]
    by_parts = apart.diff(n=3, dim=1).square().mean(1) / 35.0
    square = [float(own) if of is None else of**2 for own, of in zip(by_parts, told, strict=True)]
    rounding = apart.numel() * math.sqrt(sum(square) / len(square))
    return bool(apart.abs().sum() > APART * parts[..., 0].abs().sum() + NOISE * rounding)


def _of_rank(chains: Chains, drawn: Drawn, good: Tensor, lines: int, parts: int, known: dict[int, Looks]) -> list[Line]:
    """Lines to this many of this rank's chains, each in so many parts.

    Args:
        known: by row, what was seen along the lines so far, and is not looked at again.
    """
    fine = {number for number, is_good in zip(drawn.segment.chains, good.tolist(), strict=True) if is_good}
    rows = [k for k, number in enumerate(chains.numbers) if number in fine]
    rows = rows[: max(min(lines, len(chains.numbers) - 1), 1)]  # the memory of the last chain is needed
    found: list[Line] = []
    objective = chains.objective
    tensor_float = objective.dtype == torch.float32 and multiplies_in_tensor_float(objective.device, objective.module)
    with preserve_rng(chains.seed), objective.active():
        for row in rows:
            with chains.line(row, put_back=drawn.repeats) as look:
                found.append(_along(look, parts, None if tensor_float else objective.dtype, known.setdefault(row, {})))
    return found


class _Halves(TorchDispatchMode):
    """Whether anything is computed in half precision, under an autocast of the loss too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        several = made if isinstance(made, (tuple, list)) else (made,)
        self.seen = self.seen or any(isinstance(x, Tensor) and x.dtype in LOW_PRECISION for x in several)
        return made


def _along(
    look: Callable[[float], tuple[float, float]], parts: int, dtype: Optional[torch.dtype], known: Looks
) -> Line:
    """The slope along a line is integrated by the trapezoid rule; the worst part is halved until there are so many.

    Args:
        dtype: in which all is computed that is not in half precision; None where that is not known.
        known: what was seen along this line with fewer parts, by share of the way; what is seen is added.
    """
    with _Halves() as halves:  # looked at each time, for the dtypes
        known[0.0] = look(0.0)

    def seen_at(share: float) -> tuple[float, float]:
        if share not in known:
            known[share] = look(share)
        return known[share]

    at = {k / FIRST: seen_at(k / FIRST) for k in range(FIRST + 1)}

    def apart(ends: tuple[float, float]) -> float:
        rise, seen = _of_part(at, *ends)
        return abs(rise - seen) if math.isfinite(rise - seen) else 0.0

    while len(at) <= parts and (wide := [ends for ends in pairwise(sorted(at)) if ends[1] - ends[0] > NARROWEST]):
        start, end = max(wide, key=apart)
        middle = (start + end) / 2
        at[middle] = seen_at(middle)
    found = [_between(at, k / FIRST, (k + 1) / FIRST) for k in range(FIRST)]
    if dtype is None or halves.seen:
        return Line(found)
    if sum(abs(rise - seen) for rise, seen in found) <= APART * sum(abs(rise) for rise, _ in found):
        return Line(found, 0.0)
    return Line(found, max(_rounding(seen_at, at), torch.finfo(dtype).eps * abs(at[0.0][0])))


def _rounding(look: Callable[[float], tuple[float, float]], at: Looks) -> float:
    """What rounding alone sets the rise and the integral apart by: between points that are near each other.

    From their median, which the few that have a jump between them do not move.
    """
    differences = []
    for share in (k / FIRST for k in range(FIRST)):
        loss, slope = look(share + NEAR)
        differences.append(abs(loss - at[share][0] - NEAR * (slope + at[share][1]) / 2))
    return float(torch.tensor(differences, dtype=torch.float64, device="cpu").median()) / MEDIAN_OF_NORMAL


def _between(at: Looks, start: float, end: float) -> tuple[float, float]:
    """From one point on a line to another: the rise of the loss, and the integral of the slope over what is between."""
    ends = [share for share in sorted(at) if start <= share <= end]
    return at[end][0] - at[start][0], sum(_of_part(at, a, b)[1] for a, b in pairwise(ends))


def _of_part(at: Looks, start: float, end: float) -> tuple[float, float]:
    """The same between neighbours."""
    return at[end][0] - at[start][0], (end - start) * (at[start][1] + at[end][1]) / 2
