"""The streams of a chain: each of its own for every seed, chain, part of a run and purpose, and the same again."""

from __future__ import annotations

from itertools import product

import torch

from lightning_slt.sampling.randomness import Randomness
from lightning_slt.sampling.samplers import MALA, SGLD, LeimkuhlerMatthews, Sampler

KEYS = list(product((0, 1), (0, 1, 7), (0, 1, 1000, 11_000)))


def begun(seed: int, chain: int, part: int, sampler: Sampler) -> Randomness:
    return Randomness.begin(seed, chain, part, sampler, torch.device("cpu"), torch.float32)


def test_no_two_purposes_chains_parts_or_seeds_have_a_stream_in_common() -> None:
    def seeds(*key: int) -> list[int]:
        found = begun(*key, MALA())  # whose noise is torch's own
        return [g.initial_seed() for g in (found.minibatches, found.choice, found.steps, found.noise._generator)]

    every = [seed for key in KEYS for seed in seeds(*key)]
    assert len(set(every)) == 4 * len(KEYS)
    assert every == [seed for key in KEYS for seed in seeds(*key)]


def test_noise_from_the_table_is_of_the_seed_the_chain_and_the_part() -> None:
    rows = [begun(*key, SGLD()).noise.fill_(torch.empty(100)) for key in KEYS]
    assert len({tuple(row.tolist()) for row in rows}) == len(KEYS)
    for key, row in zip(KEYS, rows, strict=True):
        assert torch.equal(begun(*key, SGLD()).noise.fill_(torch.empty(100)), row)


def test_noise_that_comes_again_a_step_later_is_the_same() -> None:
    found = begun(3, 2, 5, LeimkuhlerMatthews())
    assert found.last_noise is not None and not found.has_last
    assert torch.equal(found.noise.fill_(torch.empty(50)), found.last_noise.fill_(torch.empty(50)))
    assert begun(3, 2, 5, SGLD()).last_noise is None
