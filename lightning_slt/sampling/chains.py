"""Chains: weights that start at ``w*`` and move under a sampler, a chunk of them at a time.

Every random number belongs to a chain: chain k of a seed gets the same noise and the same minibatches whatever the
chunks, the engine or the number of ranks that share the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lightning_slt.functional.posterior import LocalPosterior
from lightning_slt.sampling.anchor import anchor_of_steps, measure_anchor
from lightning_slt.sampling.at_rest import AtRest, Look
from lightning_slt.sampling.batches import MinibatchSource
from lightning_slt.sampling.chunk import Chunk, GradientMoments, num_noise_squares
from lightning_slt.sampling.collective import Collective, RankLostError, own_chains
from lightning_slt.sampling.engines import Engine
from lightning_slt.sampling.gradients import GradientMemory
from lightning_slt.sampling.layout import BLOCK
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.paths import SLOW, Choice, choose_engine
from lightning_slt.sampling.randomness import Randomness
from lightning_slt.sampling.rng import START, generator
from lightning_slt.sampling.samplers import Sampler, SamplerState, empty_state
from lightning_slt.sampling.segment import NOISE_LAG, READINGS, STATS_EVERY, Segment
from lightning_slt.sampling.weight_reader import Readout, WeightReader, join_reads, num_reads
from lightning_slt.sampling.window import Window

Progress = Callable[[int], None]
"""Told how many chain-steps have been done since it was last called."""


class Chains:
    """The chains of this rank.

    Args:
        objective: the loss; must have been adapted to a batch of ``source`` (see
            :func:`~lightning_slt.sampling.anchor.open_window`).
        source: where minibatches come from.
        posterior: what is sampled.
        sampler: how the weights move.
        num_chains: chains of all ranks together.
        seed: with the chain's number, it determines every random number.
        collective: the ranks that share the chains.
        method: ``"auto"``, ``"sequential"`` or ``"batched"``.
        progress: told about chain-steps done.

    Attributes:
        from_anchor: they began at ``w*``, when they were last put anywhere, and rise from there.
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
        self.seed = seed
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
        if method == "batched" and self._gain < SLOW and collective.rank == 0:
            objective.say(
                "slow",
                f"method='batched': with this module several chains at once have {self._gain:.2g} times the speed of "
                "one after another. method='auto' takes the faster of the two.",
            )
        collective.exchange(self._allocate)

    def _choose(self, method: str) -> tuple[str, str]:
        window = self.source.window(0)
        choice: Choice = choose_engine(self.objective, window, min(self.num_chains, max(len(self.numbers), 1)), method)
        self._engine: Engine = choice.engine
        self._gain = choice.gain
        return choice.engine.method, choice.reason

    def _allocate(self) -> None:
        device, dtype, d = self.objective.device, self.objective.dtype, len(self.objective.anchor)
        self.weights = self.objective.anchor.repeat(len(self.numbers), 1)
        self.from_anchor = True
        self._state = empty_state(self.sampler, self.weights)
        width = max(1, min(self._engine.width, len(self.numbers)))
        block = min(d, BLOCK.get(device.type, d)) if self.sampler.elementwise else d
        # shards keep what is theirs of the noise of all the weights, so that it is drawn before any block is moved
        self._noise = torch.zeros(width, d if self.layout.sharded else block, device=device, dtype=dtype)
        self._blocks = self.layout.blocks(max(block, 1))
        blocks = [block for block, _ in self._blocks]
        self._gradients = GradientMemory(self._engine, self.objective, self.sampler, width, blocks)
        self._moments: GradientMoments | None = None
        self.reseed(0)

    def sample(self, posterior: LocalPosterior, sampler: Sampler) -> None:
        """Sample this posterior from now on, from ``w*``, with this sampler."""
        self.posterior, self.sampler = posterior, sampler
        del self._gradients  # their memory goes before there is another one
        self._allocate()

    @property
    def window(self) -> Window:
        """The minibatches that the chains see next: one that has passed by would be read anew."""
        return self.source.window(self._window_index)

    def reseed(self, part: int) -> None:
        """Start the random numbers of every chain anew, those of part ``part`` of the run."""
        device, dtype = self.objective.device, self.objective.dtype
        self._randomness = [
            Randomness.begin(self.seed, k, part, self.sampler, device=device, dtype=dtype) for k in self.numbers
        ]

    def place(self, displacements: Tensor) -> None:
        """Put every chain of this rank at ``w* + displacement``, ``[own chains, d]``, with no memory of a past."""
        for weights, displacement in zip(self.weights, displacements, strict=True):  # no second copy on the device
            torch.add(self.objective.anchor, displacement.to(weights), out=weights)
        self.from_anchor = False
        self._forget_past()

    def _forget_past(self) -> None:
        for tensor in self._state.tensors.values():
            tensor.zero_()

    def spread(self, metric: Callable[[Tensor], Tensor]) -> None:
        """Put every chain at a draw of the Gaussian that the metric makes round: ``w* + P z``."""
        device, anchor = self.objective.device, self.objective.anchor
        streams = [generator(self.seed, k, START, device=device) for k in self.numbers]
        draws = [torch.randn(anchor.shape, generator=g, device=device, dtype=anchor.dtype) for g in streams]
        self.place(metric(torch.stack(draws)) if draws else torch.zeros_like(self.weights))

    @property
    def at_rest(self) -> AtRest:
        """The loss at weights of one's choosing, while these rest."""
        return AtRest(self.objective, self._engine, self._gradients, self._blocks, self.seed)

    def scratch(self) -> list[Tensor]:
        """Memory to be used while the chains rest, which are put back after: ``[1, d]`` each, that of gradients where
        there is one, and of as many chains as there are here."""
        return [*self.gradient_memory(), *self.weights.split(1)] if len(self.weights) else []

    def gradient_memory(self) -> list[Tensor]:
        """``[1, d]`` for the gradients of one chain; none where autograd keeps them."""
        return [] if self._gradients.in_parts else [self._gradients.whole()[:1]]

    @property
    def sparing(self) -> bool:
        """The memory of the chains is less than the search for a step would like to have, and it is large."""
        return self._gradients.in_parts and len(self.weights) < 3

    def line(self, row: int, put_back: bool = True) -> AbstractContextManager[Look]:
        """The loss on the line from ``w*`` to where the chain of ``row`` is, see :meth:`AtRest.line`."""
        return self.at_rest.line(self.window, self.weights, row, put_back)

    def slopes(self, most: int) -> tuple[Tensor, Tensor]:
        """How the loss rises at ``w*`` towards where each chain is, see :meth:`AtRest.slopes`."""
        return self.at_rest.slopes(self.window, self._where(), self._noise[0], most)

    def gradients(self, weights: Tensor, batches: Sequence[int]) -> Tensor:
        """Gradients of the mean loss at any weights, see :meth:`AtRest.gradients`."""
        return self.at_rest.gradients(self.source.window(0), weights, batches)

    def displacements(self) -> Tensor:
        """``[own chains, d]``: where the chains of this rank are, from ``w*``."""
        return self._where() - self.objective.anchor

    def _where(self) -> Tensor:
        """``[own chains, d]``: not at a proposal that has yet to be accepted."""
        return self._state.tensors.get("accepted_weights", self.weights)

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
            own = (self._moments.total.cpu(), self._moments.count)
            # every shard has seen all the chains, and its moments are nobody else's
            every = [own] if self.layout.sharded else self.collective.exchange(lambda: own)
            told = [(total, count) for total, count in every if count]
            if told:
                mean = torch.stack([total for total, _ in told]).sum(dim=0) / sum(count for _, count in told)
                if self.layout.all_finite(mean):
                    self.precondition(mean)
        self._moments = GradientMoments(self.objective.anchor) if keep_learning else None

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
        self.from_anchor = True
        self._forget_past()

    def _advance(self, steps: int, lr: float) -> Segment:
        pieces: list[Segment] = []
        done = 0
        while done < steps:
            window = self.window
            room = steps - done if self.source.resident else max(len(window) - self._window_used, 1)
            count = min(steps - done, room)
            pieces.append(self._advance_window(window, count, lr, done))
            done += count
            if not self.source.resident:
                self._window_used += count
                if self._window_used >= len(window):
                    self._window_index, self._window_used = self._window_index + 1, 0
            del window  # the source reads the next one into the memory of this one
        return Segment.join(pieces)

    def _advance_window(self, window: Window, steps: int, lr: float, before: int) -> Segment:
        chains = len(self.numbers)
        indices = measure_anchor(self.objective, window, self._pick(window, steps))
        seeds = self._seeds(steps) if self.objective.draws else None
        anchor, known = self._at_anchor(window, indices, seeds)
        losses = torch.zeros(chains, steps, dtype=torch.float64, device="cpu")
        kinds, reads = 3 if self._state.preconditioner is None else 5, num_reads(steps, STATS_EVERY, before)
        readings = torch.zeros(kinds, chains, reads, dtype=torch.float64, device="cpu")
        read: list[Tensor] = []
        noise: Tensor | None = None
        others: Tensor | None = None
        if self.sampler.heating(lr).step > 0 and not self.sampler.full_batch and min(len(window), steps) > 1:
            noise = torch.zeros(chains, num_noise_squares(steps, before), dtype=torch.float64, device="cpu")
            others = _partners(indices)
        tallies = [self._state.tensors.get(name) for name in ("accepted", "proposed")]
        tallied = [tally.clone() for tally in tallies if tally is not None]
        width = self._engine.width
        try:
            for start in range(0, chains, width):
                rows = slice(start, min(start + width, chains))
                readout = Readout(self.reader, self.read_every, before)
                own = seeds[rows] if seeds is not None else None
                beside = others[rows] if others is not None else None
                moved = self._chunk(rows).move(window, indices[rows], lr, readout, beside, own, before)
                losses[rows], readings[:, rows] = moved.losses, moved.readings
                if noise is not None and moved.noise_square is not None:
                    noise[rows] = moved.noise_square
                read += [moved.read] if moved.read is not None else []
                self.progress(steps * (rows.stop - rows.start))
        finally:
            self._engine.release()
        owner = 0 if self.source.shared else self.collective.rank
        shares = None if window.shares is None else window.shares * len(window)
        used = {(owner, self._window_index, i): known[i] for i in indices.unique().tolist()}
        acceptance = None
        if tallied:
            accepted, proposed = ((tally - old).cpu() for tally, old in zip(tallies, tallied, strict=True))  # type: ignore[operator]
            acceptance = accepted / proposed.clamp(min=1)
        return Segment(
            self.numbers,
            losses - anchor.reshape(chains, steps),
            anchors=used,
            shares={} if shares is None else {key: float(shares[key[2]]) for key in used},
            acceptance=acceptance,
            read=join_reads(self.reader, read, num_reads(steps, self.read_every, before), self.weights),
            read_every=self.read_every,
            noise_square=noise,
            **dict(zip(READINGS, readings, strict=False)),
        )

    def _chunk(self, rows: slice) -> Chunk:
        count = rows.stop - rows.start
        return Chunk(
            self._engine,
            self.sampler,
            self.posterior,
            self.layout,
            anchor=self.objective.anchor,
            weights=self.weights[rows],
            gradients=self._gradients.of(count, whole=getattr(self.reader, "wants_gradients", False)),
            noise=self._noise[:count],
            blocks=self._blocks,
            state=SamplerState({name: x[rows] for name, x in self._state.tensors.items()}, self.preconditioner),
            randomness=self._randomness[rows],
            moments=self._moments,
        )

    def _at_anchor(self, window: Window, indices: Tensor, seeds: Tensor | None) -> tuple[Tensor, dict[int, float]]:
        """The losses at ``w*`` of the steps to come, ``[chains, steps]``, and of the minibatches by themselves."""
        known = window.anchor_loss
        if seeds is None:
            return torch.tensor(
                [[known[i] for i in row] for row in indices.tolist()], dtype=torch.float64, device="cpu"
            ), known
        anchor = anchor_of_steps(self.objective, window, indices, seeds)
        # of a minibatch the mean over what its steps draw, and not over one number
        means = {i: float(anchor[indices == i].nanmean()) for i in indices.unique().tolist()}
        return anchor, {i: known[i] if math.isnan(mean) else mean for i, mean in means.items()}

    def _seeds(self, steps: int) -> Tensor:
        """``[chains, steps]``, of the random numbers that the user's step draws."""
        streams = [own.steps for own in self._randomness]
        seeds = [torch.randint(2**62, (steps,), generator=g, device="cpu") for g in streams]
        return torch.stack(seeds) if seeds else torch.empty(0, steps, dtype=torch.long, device="cpu")

    def _pick(self, window: Window, steps: int) -> Tensor:
        """Which minibatch each chain sees at each step, ``[chains, steps]``.

        From a window that holds all the data, with replacement: the batch does not depend on where the chain is. (Each
        once, it would come after the others of the pass, which together pull away from it.) Of a window that is passing
        by, every batch once, each chain in an order of its own: a batch that comes back would find a chain that has
        already moved towards it. Smaller batches are seen as much more seldom.
        """
        streams = [own.minibatches for own in self._randomness]
        if self.source.resident or window.is_whole:
            picks = [_drawn_from(window, steps, g) for g in streams]
        else:
            if self._window_used == 0:
                self._orders = [_order_of(window, g) for g in streams]
            picks = [order[self._window_used : self._window_used + steps] for order in self._orders]
        return torch.stack(picks) if picks else torch.empty(0, steps, dtype=torch.long, device="cpu")


