"""Losses of single samples at any weights: three ways to the same numbers, and what is refused or left out."""

from __future__ import annotations

import copy
import random
import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_slt.sampling.anchor import open_window
from lightning_slt.sampling.batches import DatasetSource
from lightning_slt.sampling.objective import Objective
from lightning_slt.sampling.probe import CoupledLossError, Probe
from lightning_slt.sampling.samples import Samples, choose_samples, default_group
from tests.sampling.batching_models import on_adversaries, with_flatness, with_penalty
from tests.sampling.helpers import Attention, Conv, WithMetric, classification, gen, mlp, regression, seeded, tokens

functional = nn.functional


def probe_of(
    module: nn.Module,
    data: Any,
    loss_fn: Any = None,
    *,
    count: int = 12,
    batch_size: int = 4,
    collate: Any = None,
    per_token: bool = False,
    numbers: Any = None,
) -> Probe:
    objective = Objective(module, loss_fn)
    source = DatasetSource(data, batch_size, collate, None, lambda batch: batch, 0)
    open_window(objective, source)
    samples = Samples.of(source, range(count) if numbers is None else numbers)
    with objective.active():
        return Probe(objective, samples, per_token)


def elsewhere(probe: Probe, rows: int = 3) -> Tensor:
    """Weights near ``w*``."""
    anchor = probe._objective.anchor
    return anchor + 0.1 * torch.randn(rows, len(anchor), generator=gen(8), dtype=anchor.dtype)


def by_hand(
    module: nn.Module, probe: Probe, weights: Tensor, loss: Callable[[nn.Module, int], Tensor], count: int = 12
) -> Tensor:
    """``[rows, count]``, from a copy whose weights are set, one sample after another."""
    at, out = copy.deepcopy(module).eval(), []
    for row in weights:
        with torch.no_grad():
            for p, piece in zip(at.parameters(), probe._objective.pieces(row), strict=True):
                p.copy_(piece)
            out.append(torch.stack([loss(at, i) for i in range(count)]))
    return torch.stack(out)


def total(probe: Probe, weights: Tensor) -> Tensor:
    """Losses at the weights, not above those at ``w*``."""
    return (probe(weights).double() + probe.anchor).float()


