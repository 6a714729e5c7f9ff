"""What the chains of one firing leave to the next: where they were, and how large their step was.

**Warm chains.** A chain that starts at ``w*`` first has to find the width of the posterior, and that takes longer than
reading it. Inside training the posterior of this firing is nearly that of the last, so chains start from
``w*_new + (w_chain - w*_old)``.

**The same noise without a bias.** Neighbouring firings use the same noise and minibatches, so that their errors cancel
in the difference. Chains that go on from where the last firing ended *and* meet the same noise again are biased: with
a memory ``a = exp(-T/tau)`` over a firing the fixed point of ``u -> a u + xi`` has the variance ``(1+a)/(1-a)`` times
the right one. So every firing starts from the same *kept* displacements, which an earlier firing drew with other
noise, and meets the same noise: start and noise are independent of each other, and common to the firings. When the
posterior has moved so far that the kept displacements no longer fit (the trace is not flat at once), the chains run on
until it is, their ends are kept, and the noise changes with them: a new generation. So it is after a firing that is
not valid for where its chains have been, where they chose their burn-in: the same start and noise would be as unlucky
again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from lightning_slt.sampling.chains import Chains

MAX_CHECKPOINT_BYTES = 16 * 2**20
"""Displacements larger than this stay out of checkpoints, as do those of shards, of which a checkpoint would have the
first rank's only: the first firing after a resume is then a cold one."""


@dataclass
class ChainMemory:
    """The kept displacements, on the CPU.

    Attributes:
        numbers: which chains they are of.
        displacements: ``[len(numbers), d]``, ``w_chain - w*``; None where the next firing starts cold.
        lr: the step size that was right; None where none is known.
        preconditioner: ``[d]`` of a preconditioned sampler, frozen with the displacements.
        ceiling: the largest step that chains bore when that was last looked at; infinite where it never was.
        generation: how often the displacements have been drawn anew; the noise differs between generations.
        sharded: they are those of this rank's shards.
    """

    numbers: tuple[int, ...] = ()
    displacements: Optional[Tensor] = None
    lr: Optional[float] = None
    ceiling: float = math.inf
    preconditioner: Optional[Tensor] = None
    generation: int = 0
    sharded: bool = False

    def start_of(self, chains: Chains) -> Optional[Tensor]:
        """``[own chains, d]`` displacements for the chains of this rank; None where there are none that fit."""
        kept = self.displacements
        if kept is None or kept.shape[1] != len(chains.objective.anchor):
            return None
        if list(self.numbers) == chains.numbers:
            return kept  # itself: a copy would be as large as the chains
        row = {number: k for k, number in enumerate(self.numbers)}
        if any(number not in row for number in chains.numbers):
            return None
        return kept[[row[number] for number in chains.numbers]]

    def keep(self, chains: Chains) -> None:
        """Keep where the chains are now, for the firings to come; those of all ranks where that is little."""
        self.displacements = None  # not beside the new ones
        own = chains.displacements().cpu()
        p = chains.preconditioner
        self.sharded = chains.layout.sharded
        if not self.sharded and chains.num_chains * own.shape[1] * own.element_size() <= MAX_CHECKPOINT_BYTES:
            told = chains.collective.exchange(lambda: (chains.numbers, own))
            self.numbers = tuple(number for numbers, _ in told for number in numbers)
            self.displacements = torch.cat([rows for _, rows in told]) if len(told) > 1 else own
        else:
            self.numbers, self.displacements = tuple(chains.numbers), own
        self.preconditioner = p.cpu() if p is not None else None
        self.generation += 1

    def forget(self) -> None:
        """Start cold next time; the step size stays."""
        if self.displacements is not None:
            self.generation += 1
        self.numbers, self.displacements, self.preconditioner = (), None, None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain types and, where they are small, the displacements of all chains."""
        kept = self.displacements
        fits = kept is not None and kept.numel() * kept.element_size() <= MAX_CHECKPOINT_BYTES and not self.sharded
        return {
            "numbers": list(self.numbers) if fits else [],
            "displacements": kept if fits else None,
            "preconditioner": self.preconditioner if fits else None,
            "lr": self.lr,
            "ceiling": self.ceiling,
            "generation": self.generation,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.numbers = tuple(state["numbers"])
        self.displacements, self.preconditioner = state["displacements"], state["preconditioner"]
        self.lr, self.generation = state["lr"], int(state["generation"])
        self.ceiling = float(state.get("ceiling", math.inf))
