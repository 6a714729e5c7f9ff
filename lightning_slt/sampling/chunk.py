"""The chains that move together: the loop over their steps, and what is read off them on the way.

The losses and gradients are the engine's, the update is the sampler's; here they are put together, block by block of
the weights so that what a step touches stays in the cache, with no work for each parameter and no waiting for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.engines import Engine, SequentialEngine
from lightning_slt.sampling.gradients import Gradients
from lightning_slt.sampling.layout import Layout
from lightning_slt.sampling.noise import NormalStream, fill_rows_
from lightning_slt.sampling.randomness import Randomness
from lightning_slt.sampling.rng import seed_globals
from lightning_slt.sampling.samplers import Sampler, SamplerState
from lightning_slt.sampling.segment import NOISE_EVERY, NOISE_LAG, STATS_EVERY
from lightning_slt.sampling.steps import NoLossError
from lightning_slt.sampling.weight_reader import Readout, num_reads
from lightning_slt.sampling.window import Window


class GradientMoments:
    """The sum of squared gradients ``[d]`` of every chain that adds its own, and how many there are of them."""

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros_like(like)
        self.count = 0

    def add(self, grad: Tensor) -> None:
        """Those of some chains, ``[k, d]``."""
        for row in grad:
            self.total.addcmul_(row, row)
        self.count += len(grad)


@dataclass(frozen=True, eq=False)
class Moved:
    """What the steps of a chunk of k chains showed; NaN from where a loss could not be computed any more.

    Attributes:
        losses: ``[k, steps]`` float64, on the minibatch of each step.
        readings: ``[3 or 5, k, readings]`` float64, in the order of :data:`~lightning_slt.sampling.segment.READINGS`.
        noise_square: ``[k, readings of the noise]`` float64, ``Segment.noise_square``; None where it is not taken.
        read: ``[k, reads, n]``, what the reader made of the weights; None without one.
    """

    losses: Tensor
    readings: Tensor
    noise_square: Tensor | None
    read: Tensor | None


@dataclass(eq=False)
class _Block:
    """Views of one block of the weights of all the chains: ``[k, block]`` each, ``anchor`` ``[block]``."""

    number: int
    weights: Tensor
    anchor: Tensor
    scratch: Tensor
    state: SamplerState
    share: float


class Chunk:
    """k chains that move together; their weights, and all else that is given, are changed in place.

    Args:
        engine: their losses and gradients.
        sampler: how they move.
        posterior: what is sampled.
        layout: which of the weights are on this rank.
        anchor: ``[d]``, ``w*``.
        weights: ``[k, d]``.
        gradients: theirs.
        noise: ``[k, block]``, memory for the noise of a block of the weights (of all of them where they are shards).
        blocks: of the weights, each with its share in sums over ranks.
        state: the sampler's, of these chains.
        randomness: of each chain.
        moments: what their gradients are added to; None where nobody wants them.
    """

    def __init__(
        self,
        engine: Engine,
        sampler: Sampler,
        posterior: LocalPosterior,
        layout: Layout,
        anchor: Tensor,
        weights: Tensor,
        gradients: Gradients,
        noise: Tensor,
        blocks: Sequence[tuple[slice, float]],
        state: SamplerState,
        randomness: Sequence[Randomness],
        moments: GradientMoments | None,
    ) -> None:
        self._engine, self._sampler, self._posterior, self._layout = engine, sampler, posterior, layout
        self._weights, self._gradients, self._noise = weights, gradients, noise
        self._randomness, self._moments = randomness, moments
        self._noise_streams = [own.noise for own in randomness]
        self._blocks = []
        for number, (block, share) in enumerate(blocks):
            p = state.preconditioner
            inner = SamplerState(
                {name: x[:, block] if x.dim() > 1 else x for name, x in state.tensors.items()},
                p[block] if p is not None else None,
            )
            own = block if layout.sharded else slice(block.stop - block.start)
            scratch = noise[:, own]
            self._blocks.append(_Block(number, weights[:, block], anchor[block], scratch, inner, share))
        self._state = self._blocks[0].state

    def move(
        self,
        window: Window,
        indices: Tensor,
        lr: float,
        readout: Readout,
        partners: Tensor | None = None,
        seeds: Tensor | None = None,
        before: int = 0,
    ) -> Moved:
        """Move every chain one step for each column.

        Args:
            window: the minibatches.
            indices: ``[k, steps]``, which of them each chain sees at each step.
            lr: the step size.
            readout: offered the weights that each step begins with.
            partners: ``[k, steps]``, the minibatch whose gradient is taken as well now and then
                (``Segment.noise_square``); None for never.
            seeds: ``[k, steps]``, of the random numbers that the user's step draws; None where it draws none. Chains
                go one after another then.
            before: steps of the same stretch that went before, on other windows: readings go on as if there were one.

        Raises:
            NoLossError: where a minibatch has no loss.
            Exception: what the user's step raised at finite weights.
        """
        self._gradients.bind(self._weights)
        if not isinstance(self._engine, SequentialEngine):
            # all at once: a copy at a step would make the GPU wait for it
            indices = indices.to(self._weights.device)
            partners = partners.to(self._weights.device) if partners is not None else None
        loss_at = self._losses(window, indices, seeds)
        steps = indices.shape[1]
        losses: list[Tensor] = []
        k, kinds = len(self._weights), 3 if self._state.preconditioner is None else 5
        # a table: small tensors that are kept, made between large ones that are not, hold the heap apart
        readings, taken = self._weights.new_empty(num_reads(steps, STATS_EVERY, before), kinds, k), 0
        squares: list[Tensor] = []
        for t in range(steps):
            try:
                loss = loss_at(t)
            except (ValueError, RuntimeError, NoLossError) as error:
                if not self._diverged(error):
                    raise
                break
            with torch.no_grad():
                if (before + t) % STATS_EVERY == 0:
                    self._read(readings[taken])
                    taken += 1
                    if self._moments is not None:
                        self._add_moments(self._moments)
                if partners is not None and (before + t) % NOISE_EVERY == NOISE_LAG:
                    squares.append(self._noise_square(window, partners[:, t], t, loss_at))
                readout.offer(t, self._weights, self._gradients.whole, self._state)
                loss = self._update(loss, lr)
            losses.append(loss)
        read = self._layout.sum(readings[:taken]).permute(1, 2, 0) if taken else None
        noise = self._layout.sum(torch.stack(squares, dim=1)) if squares else None
        return Moved(
            _padded(torch.stack(losses, dim=-1).reshape(k, -1) if losses else None, (k, steps)),
            _padded(read, (kinds, k, num_reads(steps, STATS_EVERY, before))),
            _padded(noise, (k, num_noise_squares(steps, before))) if partners is not None else None,
            readout.table(steps, self._weights),
        )

    def _losses(self, window: Window, indices: Tensor, seeds: Tensor | None) -> Callable[[int], Tensor]:
        """The loss of each chain at a step, its gradient left in the memory for it."""
        engine = self._engine
        if isinstance(engine, SequentialEngine):
            numbers, own = indices[0].tolist(), seeds[0].tolist() if seeds is not None else None

            def loss_at(t: int) -> Tensor:
                if own is not None:
                    seed_globals(own[t])
                return engine.step(window[numbers[t]])

            return loss_at
        return lambda t: engine(window, indices[:, t])

    def _diverged(self, error: Exception) -> bool:
        """Whether that the loss could not be computed is for the weights' sake, and not the fault of the module: some
        losses raise on non-finite input, and some steps give none where theirs is not finite."""
        return isinstance(error, NoLossError) or not self._layout.all_finite(self._weights)

    def _update(self, loss: Tensor, lr: float) -> Tensor:
        """Move the chains by a step, and return the losses of where they are: a proposal may have been rejected."""
        sampler, posterior, state = self._sampler, self._posterior, self._state
        if sampler.full_batch:
            state.loss = loss.reshape(len(self._weights))
            draws = [torch.rand((), generator=own.choice, device=loss.device) for own in self._randomness]
            state.uniform = torch.stack(draws)
        for block, noise in self._drawn(self._noise_streams):
            grad = self._gradients.block(block.number)
            sampler.update_(block.weights, block.anchor, grad, noise, lr, posterior, block.state)
        if sampler.shares_noise:
            self._share_noise(lr)
        return state.loss if sampler.full_batch and state.loss is not None else loss

    def _drawn(self, streams: Sequence[NormalStream]) -> Iterator[tuple[_Block, Tensor]]:
        """The blocks, each with its noise ``[k, block]``, in memory that the one after it may use again."""
        if self._layout.sharded:
            self._layout.normal_(self._noise[0], streams[0])
            yield from ((block, block.scratch) for block in self._blocks)
        elif len(streams) == 1 and self._sampler.keeps_noise:
            yield from ((block, streams[0].read(block.scratch)) for block in self._blocks)
        else:
            yield from ((block, fill_rows_(streams, block.scratch)) for block in self._blocks)

    def _share_noise(self, lr: float) -> None:
        """The other half of the noise of the step before, where there is one since the numbers began anew."""
        first = not all(own.has_last for own in self._randomness)
        for own in self._randomness:
            own.has_last = True
        if first:
            return
        for block, noise in self._drawn([own.last_noise for own in self._randomness if own.last_noise is not None]):
            self._sampler.share_(block.weights, noise, lr)  # type: ignore[attr-defined]

    def _noise_square(self, window: Window, partners: Tensor, t: int, loss_at: Callable[[int], Tensor]) -> Tensor:
        """``[k]``, a draw of ``xi.P xi``, xi the part of a gradient that is its minibatch's own: on average it is half
        of the square of the difference of two minibatches' gradients. The gradients are left as they were.

        Args:
            window: the minibatches.
            partners: ``[k]``, the other minibatch of each chain.
            t: the step.
            loss_at: see :meth:`_losses`.
        """
        engine = self._engine

        def again() -> None:
            with torch.enable_grad():
                loss_at(t)

        def other(keep: bool) -> None:
            with torch.enable_grad():
                engine(window, partners, keep=keep)

        try:
            square = self._gradients.apart(again, other, self._grad_square) / 2
        except (ValueError, RuntimeError, NoLossError) as error:
            if not self._diverged(error):
                raise
            square = torch.full_like(self._weights[:, 0], torch.nan)
        self._gradients.put_back(again)
        return square

    def _add_moments(self, moments: GradientMoments) -> None:
        grad = self._gradients.whole
        if grad is not None and self._layout.all_finite(grad):
            moments.add(grad)

    def _grad_square(self) -> Tensor:
        """``[k]``, ``grad.P grad``; the noise's memory is used on the way."""
        total: Tensor | None = None
        for block in self._blocks:
            p, grad = block.state.preconditioner, self._gradients.block(block.number)
            square = torch.linalg.vecdot(grad, torch.mul(grad, p, out=block.scratch) if p is not None else grad)
            if block.share != 1.0:
                square = block.share * square
            total = square if total is None else total + square
        assert total is not None
        return total

    def _read(self, out: Tensor) -> None:
        """The three readings (five with a preconditioner), put in ``out`` ``[3 or 5, k]``; the noise's memory is used
        on the way."""
        for number, block in enumerate(self._blocks):
            at, scratch, tensors = block.weights, block.scratch, block.state.tensors
            slope = self._gradients.block(block.number)
            # the weights are a proposal that may be rejected
            if "accepted_weights" in tensors and bool(tensors["started"].all()):
                at, slope = tensors["accepted_weights"], tensors["accepted_grad"]
            torch.sub(at, block.anchor, out=scratch)
            if len(scratch) == 1:
                slope, scratch = slope[0], scratch[0]
            p = block.state.preconditioner
            if p is None:
                got = [_dot(slope, slope), _dot(slope, scratch), _dot(scratch, scratch)]
            else:
                pulled = scratch * p
                got = [_dot(slope, slope * p), _dot(slope, scratch), _dot(scratch, scratch)]
                got += [_dot(slope, pulled), _dot(scratch, pulled)]
            for row, value in zip(out, got, strict=True):
                if block.share != 1.0:
                    value = block.share * value
                row.copy_(value) if number == 0 else row.add_(value)


def num_noise_squares(steps: int, before: int = 0) -> int:
    """At how many steps of so many, after those of the same stretch before them, the gradient of a second minibatch is
    taken as well."""
    return len(range(NOISE_LAG, before + steps, NOISE_EVERY)) - len(range(NOISE_LAG, before, NOISE_EVERY))


def _padded(table: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The table as float64 on the CPU, with NaN where it ends before ``shape`` does."""
    whole = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
    if table is not None:
        whole[..., : table.shape[-1]] = table.double().cpu()
    return whole


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a, b) if a.dim() == 1 else torch.linalg.vecdot(a, b)