def per_sample(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


class Flash(LightningModule):
    """Attention by the kernel of the CPU, which has no batching rule, and a warning of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 8), nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        warnings.warn("an old habit", stacklevel=1)
        x = self.embed(batch[0]).view(len(batch[0]), -1, 2, 4).transpose(1, 2)
        x = functional.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).flatten(2)
        return functional.cross_entropy(self.head(x).flatten(0, 1), batch[1].flatten())


def test_the_user_is_not_asked_to_report_what_torch_cannot_batch() -> None:
    numbers = torch.randint(8, (12, 6), generator=gen(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe = probe_of(seeded(Flash), TensorDataset(numbers[:, :-1], numbers[:, 1:]))
        total(probe, elsewhere(probe))
        gradients = probe.gradients(10**9)
    assert probe.method == "vmap" and gradients is not None
    texts = {str(warning.message) for warning in caught}
    assert "an old habit" in texts
    assert not any("performance drop" in text for text in texts)
    attend = torch.vmap(lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True))
    with pytest.warns(UserWarning, match="performance drop"):  # others are told as before
        attend(torch.randn(3, 1, 2, 5, 4))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_samples_in_nested_tensors_are_refused_with_what_can_be_done(layout: torch.layout) -> None:
    rows = [torch.randn(2 + k % 3, 4, generator=gen(k)) for k in range(12)]
    source = DatasetSource(
        rows, 4, lambda some: torch.nested.nested_tensor(some, layout=layout), None, lambda batch: batch, 0
    )
    with pytest.raises(ValueError, match=r"hold nested tensors.*collate function pads.*probe=None"):
        Samples.of(source, range(6))


def test_layers_that_normalise_by_the_batch_are_named() -> None:
    """A sample alone has no statistics; torch's own words stay the cause."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1))
    x = torch.randn(12, 3, generator=gen(0))

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return m(batch[0]).square().mean()

    with pytest.raises(CoupledLossError, match=r"a layer \(1\) normalises.*track_running_stats=True.*None") as caught:
        probe_of(module, TensorDataset(x), loss)
    assert "Expected more than 1 value per channel" in str(caught.value.__cause__)


# ------------------------------------------------------------------------------------------ three ways, one answer


def test_a_batch_of_one_through_the_training_step_is_the_loss_of_the_sample() -> None:
    module, data = seeded(WithMetric), classification((5,))
    probe = probe_of(module, data)
    x, y = data.tensors
    weights = elsewhere(probe)
    expected = by_hand(module, probe, weights, lambda m, i: functional.cross_entropy(m.net(x[i : i + 1]), y[i : i + 1]))
    assert probe.method == "vmap" and probe.n == 12 and probe.index.tolist() == list(range(12))
    assert probe.token.tolist() == [-1] * 12
    torch.testing.assert_close(total(probe, weights), expected, rtol=1e-5, atol=1e-6)
    # above those at w*: the difference keeps its digits
    at_anchor = by_hand(
        module,
        probe,
        probe._objective.anchor.unsqueeze(0),
        lambda m, i: functional.cross_entropy(m.net(x[i : i + 1]), y[i : i + 1]),
    )
    torch.testing.assert_close(probe(weights), expected - at_anchor, rtol=1e-4, atol=1e-6)
    assert probe(weights).dtype == torch.float32 and probe(weights[:0]).shape == (0, 12)


def test_losses_of_single_samples_are_used_as_they_are() -> None:
    module, data = mlp(), classification((5,), classes=3)
    sizes: list[int] = []

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        sizes.append(len(batch[0]))
        return per_sample(m, batch)

    probe = probe_of(module, data, loss_fn)
    x, y = data.tensors
    weights = elsewhere(probe)
    expected = by_hand(module, probe, weights, lambda m, i: functional.cross_entropy(m(x[i : i + 1]), y[i : i + 1]))
    sizes.clear()
    torch.testing.assert_close(total(probe, weights), expected, rtol=1e-5, atol=1e-6)
    assert probe.method == "whole batches" and sizes == [12, 12, 12]


class Branches(LightningModule):
    """Control flow that depends on the data, which vmap does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = (self.net(batch[0]) - batch[1]).square().mean()
        return 2.0 * out if batch[0].sum().item() > 0 else out


@pytest.mark.parametrize("step", [with_penalty, with_flatness, on_adversaries])
def test_a_step_that_asks_for_derivatives_itself(step: Callable[[nn.Module, Any], Tensor]) -> None:
    """Losses are asked for without gradients, and the step with them."""
    module, data = seeded(mlp), regression(32)
    probe = probe_of(module, data, step)
    x, y = data.tensors
    weights = elsewhere(probe)
    expected = []
    for row in weights:
        at = copy.deepcopy(module).eval()
        with torch.no_grad():
            for p, piece in zip(at.parameters(), probe._objective.pieces(row), strict=True):
                p.copy_(piece)
        expected.append(torch.stack([step(at, (x[i : i + 1], y[i : i + 1])).detach() for i in range(12)]))
    torch.testing.assert_close(total(probe, weights), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad and p.grad is not None for p in module.parameters())


def test_a_step_with_control_flow_is_asked_one_by_one() -> None:
    module, data = seeded(Branches), regression()
    module.eval()
    # a batch is all doubled or not at all: the loss of two samples together is no mean of theirs, but no copy of one
    # compares samples either, so the samples are chosen on one side
    side = [i for i in range(len(data)) if data[i][0].sum() > 0][:12]
    probe = probe_of(module, data, numbers=side)
    x, y = (t[side] for t in data.tensors)
    weights = elsewhere(probe)
    expected = by_hand(module, probe, weights, lambda m, i: 2 * (m.net(x[i]) - y[i]).square().mean())
    assert probe.method == "one by one" and "vmap fails" in probe.reason
    torch.testing.assert_close(total(probe, weights), expected, rtol=1e-5, atol=1e-6)
    assert probe.index.tolist() == side


def test_dropout_is_off_and_batch_norm_keeps_its_running_statistics() -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)))
    module(regression().tensors[0])
    module.train()
    before = copy.deepcopy(module.state_dict())
    data = classification((5,), classes=3)
    x, y = data.tensors

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(m(batch[0]), batch[1])

    probe = probe_of(module, data, loss_fn)
    weights = elsewhere(probe)
    expected = by_hand(module, probe, weights, lambda m, i: functional.cross_entropy(m(x[i : i + 1]), y[i : i + 1]))
    assert probe.method == "unreduced batches"
    torch.testing.assert_close(total(probe, weights), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(probe(weights), probe(weights))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()) and module.training


def test_convolution_and_attention() -> None:
    module, data = seeded(lambda: Conv(lambda: nn.GroupNorm(2, 4))), classification((1, 8, 8))
    probe = probe_of(module, data, lambda m, b: functional.cross_entropy(m(b[0]), b[1]))
    x, y = data.tensors
    weights = elsewhere(probe)
    expected = by_hand(module, probe, weights, lambda m, i: functional.cross_entropy(m(x[i : i + 1]), y[i : i + 1]))
    torch.testing.assert_close(total(probe, weights), expected, rtol=1e-4, atol=1e-5)
    text, attention = tokens(), seeded(Attention)
    probe = probe_of(attention, text, lambda m, b: functional.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()))
    a, b = text.tensors
    weights = elsewhere(probe)
    expected = by_hand(attention, probe, weights, lambda m, i: functional.cross_entropy(m(a[i : i + 1])[0], b[i]))
    torch.testing.assert_close(total(probe, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["scalar", "batch"])
def test_frozen_and_half_precision_modules(loss: str) -> None:
    """The frozen half stays, and differences far below the eighth bit of bfloat16 are seen."""
    data = classification((5,), classes=3)
    module = mlp().bfloat16()
    module[0].requires_grad_(False)
    low = TensorDataset(data.tensors[0].bfloat16(), data.tensors[1])
    function = per_sample if loss == "batch" else lambda m, b: per_sample(m, b).mean()
    probe = probe_of(module, low, function)
    assert len(probe._objective.anchor) == 7 * 3 + 3
    weights = probe._objective.anchor + 1e-4 * torch.randn(2, 24, generator=gen(1))
    reference = copy.deepcopy(module).float()
    x, y = low.tensors[0].float(), low.tensors[1]
    out = []
    for row in [probe._objective.anchor, *weights]:
        with torch.no_grad():
            for p, piece in zip(reference[2].parameters(), probe._objective.pieces(row), strict=True):
                p.copy_(piece)
            out.append(functional.cross_entropy(reference(x[:12]), y[:12], reduction="none"))
    # a loss of order one is known to 1e-7 in float32
    torch.testing.assert_close(probe(weights), torch.stack([out[1] - out[0], out[2] - out[0]]), rtol=1e-2, atol=4e-7)
    assert module[0].weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- coupled losses


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


# --------------------------------------------------------------------------------------------------- random numbers


class Variational(LightningModule):
    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.encode, self.decode, self.branch = nn.Linear(5, 4), nn.Linear(2, 5), branch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        mean, log_scale = self.encode(x).chunk(2, dim=-1)
        noise = torch.randn_like(mean)
        if self.branch:
            noise = noise + random.random() + float(np.random.rand())  # noqa: NPY002
            assert x.sum().item() < 1e9
        out = self.decode(mean + log_scale.exp() * noise)
        return (out - x).square().mean()


@pytest.mark.parametrize("branch", [False, True])
def test_a_step_with_random_numbers_gets_the_same_at_every_reading(branch: bool) -> None:
    probe = probe_of(seeded(lambda: Variational(branch)), regression())
    assert probe.method == ("one by one" if branch else "vmap")
    weights = elsewhere(probe)
    # the same numbers alone, as one of several rows, later, and whatever the global generator says
    first = probe(weights)
    torch.manual_seed(1234)
    random.seed(4)
    torch.testing.assert_close(torch.cat([probe(w.unsqueeze(0)) for w in weights]), first, rtol=1e-5, atol=1e-6)
    same = probe(probe._objective.anchor.repeat(3, 1))
    assert float(same.abs().max()) < 1e-6
    # and the samples have numbers of their own: two equal samples have losses of their own
    equal = TensorDataset(torch.ones(12, 5), torch.zeros(12, 3))
    assert probe_of(seeded(lambda: Variational(branch)), equal).anchor.unique().numel() == 12


def test_the_module_and_the_global_generators_are_left_alone() -> None:
    module = seeded(lambda: Variational(True))
    before = copy.deepcopy(module.state_dict())
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    states = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    objective = Objective(module)
    source = DatasetSource(regression(), 4, None, None, lambda batch: batch, 0)
    from lightning_slt.sampling.rng import preserve_rng

    with preserve_rng(0):
        open_window(objective, source)
    samples = Samples.of(source, range(6))
    with objective.active():
        probe = Probe(objective, samples)
        probe(elsewhere(probe))
    assert random.getstate() == states[0] and repr(np.random.get_state()) == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("item", [False, True], ids=["batches", "one by one"])
def test_reading_is_told_of_at_every_row_of_weights_and_ends_by_what_is_raised_there(item: bool) -> None:
    """Losses of many samples take as long as chains, and a signal is to be answered meanwhile."""
    told: list[int] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        found = functional.mse_loss(module(batch[0]), batch[1])
        return found + 0.0 * found.item() if item else found

    def progress(steps: int) -> None:
        told.append(steps)
        if len(told) == 4:
            raise InterruptedError

    objective, source = Objective(seeded(mlp), loss), DatasetSource(regression(), 4)
    open_window(objective, source)
    with objective.active():
        probe = Probe(objective, Samples.of(source, range(6)), progress=progress)
        told.clear()  # the losses at w*
        probe(elsewhere(probe, rows=1))
        assert 0 < len(told) < 4 and set(told) == {0}
        with pytest.raises(InterruptedError):
            probe(elsewhere(probe, rows=4))
    assert len(told) == 4


def test_a_buffer_that_the_step_writes_to_does_not_drift() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x) * self.calls

    probe = probe_of(seeded(Counts), classification((5,), classes=3), per_sample)
    weights = elsewhere(probe)
    assert probe.method == "whole batches"
    assert torch.equal(probe(weights), probe(weights))
    assert float(probe(probe._objective.anchor.unsqueeze(0)).abs().max()) == 0.0


# ------------------------------------------------------------------------------------------------- awkward samples


def test_samples_of_different_shapes() -> None:
    class Lengths(Dataset[Any]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> Any:
            return torch.randn(2 + i % 4, 5, generator=gen(i)), torch.tensor(i % 3)

    module = mlp()

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(m(batch[0]).mean(dim=1), batch[1])

    probe = probe_of(module, Lengths(), loss_fn, batch_size=1)
    data = Lengths()
    weights = elsewhere(probe)
    expected = by_hand(module, probe, weights, lambda m, i: loss_fn(m, [t.unsqueeze(0) for t in data[i]]))
    assert probe.method == "unreduced batches"
    torch.testing.assert_close(total(probe, weights), expected, rtol=1e-5, atol=1e-6)


def test_tokens_stay_apart_also_of_texts_of_different_lengths() -> None:
    texts = [torch.randint(11, (3 + i % 3,), generator=gen(i)) for i in range(7)]
    module = seeded(Attention)

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(m(batch[:, :-1]).transpose(1, 2), batch[:, 1:], reduction="none")

    probe = probe_of(module, texts, loss_fn, batch_size=1, count=7, per_token=True)
    weights = elsewhere(probe, rows=2)
    lengths = [len(t) - 1 for t in texts]
    assert probe.index.tolist() == [i for i, k in enumerate(lengths) for _ in range(k)]
    assert probe.token.tolist() == [t for k in lengths for t in range(k)]
    whole = by_hand(module, probe, weights, lambda m, i: loss_fn(m, texts[i][None]).mean(), count=7)
    by_sample = [total(probe, weights)[:, probe.index == i].mean(dim=1) for i in range(7)]
    torch.testing.assert_close(torch.stack(by_sample, dim=1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"per_token=True.*\[batch, tokens\]"):
        probe_of(mlp(), classification((5,), classes=3), per_sample, per_token=True)


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


def test_batches_that_are_dicts_with_texts_in_them() -> None:
    x, y = classification((5,), classes=3).tensors
    data = [{"x": x[i], "y": y[i], "id": f"number {i}", "weight": 1.0} for i in range(12)]
    module = mlp()

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        assert batch["id"]
        return functional.cross_entropy(m(batch["x"]), batch["y"])

    probe = probe_of(module, data, loss_fn)
    weights = elsewhere(probe)
    expected = by_hand(module, probe, weights, lambda m, i: functional.cross_entropy(m(x[i : i + 1]), y[i : i + 1]))
    torch.testing.assert_close(total(probe, weights), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- which samples


class Augmented(Dataset[Any]):
    def __init__(self, noisy: bool) -> None:
        self.noisy = noisy

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        noise = torch.randn(5) if self.noisy and i != 2 else torch.zeros(5)
        return torch.full((5,), float(i)) + noise, torch.zeros(3)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_dataset_that_changes_between_two_readings_is_recognised(workers: int) -> None:
    def read(noisy: bool, count: int = 12) -> Samples:
        source = DatasetSource(Augmented(noisy), 4, None, None, lambda batch: batch, 0, workers)
        return Samples.of(source, range(count))

    assert read(True).changed == [0, 1, 3, 4, 5, 6, 7]
    assert read(False).changed == []
    assert read(True, 1).changed == [0]


def test_numbers_are_those_of_the_dataset() -> None:
    x = torch.arange(10.0)[:, None]
    source = DatasetSource(TensorDataset(x, x), 2, None, [7, 3, 5], lambda batch: batch, 0)
    samples = Samples.of(source, [0, 2])
    assert samples.index == [7, 5] and [float(b[0]) for b in samples.batches] == [7.0, 5.0]
    chosen = choose_samples(1000, 50, seed=1)
    assert chosen == sorted(set(chosen)) and len(chosen) == 50 and chosen != choose_samples(1000, 50, seed=2)
    assert choose_samples(1000, None, 0) == list(range(1000))


def test_a_few_of_a_thousand_million_samples_are_chosen_without_an_order_of_all() -> None:
    chosen = choose_samples(10**9, 1000, seed=1)
    assert chosen == sorted(set(chosen)) and len(chosen) == 1000 and chosen[0] >= 0 and chosen[-1] < 10**9
    assert chosen == choose_samples(10**9, 1000, seed=1) != choose_samples(10**9, 1000, seed=2)
    assert abs(sum(chosen) / len(chosen) / 10**9 - 0.5) < 4 / (12 * 1000) ** 0.5


@pytest.mark.parametrize(
    ("sample", "group"),
    [
        ((torch.zeros(2), np.int64(4)), "4"),
        ((torch.zeros(2), torch.tensor(1.5)), None),
        ((torch.zeros(2), torch.tensor([1, 2])), None),
        ((torch.zeros(2), "cat"), "cat"),
        ({"x": 1.0, "target": np.array(3)}, "3"),
        (UserDict({"input_ids": torch.zeros(4).long(), "labels": torch.tensor(2)}), "2"),
        (torch.zeros(3), None),
        ((torch.zeros(2), True), "True"),
    ],
)
def test_the_group_of_a_sample(sample: Any, group: Any) -> None:
    assert default_group(sample) == group


def test_the_products_of_a_sample_are_counted() -> None:
    """A convolution uses each weight at every pixel."""
    convolution = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.Flatten(), nn.Linear(108, 2)))

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(module(batch[0]), batch[1])

    data = TensorDataset(torch.randn(4, 1, 8, 8, generator=gen(0)), torch.arange(4) % 2)
    found = probe_of(convolution, data, loss, count=4)
    assert found.products == 6 * 6 * 3 * 9 + 108 * 2
