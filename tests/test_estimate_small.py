"""Small problems: momenta on all the data where nothing is said, minibatches where anything is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_slt import SGLD, Estimate, KineticLangevin, estimate_llc
from lightning_slt.estimate import SMALL_SAMPLES, SMALL_WEIGHTS, is_small
from tests.sampling.helpers import gen, mean_squared, seeded

N = 100


def line() -> nn.Module:
    return seeded(lambda: nn.Linear(4, 1, bias=False))


def measured(data: Any, loss_fn: Any = mean_squared, **settings: Any) -> Estimate:
    return estimate_llc(line(), data, loss_fn, **{"num_chains": 2, "num_draws": 20, "method": "sequential", **settings})


def samples(n: int = N) -> TensorDataset:
    x = torch.randn(n, 4, generator=gen())
    return TensorDataset(x, line()(x).detach())


class Jittered(Dataset[tuple[Tensor, Tensor]]):
    """Samples that are others each time they are asked for."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = samples()[i]
        return x + 0.1 * torch.randn(4), y


class Counted(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples one after another, with a length."""

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Any:
        return iter(list(samples()))


def test_the_default_is_kinetic_langevin_on_all_the_data() -> None:
    chosen, said = measured(samples()), measured(samples(), sampler=KineticLangevin(), full_batch=True)
    assert chosen.batch_size == N and chosen.step_bias == 0.0
    assert torch.equal(chosen.trace, said.trace)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": SGLD()},
        {"batch_size": 64},
        {"num_burnin_steps": 20},
        {"num_steps_bw_draws": 1},
        {"num_samples": 1000},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_anything_that_is_said_of_the_chains_leaves_minibatches(settings: dict[str, Any]) -> None:
    chosen = measured(samples(), **settings)
    assert chosen.batch_size == 64
    assert torch.equal(chosen.trace, measured(samples(), **{"sampler": SGLD(), **settings}).trace)


@pytest.mark.parametrize("data", [DataLoader(samples(), batch_size=50), Counted()], ids=["loader", "iterable"])
def test_batches_that_somebody_chose_are_kept(data: Any) -> None:
    assert measured(data, nbeta=20.0).batch_size in (50, 64)


def noisy_step(module: nn.Module, batch: Any) -> Tensor:
    return mean_squared(module, (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]))


def test_random_samples_or_a_random_step_leave_minibatches() -> None:
    """Their noise would heat momenta, and nothing would take it off."""
    assert measured(Jittered()).batch_size == 64
    assert measured(samples(), noisy_step).batch_size == 64


def test_what_is_small() -> None:
    assert is_small(range(SMALL_SAMPLES), SMALL_WEIGHTS)
    assert not is_small(range(SMALL_SAMPLES + 1), SMALL_WEIGHTS)
    assert not is_small(range(SMALL_SAMPLES), SMALL_WEIGHTS + 1)
    assert measured(samples(SMALL_SAMPLES + 1)).batch_size == 64


def test_samples_that_are_large_leave_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(t.nbytes for t in samples().tensors)
    monkeypatch.setattr("lightning_slt.estimate.SMALL_BYTES", size)
    assert measured(samples()).batch_size == N
    monkeypatch.setattr("lightning_slt.estimate.SMALL_BYTES", size - 1)
    assert measured(samples()).batch_size == 64


def test_the_answer_is_that_of_the_closed_form() -> None:
    """``lambda = sum_i nbeta h_i / (nbeta h_i + gamma) / 2`` with the eigenvalues h of the data's covariance.

    6 seeds: their mean is within five of its standard errors, a false alarm in 240 (t with five degrees of freedom).
    """
    data, gamma = samples(), 5.0
    x = data.tensors[0].double()
    stiffness = torch.linalg.eigvalsh(x.T @ x / N) * N / torch.log(torch.tensor(float(N)))
    exact = float((stiffness / (stiffness + gamma)).sum() / 2)
    found = [
        estimate_llc(line(), data, mean_squared, num_draws=50, tolerance="5%", localization=gamma, seed=seed)
        for seed in range(6)
    ]
    means = torch.tensor([e.mean for e in found], dtype=torch.float64)
    assert all(e.valid and e.batch_size == N for e in found)
    assert abs(float(means.mean()) - exact) < 5 * float(means.std()) / 6**0.5
