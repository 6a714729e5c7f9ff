"""Where nobody says how many samples a minibatch has, it is more than 64 where they cost hardly anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slt import SGLD, Estimate, estimate_llc


class Seen:
    """A loss of a module's outputs, and the sizes of the minibatches it was asked for."""

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss) -> None:
        self.of, self.sizes = of, set[int]()

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        self.sizes.add(len(batch[0]))
        return self.of(module(batch[0]), batch[1])


def data_of(n: int, features: int = 3) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=g)
    return TensorDataset(x, x[:, :1] + torch.randn(n, 1, generator=g))


def estimate(module: nn.Module, data: Any, loss: Seen, **given: Any) -> Estimate:
    return estimate_llc(
        module, data, loss, sampler=SGLD(lr=1e-4), num_burnin_steps=0, num_draws=20, num_steps_bw_draws=1, **given
    )


@pytest.mark.parametrize(("n", "size"), [(40, 40), (200, 200), (1000, 256)])
def test_small_networks_see_256_samples_or_all(n: int, size: int) -> None:
    loss = Seen()
    estimate(nn.Linear(3, 1), data_of(n), loss)
    assert max(loss.sizes) == size


def test_the_chains_are_those_of_that_size_given() -> None:
    """Nothing is left of the minibatches that were looked at before."""
    torch.manual_seed(0)
    module, data = nn.Linear(3, 1), data_of(1000)
    left, given = estimate(module, data, Seen()), estimate(module, data, Seen(), batch_size=256)
    assert torch.equal(left.trace, given.trace) and left.init_loss == given.init_loss


@pytest.mark.parametrize(
    ("module", "features"),
    [
        (nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)), 3),
        (nn.Sequential(nn.Unflatten(1, (1, 16, 16)), nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(784, 1)), 256),
    ],
    ids=["many weights", "much for each sample"],
)
def test_others_see_64(module: nn.Module, features: int) -> None:
    """4,417 weights; 829, whose graph holds 1,040 numbers a sample."""
    loss = Seen()
    estimate(module, data_of(300, features), loss)
    assert max(loss.sizes) == 64


def total(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().sum()


def divided(output: Tensor, y: Tensor) -> Tensor:
    """The mean over 64 samples, and over no others."""
    return (output - y).square().sum() / 64


def noisy(output: Tensor, y: Tensor) -> Tensor:
    """Half a batch draws other numbers: it cannot be told."""
    return (output + torch.randn_like(output) - y).square().mean()


def ranked(output: Tensor, y: Tensor) -> Tensor:
    """Every sample against all others of its batch."""
    return nn.functional.softplus(output - output.T).mean() + (output - y).square().mean()


@pytest.mark.parametrize("of", [total, divided, ranked, noisy])
def test_a_loss_that_another_size_would_change_sees_64(of: Callable[[Tensor, Tensor], Tensor]) -> None:
    loss = Seen(of)
    estimate(nn.Linear(3, 1), data_of(1000), loss)
    assert max(loss.sizes) == 64


def test_the_size_of_a_loader_stays() -> None:
    loss = Seen()
    estimate(nn.Linear(3, 1), DataLoader(data_of(1000), batch_size=32), loss)
    assert max(loss.sizes) == 32


def test_noisy_labels_take_fewer_steps() -> None:
    """Three classes that 4 features hardly tell apart: at 64 samples the noise of minibatches keeps the step small."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 4, generator=g)
    y = (x @ torch.randn(4, 3, generator=g) + 2.0 * torch.randn(1000, 3, generator=g)).argmax(dim=1)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(500):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    loss = Seen(nn.functional.cross_entropy)
    few = estimate_llc(module, TensorDataset(x, y), loss, batch_size=64)
    more = estimate_llc(module, TensorDataset(x, y), loss)
    assert few.step_size is not None and more.step_size is not None
    assert more.step_size > 2.0 * few.step_size
    assert more.num_burnin_steps + 200 * more.num_steps_bw_draws < 0.6 * (
        few.num_burnin_steps + 200 * few.num_steps_bw_draws
    )
    assert abs(more.mean - few.mean) < 2.0 * (more.se + few.se)
