"""Randomness that belongs to a chain, and the caller's randomness left as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

NOISE, MINIBATCHES, LOADER, PROBE, CHOICE, START, STEP = range(7)
"""Streams: one random number never serves two purposes."""


def derive_seed(*key: int) -> int:
    """A 63-bit seed that is a hash of a key such as ``(seed, chain, stream)``."""
    return int(np.random.SeedSequence([k % 2**64 for k in key]).generate_state(1, np.uint64)[0]) >> 1


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for ``key``: chain k gets the same noise however chains are split over devices."""
    return torch.Generator(device=device).manual_seed(derive_seed(*key))


def seed_globals(seed: int) -> None:
    """Seed the torch, CUDA, NumPy and Python generators; inside :func:`preserve_rng`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - a step may draw from the global generator
    # torch takes 64 bits, and a negative number for one of them
    torch.default_generator.manual_seed(seed % 2**64)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed % 2**64)


def global_states() -> tuple[object, ...]:
    """What tells whether one of these generators has moved."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return random.getstate(), repr(numpy_state[2:]), numpy_state[1].tobytes(), *(s.numpy().tobytes() for s in states)


@contextmanager
def preserve_rng(seed: int | None = None) -> Iterator[None]:
    """Restore the torch, CUDA, NumPy and Python generators on the way out, also after an exception.

    Args:
        seed: where given, the generators are seeded with it inside, so that a module that draws random numbers in its
            step gives the same answer at every call.
    """
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the caller's legacy generator is what is preserved
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    try:
        if seed is not None:
            seed_globals(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
