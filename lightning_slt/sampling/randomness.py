"""The random numbers of one chain, each kind a stream of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_slt.sampling.noise import NormalStream, normal_stream
from lightning_slt.sampling.rng import CHOICE, MINIBATCHES, NOISE, STEP, generator
from lightning_slt.sampling.samplers import Sampler


@dataclass(eq=False)
class Randomness:
    """What one chain draws from in one part of a run.

    Attributes:
        minibatches: chooses its minibatches.
        choice: decides whether a proposal is accepted.
        noise: moves it.
        steps: seeds what the user's step draws by itself.
        last_noise: the same numbers again, a step later, so that nothing has to be kept of them; None for a sampler
            that does not share its noise between two steps.
        has_last: whether there was a step before, since the numbers began.
    """

    minibatches: torch.Generator
    choice: torch.Generator
    noise: NormalStream
    steps: torch.Generator
    last_noise: NormalStream | None
    has_last: bool = False

    @classmethod
    def begin(
        cls, seed: int, chain: int, part: int, sampler: Sampler, device: torch.device, dtype: torch.dtype
    ) -> Randomness:
        """The numbers of part ``part`` of the run of chain ``chain``, from their beginning."""

        def normal() -> NormalStream:
            return normal_stream(seed, chain, NOISE, part, device=device, dtype=dtype, exact=sampler.full_batch)

        return cls(
            minibatches=generator(seed, chain, MINIBATCHES, part),
            choice=generator(seed, chain, CHOICE, part, device=device),
            noise=normal(),
            steps=generator(seed, chain, STEP, part),
            last_noise=normal() if sampler.shares_noise else None,
        )
