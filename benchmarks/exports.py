"""Writes the cases as ``.npz`` files for the runners of every environment; runs in this package's own environment.

The digits MLP and the reduced-rank regression are those of ``tests/cases`` (same weights, data and references). The
transformer is trained here for a few seconds on sequences from a random Markov chain, and the convnet on the digits
enlarged to 28x28, so that their chains start near a minimum.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import IMAGE_SIDE, SEQUENCE_LENGTH, VOCABULARY, Transformer, default_nbeta, next_token_loss
from models import convnet as build_convnet
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
LOCALIZATION = 100.0
sys.path.insert(0, str(ROOT))  # for tests.cases


def _write(
    folder: Path,
    name: str,
    kind: str,
    module: nn.Module,
    names: list[str],
    data: tuple[Tensor, Tensor],
    *,
    sizes: tuple[int, ...] = (),
    batch_size: int,
    lr: float,
    nbeta: float,
    localization: float,
) -> None:
    weights: dict[str, Any] = {
        f"w.{key}": value.detach().numpy() for key, value in zip(names, module.parameters(), strict=True)
    }
    np.savez(
        folder / f"{name}.npz",
        kind=np.array(kind),
        sizes=np.array(sizes, dtype=np.int64),
        x=data[0].numpy(),
        y=data[1].numpy(),
        batch_size=batch_size,
        lr=lr,
        nbeta=nbeta,
        localization=localization,
        **weights,
    )


def digits(folder: Path, name: str, batch_size: int, lr: float = 1e-4, localization: float = LOCALIZATION) -> None:
    """The MLP 64-128-128-10 on scikit-learn's digits."""
    from tests.cases.problems import digits_mlp

    case = digits_mlp(localization)
    x, y = case.data
    _write(
        folder,
        name,
        "mlp",
        case.module,
        [key for key, _ in case.module.named_parameters()],
        (x, y),
        sizes=(64, 128, 128, 10),
        batch_size=batch_size,
        lr=lr,
        nbeta=case.nbeta,
        localization=localization,
    )


def reduced_rank(folder: Path, name: str, batch_size: int = 64, lr: float = 1e-3) -> None:
    """Reduced-rank regression 8-4-8 of rank 2, n = 1000, without noise."""
    from tests.cases.problems import reduced_rank as build

    case = build(8, 4, 8, 2)
    x, y = case.data
    names = ["0.weight", "1.weight"]
    _write(
        folder,
        name,
        "linear",
        case.module,
        names,
        (x, y),
        sizes=(8, 4, 8),
        batch_size=batch_size,
        lr=lr,
        nbeta=case.nbeta,
        localization=case.gamma,
    )


def small_transformer(folder: Path, name: str, batch_size: int = 64, lr: float = 1e-3) -> None:
    """The transformer of the tests' reference: 1 layer, width 16, sequences of 12, vocabulary 16, n = 400."""
    from tests.cases.problems import CASES

    case = CASES["transformer"]()
    (tokens,) = case.data
    _write(
        folder,
        name,
        "transformer",
        case.module,
        [key for key, _ in case.module.named_parameters()],
        (tokens, tokens),
        sizes=(16, 12, 16, 2, 1),
        batch_size=batch_size,
        lr=lr,
        nbeta=case.nbeta,
        localization=case.gamma,
    )


def markov_sequences(n: int, generator: torch.Generator) -> Tensor:
    """``[n, length]`` tokens of a Markov chain whose rows hold a few likely successors."""
    transition = torch.softmax(2.0 * torch.randn(VOCABULARY, VOCABULARY, generator=generator), dim=1)
    tokens = torch.randint(VOCABULARY, (n, 1), generator=generator)
    for _ in range(SEQUENCE_LENGTH - 1):
        following = torch.multinomial(transition[tokens[:, -1]], 1, generator=generator)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens


def transformer(folder: Path, name: str, batch_size: int, lr: float = 1e-5, n: int = 2048, steps: int = 400) -> None:
    """The 2-layer transformer, trained here (its weights are kept in the folder for the next batch size)."""
    generator = torch.Generator().manual_seed(0)
    tokens = markov_sequences(n, generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Transformer()
    kept = folder / "transformer.pt"
    if kept.exists():
        module.load_state_dict(torch.load(kept))
    else:
        optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
        for _ in range(steps):
            batch = tokens[torch.randint(n, (32,), generator=generator)]
            optimiser.zero_grad()
            next_token_loss(module(batch), batch).backward()
            optimiser.step()
        torch.save(module.state_dict(), kept)
    _write(
        folder,
        name,
        "transformer",
        module,
        [key for key, _ in module.named_parameters()],
        (tokens, tokens),
        batch_size=batch_size,
        lr=lr,
        nbeta=default_nbeta(n),
        localization=LOCALIZATION,
    )


def convnet(folder: Path, name: str, batch_size: int, lr: float = 1e-5, steps: int = 200) -> None:
    """Two convolutions (16 and 32 channels) and a linear layer on the digits enlarged to 28x28, trained here."""
    from tests.cases.problems import digits_data

    generator = torch.Generator().manual_seed(0)
    images, y = digits_data()
    x = nn.functional.interpolate(images.view(-1, 1, 8, 8), size=IMAGE_SIDE, mode="bilinear")
    channels = (16, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_convnet(channels)
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
        optimiser.step()
    _write(
        folder,
        name,
        "convnet",
        module,
        [key for key, _ in module.named_parameters()],
        (x, y),
        sizes=channels,
        batch_size=batch_size,
        lr=lr,
        nbeta=default_nbeta(len(x)),
        localization=LOCALIZATION,
    )


#: name of a case -> what writes it into a folder
SPEED_CASES: dict[str, Callable[[Path], None]] = {
    "mlp64": lambda folder: digits(folder, "mlp64", 64),
    "mlp256": lambda folder: digits(folder, "mlp256", 256),
    "convnet32": lambda folder: convnet(folder, "convnet32", 32),
    "transformer16": lambda folder: transformer(folder, "transformer16", 16),
    "transformer64": lambda folder: transformer(folder, "transformer64", 64),
}
ACCURACY_CASES: dict[str, Callable[[Path], None]] = {
    "digits": lambda folder: digits(folder, "digits", 64),
    "rrr": lambda folder: reduced_rank(folder, "rrr"),
    "transformer": lambda folder: small_transformer(folder, "transformer"),
}
