"""Losses of single samples that there are not: coupled ones are refused, those that fail are left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt.sampling.probe import CoupledLossError
from tests.sampling.helpers import classification, gen, mlp, regression, seeded
from tests.sampling.probes import elsewhere, per_sample, probe_of

functional = nn.functional


def test_layers_that_normalise_by_the_batch_are_named() -> None:
    """A sample alone has no statistics; torch's own words stay the cause."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1))
    x = torch.randn(12, 3, generator=gen(0))

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return m(batch[0]).square().mean()

    with pytest.raises(CoupledLossError, match=r"a layer \(1\) normalises.*track_running_stats=True.*None") as caught:
        probe_of(module, TensorDataset(x), loss)
    assert "Expected more than 1 value per channel" in str(caught.value.__cause__)


class Contrastive(LightningModule):
    """InfoNCE: the other samples of the batch are the negatives."""

    def __init__(self, loss: str = "scalar") -> None:
        super().__init__()
        self.net, self.kind = nn.Linear(5, 4), loss

    def losses(self, batch: Any) -> Tensor:
        a, b = self.net(batch[0]), self.net(batch[0] + 0.1)
        return functional.cross_entropy(a @ b.T, torch.arange(len(a)), reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch).mean()


@pytest.mark.parametrize("kind", ["step", "per sample"])
def test_a_contrastive_loss_is_refused_with_the_remedy(kind: str) -> None:
    loss_fn = None if kind == "step" else lambda m, b: m.losses(b)
    with pytest.raises(CoupledLossError, match=r"couples the samples.*loss_fn\(module, batch\) -> \[batch\]"):
        probe_of(seeded(Contrastive), regression(), loss_fn)


def test_a_triplet_loss_of_three_samples_and_more_is_refused() -> None:
    """Alone, and twice the same, it is zero: only several different ones show it."""

    def triplets(m: nn.Module, batch: Any) -> Tensor:
        z, y = m(batch[0]), batch[1]
        apart = torch.cdist(z, z)
        same = (y[:, None] == y[None]) & ~torch.eye(len(y), dtype=torch.bool)
        hinge = (apart[:, :, None] - apart[:, None, :] + 1).clamp(min=0)
        valid = same[:, :, None] & (y[:, None] != y[None])[:, None, :]
        return (hinge * valid).sum() / valid.sum().clamp(min=1) + 0.0 * z.sum()

    with pytest.raises(CoupledLossError):
        probe_of(mlp(), classification((5,)), triplets)


def test_a_weighted_mean_a_sum_and_time_before_batch_are_no_coupling() -> None:
    weight, data = torch.tensor([1.0, 5.0, 0.2]), classification((5,), classes=3)
    probe_of(mlp(), data, lambda m, b: functional.cross_entropy(m(b[0]), b[1], weight=weight))
    x, y = data.tensors
    probe = probe_of(mlp(), data, lambda m, b: functional.cross_entropy(m(b[0]), b[1], reduction="sum"))
    torch.testing.assert_close(
        probe.anchor.float(), functional.cross_entropy(mlp()(x[:12]), y[:12], reduction="none").detach()
    )

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.GRU(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x)[0])

    series = TensorDataset(torch.randn(24, 7, 3, generator=gen(1)), torch.randn(24, 7, 1, generator=gen(2)))

    def collate(samples: list[Any]) -> Any:
        return tuple(torch.stack(part, dim=1) for part in zip(*samples, strict=True))  # [time, batch, ...]

    net = seeded(Recurrent)
    probe = probe_of(net, series, lambda m, b: (m(b[0]) - b[1]).square().mean(), collate=collate)
    x, y = series.tensors
    expected = torch.stack([(net(x[i][:, None]) - y[i][:, None]).square().mean() for i in range(12)]).detach()
    torch.testing.assert_close(probe.anchor.float(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [0, 1, 5])
@pytest.mark.parametrize("loss", ["scalar", "batch"])
def test_a_loss_that_is_not_finite_does_not_spoil_the_others(place: int, loss: str) -> None:
    x, y = classification((5,), classes=3).tensors
    x = x.clone()
    x[place] = torch.nan
    function = per_sample if loss == "batch" else lambda m, b: per_sample(m, b).mean()
    # the chains' own first minibatch must be finite: samples are read from the same dataset in another order
    probe = probe_of(mlp(), TensorDataset(x, y), function, batch_size=1, count=12)
    assert probe.method == ("whole batches" if loss == "batch" else "vmap")
    assert torch.isfinite(probe.anchor).tolist() == [i != place for i in range(12)]
    assert torch.isfinite(probe(elsewhere(probe))[1]).tolist() == [i != place for i in range(12)]


class Skips(LightningModule):
    """No loss for a sample without a positive label."""

    def __init__(self, skipped: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.skipped = nn.Linear(5, 3), skipped

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        keep = batch[1] >= 0
        if not bool(keep.any()):
            return None
        return functional.cross_entropy(self.net(batch[0][keep]), batch[1][keep])


@pytest.mark.parametrize("skipped", [(0,), (1,), (3, 7), (11,)])
def test_samples_without_a_loss_are_left_out_by_name(skipped: tuple[int, ...]) -> None:
    x, y = classification((5,), classes=3).tensors
    y = y.clone()
    y[list(skipped)] = -1
    module = seeded(lambda: Skips(skipped))
    probe = probe_of(module, TensorDataset(x, y))
    kept = [i for i in range(12) if i not in skipped]
    assert probe.without == list(skipped) and probe.index.tolist() == kept and probe.n == len(kept)
    expected = functional.cross_entropy(module.net(x), y.clamp(min=0), reduction="none").detach()[kept]
    torch.testing.assert_close(probe.anchor.float(), expected, rtol=1e-5, atol=1e-6)
    y[:] = -1
    y[20] = 0
    with pytest.raises(ValueError, match="no loss for any sample"):
        probe_of(module, TensorDataset(x, y), batch_size=48)
