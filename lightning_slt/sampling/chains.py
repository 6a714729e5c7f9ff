"""Chains: weights that start at ``w*`` and move under a sampler, and what is read off them on the way.

Every random number belongs to a chain: chain k of a seed gets the same noise and the same minibatches whatever the
chunks, the engine or the number of ranks that share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.collective import Collective, RankLostError, own_chains
from lightning_slt.sampling.engines import Engine, SequentialEngine
from lightning_slt.sampling.layout import BLOCK
from lightning_slt.sampling.noise import NormalStream, normal_stream
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.paths import Choice, choose_engine
from lightning_slt.sampling.rng import CHOICE, MINIBATCHES, NOISE, START, generator
from lightning_slt.sampling.samplers import Sampler, SamplerState, empty_state
from lightning_slt.sampling.segment import NOISE_EVERY, READINGS, STATS_EVERY, Segment
from lightning_slt.sampling.steps import EVAL_MODE, NO_LOSS, NoLossError
from lightning_slt.sampling.weight_reader import Readout, WeightReader, join_reads, num_reads
from lightning_slt.sampling.window import Window

KEPT_GRADIENT = 2**20
"""Bytes of gradients, of the chains that move together, that are kept while those of another minibatch are taken;
larger ones are computed once more."""
PROBED_BATCHES = 8
"""Minibatches whose loss is known before anything is tried on them."""

Progress = Callable[[int], None]
"""Told how many chain-steps have been done since it was last called."""


class Chains:
    """The chains of this rank.

    Args:
        objective: the loss; must have been adapted to a batch of ``source`` (see :func:`open_window`).
        source: where minibatches come from.
        posterior: what is sampled.
        sampler: how the weights move.
        num_chains: chains of all ranks together.
        seed: with the chain's number, it determines every random number.
        collective: the ranks that share the chains.
        method: ``"auto"``, ``"sequential"`` or ``"batched"``.
        progress: told about chain-steps done.

    Attributes:
        reader: reads numbers off the weights at every ``read_every``-th step; None for no such readings.
    """

    reader: WeightReader | None = None
    read_every: int = STATS_EVERY

    def __init__(
        self,
        objective: Objective,
        source: MinibatchSource,
        posterior: LocalPosterior,
        sampler: Sampler,
        num_chains: int,
        seed: int,
        collective: Collective,
        method: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        self.objective, self.source, self.posterior, self.sampler = objective, source, posterior, sampler
        self.layout = objective.layout
        self.num_chains = num_chains
        self.collective = collective
        self.progress = progress or (lambda steps: None)
        self.numbers = own_chains(num_chains, collective)
        self._seed = seed
        self._window_index, self._window_used = 0, 0
        self._orders: list[Tensor] = []
        choices = collective.exchange(lambda: self._choose(method))
        self.method, self.reason = choices[0]
        if any(chosen != self.method for chosen, _ in choices):
            # timings differ between ranks; the first one's choice holds for all, unless one of them cannot
            try:
                collective.exchange(lambda: self._choose(self.method))
            except Exception as error:
                if method != "auto" or isinstance(error, RankLostError):
                    raise
                self.method = "sequential"
                self.reason = collective.exchange(lambda: self._choose(self.method))[0][1]
        collective.exchange(self._allocate)

    def _choose(self, method: str) -> tuple[str, str]:
        window = self.source.window(0)
        choice: Choice = choose_engine(self.objective, window, min(self.num_chains, max(len(self.numbers), 1)), method)
        self._engine: Engine = choice.engine
        return choice.engine.method, choice.reason

    def _allocate(self) -> None:
        device, dtype, d = self.objective.device, self.objective.dtype, len(self.objective.anchor)
        self.weights = self.objective.anchor.repeat(len(self.numbers), 1)
        self._state = empty_state(self.sampler, self.weights)
        width = max(1, min(self._engine.width, len(self.numbers)))
        self._grad = torch.zeros(width, d, device=device, dtype=dtype)
        block = min(d, BLOCK.get(device.type, d)) if self.sampler.elementwise else d
        # shards keep what is theirs of the noise of all the weights, so that it is drawn before any block is moved
        self._noise = torch.zeros(width, d if self.layout.sharded else block, device=device, dtype=dtype)
        self._blocks = self.layout.blocks(max(block, 1))
        self._moments: Tensor | None = None
        self._moments_count = 0
        self.reseed(0)

    def sample(self, posterior: LocalPosterior, sampler: Sampler) -> None:
        """Sample this posterior from now on, from ``w*``, with this sampler."""
        self.posterior, self.sampler = posterior, sampler
        self._allocate()

    def gradients(self, weights: Tensor, batches: Sequence[int]) -> Tensor:
        """Gradients of the mean loss at any weights, averaged over these minibatches of the first window.

        Args:
            weights: ``[k, d]``.
            batches: numbers of minibatches that have a loss.

        Returns:
            ``[k, d]``.
        """
        window, total = self.source.window(0), torch.zeros_like(weights)
        weights, width = weights.contiguous(), self._engine.width
        grad = torch.empty_like(weights[:width])
        try:
            for start in range(0, len(weights), width):
                rows = weights[start : start + width]
                self._engine.bind(rows, grad[: len(rows)])
                for i in batches:
                    self._engine(window, torch.full((len(rows),), i))
                    total[start : start + width] += grad[: len(rows)]
        finally:
            self._engine.release()
        return total / len(batches)

    def reseed(self, part: int) -> None:
        """Start the random numbers of every chain anew, those of part ``part`` of the run."""
        device, dtype, exact = self.objective.device, self.objective.dtype, self.sampler.full_batch
        self._noise_streams = [
            normal_stream(self._seed, k, NOISE, part, device=device, dtype=dtype, exact=exact) for k in self.numbers
        ]
        # the same numbers again, a step later: nothing has to be kept of them
        self._last_streams = [
            normal_stream(self._seed, k, NOISE, part, device=device, dtype=dtype, exact=exact)
            for k in (self.numbers if self.sampler.shares_noise else [])
        ]
        self._has_last = [False] * len(self.numbers)
        self._batch_streams = [generator(self._seed, k, MINIBATCHES, part) for k in self.numbers]
        self._choice_streams = [generator(self._seed, k, CHOICE, part, device=device) for k in self.numbers]

    def place(self, displacements: Tensor) -> None:
        """Put every chain of this rank at ``w* + displacement``, ``[own chains, d]``, with no memory of a past."""
        for weights, displacement in zip(self.weights, displacements, strict=True):  # no second copy on the device
            torch.add(self.objective.anchor, displacement.to(weights), out=weights)
        self._forget_past()

    def _forget_past(self) -> None:
        for tensor in self._state.tensors.values():
            tensor.zero_()

    def spread(self, metric: Callable[[Tensor], Tensor]) -> None:
        """Put every chain at a draw of the Gaussian that the metric makes round: ``w* + P z``."""
        device, anchor = self.objective.device, self.objective.anchor
        streams = [generator(self._seed, k, START, device=device) for k in self.numbers]
        draws = [torch.randn(anchor.shape, generator=g, device=device, dtype=anchor.dtype) for g in streams]
        self.place(metric(torch.stack(draws)) if draws else torch.zeros_like(self.weights))

    def scratch(self) -> list[Tensor]:
        """Memory to be used while the chains rest, which are put back after: ``[1, d]`` each, for gradients, and of as
        many chains as there are here."""
        return [self._grad[:1], *self.weights.split(1)] if len(self.weights) else []

    def displacements(self) -> Tensor:
        """``[own chains, d]``: where the chains of this rank are, from ``w*``."""
        at = self._state.tensors.get("accepted_weights", self.weights)
        return at - self.objective.anchor

    @property
    def preconditioner(self) -> Tensor | None:
        """``[d]``, the sampler's metric as it is now; None where it is the identity."""
        return self._state.preconditioner

    def precondition(self, second_moment: Tensor) -> None:
        """Give a sampler that wants one its preconditioner, from mean squared gradients ``[d]``."""
        if self.sampler.preconditioned:
            moment = second_moment.to(self.objective.anchor)
            d = self.layout.num_weights
            mean = {"mean": self.layout.total(moment) / d} if self.layout.sharded else {}
            self._state.preconditioner = self.sampler.preconditioner(moment, **mean)  # type: ignore[attr-defined]

    def fix_preconditioner(self, preconditioner: Tensor | None) -> None:
        """Use this one, ``[d]``, from now on."""
        self._state.preconditioner = preconditioner.to(self.objective.anchor) if preconditioner is not None else None
        self._moments = None

    def learn_preconditioner(self, keep_learning: bool) -> None:
        """Take the preconditioner from the gradients since the last call, of all chains on all ranks.

        Args:
            keep_learning: go on collecting; else what there is stays for good.
        """
        if not self.sampler.preconditioned:
            return
        if self._moments is not None:
            own = (self._moments.cpu(), self._moments_count)
            # every shard has seen all the chains, and its moments are nobody else's
            every = [own] if self.layout.sharded else self.collective.exchange(lambda: own)
            told = [(total, count) for total, count in every if count]
            if told:
                mean = torch.stack([total for total, _ in told]).sum(dim=0) / sum(count for _, count in told)
                if self.layout.all_finite(mean):
                    self.precondition(mean)
        self._moments = torch.zeros_like(self.objective.anchor) if keep_learning else None
        self._moments_count = 0

    def advance(self, steps: int, lr: float, read: bool = True) -> Segment:
        """Move every chain ``steps`` further, on all ranks, and return what all of them showed.

        Args:
            steps: of each chain.
            lr: the step size.
            read: whether the reader is asked, where there is one; not for steps that will not be draws.

        Raises:
            NoLossError: where no minibatch has a loss.
            Exception: what the user's step raised, on any rank.
        """
        reader = self.reader
        try:
            self.reader = reader if read else None
            return Segment.merge(self.collective.exchange(lambda: self._advance(steps, lr)))
        finally:
            self.reader = reader

    def restart(self) -> None:
        """Put every chain back to ``w*``; their random numbers go on."""
        self.weights.copy_(self.objective.anchor.expand_as(self.weights))
        self._forget_past()

    def _advance(self, steps: int, lr: float) -> Segment:
        pieces: list[Segment] = []
        done = 0
        while done < steps:
            window = self.source.window(self._window_index)
            room = steps - done if self.source.resident else max(len(window) - self._window_used, 1)
            count = min(steps - done, room)
            pieces.append(self._advance_window(window, count, lr))
            done += count
            if not self.source.resident:
                self._window_used += count
                if self._window_used >= len(window):
                    self._window_index, self._window_used = self._window_index + 1, 0
            del window  # the source reads the next one into the memory of this one
        return Segment.join(pieces)

    def _advance_window(self, window: Window, steps: int, lr: float) -> Segment:
        chains = len(self.numbers)
        indices = self._pick(window, steps)
        indices = self._measure_anchor(window, indices)
        preconditioned = self._state.preconditioner is not None
        losses = torch.zeros(chains, steps, dtype=torch.float64)
        readings = torch.zeros(
            5 if preconditioned else 3, chains, len(range(0, steps, STATS_EVERY)), dtype=torch.float64
        )
        read: list[Tensor] = []
        noise: Tensor | None = None
        if self.sampler.heating(lr).step > 0 and not self.sampler.full_batch and len(window) > 1:
            noise = torch.full((chains, len(_noise_steps(steps))), torch.nan, dtype=torch.float64)
        tallies = [self._state.tensors.get(name) for name in ("accepted", "proposed")]
        before = [tally.clone() for tally in tallies if tally is not None]
        width = self._engine.width
        try:
            for start in range(0, chains, width):
                rows = slice(start, min(start + width, chains))
                losses[rows], readings[:, rows], numbers = self._move(
                    window, indices[rows], rows, lr, noise[rows] if noise is not None else None
                )
                read += [numbers] if numbers is not None else []
                self.progress(steps * (rows.stop - rows.start))
        finally:
            self._engine.release()
        anchor = torch.tensor([[window.anchor_loss[i] for i in row] for row in indices.tolist()], dtype=torch.float64)
        owner = 0 if self.source.shared else self.collective.rank
        used = {(owner, self._window_index, i): window.anchor_loss[i] for i in indices.unique().tolist()}
        acceptance = None
        if before:
            accepted, proposed = ((tally - old).cpu() for tally, old in zip(tallies, before, strict=True))  # type: ignore[operator]
            acceptance = accepted / proposed.clamp(min=1)
        return Segment(
            self.numbers,
            losses - anchor.reshape(chains, steps),
            anchors=used,
            acceptance=acceptance,
            read=join_reads(self.reader, read, num_reads(steps, self.read_every), self.weights),
            read_every=self.read_every,
            noise_square=noise,
            **dict(zip(READINGS, readings, strict=False)),
        )

    def _pick(self, window: Window, steps: int) -> Tensor:
        """Which minibatch each chain sees at each step, ``[chains, steps]``.

        From a window that holds all the data, with replacement: the batch does not depend on where the chain is. Of a
        window that is passing by, every batch once, each chain in an order of its own: a batch that comes back would
        find a chain that has already moved towards it.
        """
        if self.source.resident:
            picks = [torch.randint(len(window), (steps,), generator=g) for g in self._batch_streams]
        else:
            if self._window_used == 0:
                self._orders = [torch.randperm(len(window), generator=g) for g in self._batch_streams]
            picks = [order[self._window_used : self._window_used + steps] for order in self._orders]
        return torch.stack(picks) if picks else torch.empty(0, steps, dtype=torch.long)

    def _measure_anchor(self, window: Window, indices: Tensor) -> Tensor:
        """Losses at ``w*`` of the batches that are about to be used; batches without a loss are replaced by others."""
        for i in indices.unique().tolist():
            if i in window.anchor_loss:
                continue
            try:
                with torch.no_grad():
                    window.anchor_loss[i] = float(self.objective.loss(window[i]))
            except NoLossError:
                window.without_loss.add(i)
        if window.without_loss:
            usable = torch.tensor([i for i in range(len(window)) if i in window.anchor_loss])
            if not len(usable):
                raise NoLossError(NO_LOSS)
            without = torch.isin(indices, torch.tensor(sorted(window.without_loss)))
            indices = torch.where(without, usable[indices % len(usable)], indices)
        return indices

    def _move(
        self, window: Window, indices: Tensor, rows: slice, lr: float, noises: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Losses ``[chains, steps]``, readings ``[3 or 5, chains, readings]`` and what the reader makes of the weights
        (``[chains, reads, n]``) of one chunk, whose weights move; ``noises`` (``Segment.noise_square``) is filled."""
        weights, count = self.weights[rows], rows.stop - rows.start
        grad, noise = self._grad[:count], self._noise[:count]
        posterior, update = self.posterior, self.sampler.update_
        streams, choices = self._noise_streams[rows], self._choice_streams[rows]
        engine = self._engine
        engine.bind(weights, grad)
        blocks = [self._block(block, share, rows, weights, grad, noise) for block, share in self._blocks]
        state = blocks[0][4]
        decides, shares_noise = self.sampler.full_batch, self.sampler.shares_noise
        alone = isinstance(engine, SequentialEngine)
        numbers = indices[0].tolist() if alone else []
        if not alone:  # all at once: a copy at every step would make the GPU wait for it
            indices = indices.to(self.objective.device)
        losses: list[Tensor] = []
        readings: list[Tensor] = []
        readout = Readout(self.reader, self.read_every)
        steps = indices.shape[1]
        noise_squares: list[Tensor] = []
        for t in range(steps):
            try:
                loss = engine.step(window[numbers[t]]) if alone else engine(window, indices[:, t])  # type: ignore[attr-defined]
            except (ValueError, RuntimeError, NoLossError) as error:
                if self.layout.all_finite(weights) and not isinstance(error, NoLossError):
                    raise
                # some losses raise on non-finite input, and some steps give none where theirs is not finite: the chain
                # has diverged, which is not the module's fault
                losses += [torch.full_like(loss, torch.nan) for _ in range(t, steps)] if t else []
                break
            with torch.no_grad():
                if t % STATS_EVERY == 0:
                    readings += self._read(blocks, state)
                    if self._moments is not None and self.layout.all_finite(grad):
                        for row in grad:
                            self._moments.addcmul_(row, row)
                        self._moments_count += count
                if noises is not None and t % NOISE_EVERY == NOISE_EVERY // 2:
                    noise_squares.append(self._noise_square(window, indices, t, blocks, weights, grad))
                readout.offer(t, weights, grad, state)
                if decides:
                    state.loss = loss.reshape(count)
                    state.uniform = torch.stack([torch.rand((), generator=g, device=loss.device) for g in choices])
                for moved, fixed, slope, random, inner, _ in self._draw(blocks, noise, streams):
                    update(moved, fixed, slope, random, lr, posterior, inner)
                if shares_noise:
                    self._share_noise(blocks, noise, rows, lr)
                if decides:
                    loss = state.loss  # type: ignore[assignment]
            losses.append(loss)
        table = (
            torch.stack([x.reshape(count) for x in losses], dim=1).double().cpu() if losses else torch.empty(count, 0)
        )
        if table.shape[1] < steps:
            missing = torch.full((count, steps - table.shape[1]), torch.nan, dtype=torch.float64)
            table = torch.cat([table.double(), missing], dim=1)
        number, kinds = len(range(0, steps, STATS_EVERY)), 3 if state.preconditioner is None else 5
        read = torch.full((kinds, count, number), torch.nan, dtype=torch.float64)
        if readings:
            stacked = self.layout.sum(torch.stack(readings))
            got = stacked.reshape(-1, kinds, count).permute(1, 2, 0).double().cpu()
            read[:, :, : got.shape[2]] = got
        if noises is not None and noise_squares:
            noises[:, : len(noise_squares)] = self.layout.sum(torch.stack(noise_squares, dim=1)).double().cpu()
        return table, read, readout.table(steps, weights)

    def _noise_square(
        self, window: Window, indices: Tensor, t: int, blocks: Sequence[_Block], weights: Tensor, grad: Tensor
    ) -> Tensor:
        """``[chains]``, a draw of ``xi.P xi``, xi the part of a gradient that is its minibatch's own: on average it is
        half of the square of the difference of two minibatches' gradients. ``grad`` is left as it was.

        The other batch is one that has been used before, so that none is met by a chain that has moved towards it
        already.
        """
        engine = self._engine
        # larger ones would be a copy of the weights more: they are made anew for the step. Of all the weights and not
        # of this rank's, since ranks with shards of unequal size call the engine together
        size = len(grad) * self.layout.num_weights * grad.element_size()
        kept = grad.clone() if size <= KEPT_GRADIENT else None
        grad.neg_()
        try:
            with torch.enable_grad():
                engine(window, indices[:, t - NOISE_EVERY // 2], keep=True)
            square = self._square_of(blocks) / 2
        except (ValueError, RuntimeError, NoLossError) as error:
            if self.layout.all_finite(weights) and not isinstance(error, NoLossError):
                raise
            square = torch.full_like(grad[:, 0], torch.nan)
        if kept is not None:
            grad.copy_(kept)
        else:
            with torch.enable_grad():
                engine(window, indices[:, t])
        return square

    def _draw(self, blocks: Sequence[_Block], noise: Tensor, streams: Sequence[NormalStream]) -> Iterator[_Block]:
        """The blocks, each with the next numbers in the memory of its noise, which the one after it may use again."""
        if self.layout.sharded:
            self.layout.normal_(noise[0], streams[0])
            yield from blocks
            return
        for block in blocks:
            for row, stream in zip(block[3], streams, strict=True):
                stream.fill_(row)
            yield block

    def _share_noise(self, blocks: Sequence[_Block], noise: Tensor, rows: slice, lr: float) -> None:
        """The other half of the noise of the step before, where there is one since the numbers began anew."""
        first = not all(self._has_last[rows])
        self._has_last[rows] = [True] * (rows.stop - rows.start)
        if first:
            return
        for moved, _, _, random, _, _ in self._draw(blocks, noise, self._last_streams[rows]):
            self.sampler.share_(moved, random, lr)  # type: ignore[attr-defined]

    @staticmethod
    def _square_of(blocks: Sequence[_Block]) -> Tensor:
        """``[chains]``, ``grad.P grad``; the noise's memory is used on the way."""
        total: Tensor | None = None
        for _, _, grad, scratch, inner, share in blocks:
            pulled = torch.mul(grad, inner.preconditioner, out=scratch) if inner.preconditioner is not None else grad
            square = _dot(grad, pulled) if share == 1.0 else share * _dot(grad, pulled)
            total = square if total is None else total + square
        assert total is not None
        return total

    def _block(self, block: slice, share: float, rows: slice, weights: Tensor, grad: Tensor, noise: Tensor) -> _Block:
        """Views of one block of the weights of a chunk of chains; rows of the sampler's own tensors with it."""
        p = self._state.preconditioner
        state = SamplerState(
            {
                name: tensor[rows, block] if tensor.dim() > 1 else tensor[rows]
                for name, tensor in self._state.tensors.items()
            },
            p[block] if p is not None else None,
        )
        own = block if self.layout.sharded else slice(block.stop - block.start)
        return weights[:, block], self.objective.anchor[block], grad[:, block], noise[:, own], state, share

    def _read(self, blocks: Sequence[_Block], state: SamplerState) -> list[Tensor]:
        """The three readings (five with a preconditioner), each ``[chains]``; the noise's memory is used on the way."""
        totals: list[Tensor] = []
        for weights, anchor, grad, scratch, inner, share in blocks:
            at, slope = weights, grad
            if "accepted_weights" in state.tensors:  # the weights are a proposal that may be rejected
                at, slope = state.tensors["accepted_weights"], state.tensors["accepted_grad"]
                if not bool(state.tensors["started"].all()):
                    at, slope = weights, grad
            torch.sub(at, anchor, out=scratch)
            p = inner.preconditioner
            if p is None:
                got = [_dot(slope, slope), _dot(slope, scratch), _dot(scratch, scratch)]
            else:
                pulled = scratch * p
                got = [_dot(slope, slope * p), _dot(slope, scratch), _dot(scratch, scratch)]
                got += [_dot(slope, pulled), _dot(scratch, pulled)]
            if share != 1.0:
                got = [share * value for value in got]
            totals = got if not totals else [total + more for total, more in zip(totals, got, strict=True)]
        return totals


def _noise_steps(steps: int) -> range:
    """Steps of a stretch at which the gradient of a second minibatch is taken as well."""
    return range(NOISE_EVERY // 2, steps, NOISE_EVERY)


_Block = tuple[Tensor, Tensor, Tensor, Tensor, SamplerState, float]
"""Weights, anchor, gradient, scratch for noise, the sampler's state and the share in sums, of one block of a chunk of
chains."""


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if len(a) == 1:
        return torch.dot(a[0], b[0]).reshape(1)
    return torch.linalg.vecdot(a, b)


def open_window(objective: Objective, source: MinibatchSource) -> float:
    """Adapt ``objective`` to the first minibatch that has a loss, and return that loss; measure a few more for probes.

    Raises:
        NoLossError: where no minibatch of the first window has a loss.
        AssertionError: where the step fails an assertion, with what may be behind it.
    """
    try:
        return _opened(objective, source)
    except AssertionError as error:
        # of the step most often, and it may say nothing itself
        if EVAL_MODE in str(error):
            raise
        said = f": {error}" if str(error) else ""
        raise AssertionError(f"an assertion failed while the loss was computed{said}. {EVAL_MODE}") from error


def _opened(objective: Objective, source: MinibatchSource) -> float:
    window = source.window(0)
    adapted = False
    for i in range(len(window)):
        try:
            if not adapted:
                objective.adapt(window[i])
                adapted = True
            with objective.active(), torch.no_grad():
                window.anchor_loss[i] = float(objective.loss(window[i]))
        except NoLossError:
            window.without_loss.add(i)
        if len(window.anchor_loss) >= PROBED_BATCHES:
            break
    if window.anchor_loss:
        return next(iter(window.anchor_loss.values()))
    raise NoLossError(NO_LOSS)
