"""The loss and its gradient at weights of one's choosing, while the chains rest: in the memory that they move in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_slt.sampling.anchor import measure_anchor, some_batch
from lightning_slt.sampling.engines import Engine
from lightning_slt.sampling.gradients import GradientMemory, Gradients
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.rng import STEP, derive_seed, seed_globals
from lightning_slt.sampling.window import Window

Look = Callable[[float], tuple[float, float]]
"""The loss and its slope along a line, at a share of the way."""


class AtRest:
    """Looks at the loss, one weight vector or as many as the engine takes at once. Where the user's step draws random
    numbers a minibatch has the same ones at all weights: what differs between these is their own doing.

    Args:
        objective: the loss.
        engine: of the chains.
        memory: of their gradients.
        blocks: of the weights, each with its share in sums over ranks.
        seed: of the random numbers of the step.
    """

    def __init__(
        self,
        objective: Objective,
        engine: Engine,
        memory: GradientMemory,
        blocks: Sequence[tuple[slice, float]],
        seed: int,
    ) -> None:
        self._objective, self._engine, self._memory = objective, engine, memory
        self._blocks, self._seed = blocks, seed

    def gradients(self, window: Window, weights: Tensor, batches: Sequence[int]) -> Tensor:
        """Gradients of the mean loss at any weights, averaged over these minibatches of the window.

        Args:
            window: the minibatches.
            weights: ``[k, d]``.
            batches: numbers of minibatches that have a loss.

        Returns:
            ``[k, d]``.
        """
        total, weights, width = torch.zeros_like(weights), weights.contiguous(), self._engine.width
        grad = torch.empty_like(weights[:width])
        try:
            for start in range(0, len(weights), width):
                rows = weights[start : start + width]
                self._engine.bind(rows, grad[: len(rows)])
                for batch in batches:
                    self._step(window, batch, len(rows))
                    total[start : start + width] += grad[: len(rows)]
        finally:
            self._engine.release()
        return total / len(batches)

    @contextmanager
    def line(self, window: Window, weights: Tensor, row: int, put_back: bool = True) -> Iterator[Look]:
        """The loss of one minibatch on the line from ``w*`` to a row of ``weights``, and its slope along it, at a share
        of the way. In the memory of the last of the rows.

        Args:
            window: the minibatches.
            weights: ``[own chains, d]``.
            row: one of them.
            put_back: where the last row is is kept (one copy more, for that time); False loses it.
        """
        anchor, direction = self._objective.anchor, weights[row]
        is_last = row + 1 == len(weights)
        point = torch.empty_like(direction).unsqueeze(0) if is_last else weights[-1:]
        kept = point.to("cpu", copy=True) if put_back and not is_last else None
        batch, gradients = some_batch(self._objective, window), self._memory.of(1)

        def look(share: float) -> tuple[float, float]:
            torch.add(anchor, direction, alpha=share, out=point[0])
            gradients.bind(point)
            loss, slope = gradients.derivative(direction, lambda: self._step(window, batch))
            return float(loss), slope

        direction.sub_(anchor)
        try:
            yield look
        finally:
            self._engine.release()
            direction.add_(anchor)
            if kept is not None:
                point.copy_(kept)

    def slopes(self, window: Window, weights: Tensor, scratch: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """How the loss rises at ``w*`` towards each of these weights, on up to ``most`` minibatches, evenly spaced.

        Args:
            window: the minibatches.
            weights: ``[k, d]``.
            scratch: memory of one block of the weights or more.
            most: minibatches.

        Returns:
            ``[k, batches]`` float64, ``grad L_B(w*) . (w - w*)``; and what each of these minibatches weighs,
            ``[batches]``, together 1.
        """
        objective, anchor = self._objective, self._objective.anchor
        wanted = torch.linspace(0, len(window) - 1, min(most, len(window)), device="cpu").round().long()
        measure_anchor(objective, window, wanted)
        # those without a loss are left out, which all ranks do alike
        batches = wanted[
            ~torch.isin(wanted, torch.tensor(sorted(window.without_loss), dtype=torch.long, device="cpu"))
        ].unique()
        table, gradients = anchor.new_zeros(len(weights), len(batches)), self._memory.of(1)
        gradients.bind(anchor.unsqueeze(0))
        try:
            for column, batch in enumerate(batches.tolist()):
                self._step(window, batch)
                table[:, column] = self._along(gradients, weights, scratch)
        finally:
            self._engine.release()
        shares = (torch.ones(len(window), device="cpu") if window.shares is None else window.shares)[batches].double()
        return objective.layout.sum(table).double().cpu(), shares / shares.sum()

    def _along(self, gradients: Gradients, weights: Tensor, scratch: Tensor) -> Tensor:
        """``[k]``, the part of this rank in ``grad . (w - w*)`` for each of these weights ``[k, d]``."""
        anchor, total = self._objective.anchor, weights.new_zeros(len(weights))
        for number, (block, share) in enumerate(self._blocks):
            moved, slope = scratch[: block.stop - block.start], gradients.block(number)[0]
            # row by row in the same memory: where a row lies must not show in its last digit
            for row, of_row in enumerate(weights):
                torch.sub(of_row[block], anchor[block], out=moved)
                total[row] += share * torch.dot(slope, moved)
        return total

    def _step(self, window: Window, batch: int, rows: int = 1) -> Tensor:
        """The losses of the weights that are bound on one minibatch, their gradients left in their memory."""
        if self._objective.draws:
            seed_globals(derive_seed(self._seed, STEP, batch))
        return self._engine(window, torch.full((rows,), batch, device="cpu"))
