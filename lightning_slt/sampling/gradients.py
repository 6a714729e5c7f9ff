"""Where the gradients of a chunk of chains are: in one memory beside the chains, or parameter by parameter as autograd
leaves them.

Small weights have the first, which costs no work for each parameter. Of large ones it would be a copy more than there
has to be: while the backward pass adds the gradient of one parameter to that memory, both are there. So autograd keeps
its own, one chain's at a time, and the blocks of the weights are cut from them. The numbers are the same.

The gradient of a second minibatch, which the noise of both is told by, is compared with that of the first as it comes,
parameter by parameter; the first is held in half as many bytes until then. (A parameter that is more than half of all
the weights takes up to half a copy more than the chains' steps, for that time.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, repeat
from typing import Protocol

import torch
from torch import Tensor

from lightning_slt.sampling.engines import Engine, SequentialEngine, flat
from lightning_slt.sampling.layout import BLOCK, Layout
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.samplers import SGLD, Sampler

KEPT_GRADIENT = 2**20
"""Bytes of gradients, of the chains that move together, that are kept while those of another minibatch are taken;
larger ones are computed once more."""
IN_PARTS = 2**22
"""Bytes of the weights from which on the gradients of one chain are left where autograd makes them. With fewer, what is
done for each parameter would show in the time of a step (9 to 15 % with 0.5 million weights in 100 parameters)."""

_HALF = {torch.float64: torch.float32, torch.float32: torch.bfloat16}


class Gradients(Protocol):
    """The gradients of k chains, of which blocks of the weights are seen.

    Attributes:
        whole: ``[k, d]``; None where there is no such tensor.
    """

    whole: Tensor | None

    def bind(self, weights: Tensor) -> None:
        """Have the engine work on these weights ``[k, d]``."""

    def block(self, number: int) -> Tensor:
        """``[k, block]``, to be used before the next one is asked for."""

    def apart(
        self, again: Callable[[], object], other: Callable[[bool], object], square: Callable[[], Tensor]
    ) -> Tensor:
        """``[k]``: the squared difference of the gradients of two minibatches, in the sampler's metric.

        Args:
            again: puts those of the first there, which are there now.
            other: puts those of the second there, or adds them to what is there (True).
            square: of what is in the blocks.
        """

    def put_back(self, again: Callable[[], object]) -> None:
        """Have those of the first there after :meth:`apart`, come what may."""

    def derivative(self, direction: Tensor, step: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """What a step of one chain returns, and the inner product of its gradient with ``direction`` ``[d]``; none need
        be there after it."""


class WholeGradients:
    """All in one memory.

    Args:
        engine: puts them there.
        memory: ``[k, d]``.
        blocks: of the weights, of this rank.
        layout: which of the weights are on this rank.
    """

    def __init__(self, engine: Engine, memory: Tensor, blocks: Sequence[slice], layout: Layout) -> None:
        self.whole: Tensor | None = memory
        self._engine, self._memory, self._layout = engine, memory, layout
        self._blocks = [memory[:, block] for block in blocks]
        # of all the weights and not of this rank's, since ranks with shards of unequal size call the engine together
        self._keeps = len(memory) * layout.num_weights * memory.element_size() <= KEPT_GRADIENT
        self._kept: Tensor | None = None

    def bind(self, weights: Tensor) -> None:
        self._engine.bind(weights, self._memory)

    def block(self, number: int) -> Tensor:
        return self._blocks[number]

    def apart(
        self, again: Callable[[], object], other: Callable[[bool], object], square: Callable[[], Tensor]
    ) -> Tensor:
        self._kept = self._memory.clone() if self._keeps else None
        self._memory.neg_()
        other(True)
        return square()

    def put_back(self, again: Callable[[], object]) -> None:
        if self._kept is not None:
            self._memory.copy_(self._kept)
        else:
            again()
        self._kept = None

    def derivative(self, direction: Tensor, step: Callable[[], Tensor]) -> tuple[Tensor, float]:
        loss = step()
        return loss, self._layout.dot(self._memory[0], direction)


class GradientsInParts:
    """Those of one chain, one tensor for each parameter; in no metric.

    Args:
        engine: makes them, of one chain.
        objective: of which parameters.
        blocks: of the weights.
        sampler: sees them.
    """

    whole: Tensor | None = None

    def __init__(
        self, engine: SequentialEngine, objective: Objective, blocks: Sequence[slice], sampler: Sampler
    ) -> None:
        self._engine, self._dtype = engine, objective.dtype
        self._sizes = objective.sizes
        self._plan = _cut(objective.sizes, blocks)
        like = objective.anchor
        self._lengths = [block.stop - block.start for block in blocks]
        self._scratch, self._zero = like.new_empty(1, max(self._lengths)), like.new_zeros(1)
        # one of the user's may overwrite them, and where they are may be a minibatch, or the gradient of another
        self._copies = getattr(sampler.update_, "__func__", None) is not SGLD.update_

    def bind(self, weights: Tensor) -> None:
        self._engine.bind(weights, None)

    def block(self, number: int) -> Tensor:
        # asked for anew each time: what is held here would stay beside the next step's, another copy of the weights
        parts, cuts = self._engine.gradients(), self._plan[number]
        found: list[Tensor] = []
        for parameter, inside in cuts:
            part = parts[parameter]
            if part is None:
                part = self._zero.expand(self._sizes[parameter])
            found.append(part if inside is None else part[inside])
        if len(found) == 1 and found[0].dtype is self._dtype and not self._copies:
            return found[0].unsqueeze(0)
        out = self._scratch[:, : self._lengths[number]]
        torch.cat(found, out=out[0])
        return out

    def apart(
        self, again: Callable[[], object], other: Callable[[bool], object], square: Callable[[], Tensor]
    ) -> Tensor:
        first: dict[int, Tensor] = {}

        def hold(parameter: int, grad: Tensor) -> None:
            low = grad.to(_HALF.get(grad.dtype, grad.dtype))
            # a sum of portions is dense: of a sparse and a dense one, in this order, torch has none
            first[parameter] = flat(first[parameter]) + flat(low) if parameter in first else low

        self._engine.hand_over(again, hold)
        total = self._scratch.new_zeros(1)
        seen: list[int] = []

        def compare(parameter: int, grad: Tensor) -> None:
            seen.append(parameter)
            total.add_(self._square_between(grad, first.get(parameter)))

        self._engine.hand_over(lambda: other(False), compare)
        if len(set(seen)) < len(seen):
            # in two portions, of which neither is the gradient (a block that is checkpointed, and holds a tied weight)
            total.zero_()
            seen.clear()
            other(False)
            for parameter, part in enumerate(self._engine.gradients()):
                if part is not None:
                    compare(parameter, part)
        for parameter in first.keys() - set(seen):
            total.add_(self._square_between(first[parameter], None))
        return total

    def put_back(self, again: Callable[[], object]) -> None:
        again()

    def derivative(self, direction: Tensor, step: Callable[[], Tensor]) -> tuple[Tensor, float]:
        pieces, total = direction.split(self._sizes), torch.zeros((), dtype=torch.float64, device="cpu")
        loss: list[Tensor] = []

        def add(parameter: int, grad: Tensor) -> None:
            total.add_(torch.dot(flat(grad).to(self._dtype), pieces[parameter]))

        self._engine.hand_over(lambda: loss.append(step()), add)
        return loss[0], float(total)

    def _square_between(self, a: Tensor, b: Tensor | None) -> Tensor:
        """Piece by piece: a difference of all would be as large as they are."""
        size, total = BLOCK["cpu"], self._scratch.new_zeros(())
        others = repeat(0.0) if b is None else flat(b).split(size)
        for one, other in zip(flat(a).split(size), others, strict=False):
            off = one.to(self._dtype) - other
            total += torch.dot(off, off)
        return total


class GradientMemory:
    """The memory for the gradients of a rank's chains: none, where autograd keeps them and nobody asks for them whole.

    Args:
        engine: makes them.
        objective: of which weights.
        sampler: sees them.
        width: chains that move together, at the most.
        blocks: of the weights, of this rank.

    Attributes:
        in_parts: autograd keeps them.
    """

    def __init__(
        self, engine: Engine, objective: Objective, sampler: Sampler, width: int, blocks: Sequence[slice]
    ) -> None:
        self._engine, self._layout, self._width, self._blocks = engine, objective.layout, width, blocks
        self._anchor = objective.anchor
        self._whole: Tensor | None = None
        self._parts: GradientsInParts | None = None
        if isinstance(engine, SequentialEngine) and in_parts(engine, objective, sampler):
            self._parts = GradientsInParts(engine, objective, blocks, sampler)
        else:
            self.whole()
        self.in_parts = self._parts is not None

    def whole(self) -> Tensor:
        """``[width, d]``."""
        if self._whole is None:
            self._whole = self._anchor.new_zeros(self._width, len(self._anchor))
        return self._whole

    def of(self, count: int, whole: bool = False) -> Gradients:
        """Those of so many chains that move together; in one tensor where the weights are few, or where that is wanted
        (``whole``)."""
        if self._parts is not None and not whole:
            return self._parts
        return WholeGradients(self._engine, self.whole()[:count], self._blocks, self._layout)


def _cut(sizes: Sequence[int], blocks: Sequence[slice]) -> list[list[tuple[int, slice | None]]]:
    """For each block of the weights, which parameters it consists of, and which part of each; None for all of it.

    Example:
        >>> _cut([3, 2], [slice(0, 2), slice(2, 5)])
        [[(0, slice(0, 2, None))], [(0, slice(2, 3, None)), (1, None)]]
    """
    ends = list(accumulate(sizes))
    plan: list[list[tuple[int, slice | None]]] = []
    for block in blocks:
        inside: list[tuple[int, slice | None]] = []
        at = block.start
        k = bisect_right(ends, at)
        while at < block.stop:
            start, stop = ends[k] - sizes[k], min(ends[k], block.stop)
            if stop > at:
                inside.append((k, slice(at - start, stop - start) if stop - at < sizes[k] else None))
            at, k = stop, k + 1
        plan.append(inside)
    return plan


def in_parts(engine: Engine, objective: Objective, sampler: Sampler) -> bool:
    """Whether the gradients of chains are left as autograd makes them, parameter by parameter.

    Not where the step itself calls ``backward()``, which leaves its own among them, nor for a sampler that looks at all
    the weights at once or learns a metric from their gradients; and not on a GPU, where a block of the weights has
    most of the parameters in it.
    """
    return (
        type(engine) is SequentialEngine
        and objective.device.type == "cpu"
        and not objective.differentiates
        and sampler.elementwise
        and not sampler.preconditioned
        and objective.anchor.numel() * objective.anchor.element_size() >= IN_PARTS
    )