def _partners(indices: Tensor) -> Tensor:
    """``[k, steps]``, the minibatch beside each by which the noise of both is told: that of
    :data:`~lightning_slt.sampling.segment.NOISE_LAG` steps before, or the one before where there are not as many steps.
    """
    at = torch.arange(indices.shape[1], device="cpu")
    return indices[:, torch.where(at < NOISE_LAG, at - 1, at - NOISE_LAG)]  # before the first comes the last


def _drawn_from(window: Window, steps: int, stream: torch.Generator) -> Tensor:
    """``[steps]``, batches with replacement."""
    if window.shares is None:
        return torch.randint(len(window), (steps,), generator=stream, device="cpu")
    return torch.multinomial(window.shares, steps, replacement=True, generator=stream)


def _order_of(window: Window, stream: torch.Generator) -> Tensor:
    """``[batches]``, each once; in the place of some of the smaller ones full ones."""
    order = torch.randperm(len(window), generator=stream, device="cpu")
    if window.shares is None:
        return order
    full = (window.shares == window.shares.max()).nonzero().flatten()
    stand_ins = full[torch.randint(len(full), (len(window),), generator=stream, device="cpu")]
    # of a full one this is above 1
    left_out = (
        torch.rand(len(window), generator=stream, dtype=torch.float64, device="cpu") >= len(window) * window.shares
    )
    return torch.where(left_out, stand_ins, torch.arange(len(window), device="cpu"))[order]
