"""Losses of single samples at any weights: three ways to the same numbers."""

from __future__ import annotations

import copy
import random
import warnings
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
from lightning_slt.sampling.probe import Probe
from lightning_slt.sampling.samples import Samples
from tests.sampling.batching_models import on_adversaries, with_flatness, with_penalty
from tests.sampling.helpers import Attention, Conv, WithMetric, classification, gen, mlp, regression, seeded, tokens
from tests.sampling.probes import by_hand, elsewhere, per_sample, probe_of, total

functional = nn.functional


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


def test_the_products_of_a_sample_are_counted() -> None:
    """A convolution uses each weight at every pixel."""
    convolution = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.Flatten(), nn.Linear(108, 2)))

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(module(batch[0]), batch[1])

    data = TensorDataset(torch.randn(4, 1, 8, 8, generator=gen(0)), torch.arange(4) % 2)
    found = probe_of(convolution, data, loss, count=4)
    assert found.products == 6 * 6 * 3 * 9 + 108 * 2
