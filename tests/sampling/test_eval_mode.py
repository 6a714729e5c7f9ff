"""Weights that the loss depends on in training mode alone: no chain can feel them, and the estimate says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import SGLD, estimate_influence, estimate_llc, estimate_susceptibility
from lightning_slt.sampling.steps import NoGradientError

X = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X @ torch.ones(4, 1))
CHAINS = {"sampler": SGLD(lr=1e-4), "num_chains": 2, "num_draws": 30, "num_burnin_steps": 10, "num_steps_bw_draws": 1}
SAID = r"reach the loss in training mode and not in eval mode.*loss_fn.*restrict"


class LoRA(nn.Linear):
    """Adds its update to the weights in eval mode, as loralib does."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))
        self.merged = False

    def train(self, mode: bool = True) -> LoRA:
        super().train(mode)
        if self.merged is mode:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.merged else out + x @ self.down.T @ self.up.T


class Adapted(nn.Module):
    def __init__(self, head: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.adapter, self.head = LoRA(), nn.Linear(4, 1).requires_grad_(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.adapter(x))


class Experts(nn.Module):
    """Sends a sample to the expert of its first feature's sign; the third is for nobody, in neither mode."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        to = (x[:, 0] > 0).long()
        if self.training:
            to = torch.randint(2, to.shape)
        out = x.new_zeros(len(x), 1)
        for number, expert in enumerate(self.experts[:2]):
            rows = (to == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


def squared(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


def test_adapters_that_eval_mode_merges_make_the_estimate_invalid() -> None:
    module = Adapted(head=True)
    weight = module.adapter.weight.clone()
    est = estimate_llc(module, DATA, squared, **CHAINS)
    assert not est.valid
    (said,) = [reason for reason in est.reasons if "training mode" in reason]
    assert said.startswith("2 of 4 moving tensors (adapter.down, adapter.up) reach the loss in training mode")
    assert module.training
    assert not module.adapter.merged
    assert torch.equal(module.adapter.weight, weight)


@pytest.mark.parametrize("sampler", [None, SGLD(lr=1e-4)], ids=["kinetic", "SGLD"])
def test_influence_over_such_chains_is_not_valid(sampler: SGLD | None) -> None:
    some = TensorDataset(*DATA[:20])
    found = estimate_influence(Adapted(head=True), some, some, squared, sampler=sampler, num_chains=2, num_draws=10)
    assert not found.valid
    assert sum("adapter.down, adapter.up" in reason for reason in found.reasons) == 1


def test_susceptibility_over_such_chains_is_not_valid() -> None:
    shifted = TensorDataset(X[:20], DATA.tensors[1][:20] + 1.0)
    components = {"all": None, "head": "head"}
    found = estimate_susceptibility(
        Adapted(head=True), DATA, shifted, squared, components=components, num_chains=2, num_draws=10
    )
    assert not found.valid
    said = [reason for reason in found.reasons if "adapter.down, adapter.up" in reason]
    assert len(said) == 1
    assert said[0].startswith("all: ")


def test_weights_that_the_step_itself_freezes_are_named_with_the_remedy() -> None:
    def freezes(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        module[0].requires_grad_(False)  # type: ignore[index]
        return squared(module, batch)

    module = nn.Sequential(nn.Linear(X.shape[1], 3), nn.Linear(3, 1))
    with pytest.raises(NoGradientError, match=r"the step itself freezes 0\.weight, 0\.bias .* with restrict="):
        estimate_llc(module, DATA, freezes, **CHAINS)
    assert module[0].weight.requires_grad


def test_leaving_them_out_is_a_way() -> None:
    est = estimate_llc(Adapted(head=True), DATA, squared, restrict="head", **CHAINS)
    assert not any("training mode" in reason for reason in est.reasons)


def test_adapters_alone_have_no_gradient_and_are_told_why() -> None:
    with pytest.raises(NoGradientError, match=rf"2 of 2 moving tensors \(adapter.down, adapter.up\) {SAID}"):
        estimate_llc(Adapted(head=False), DATA, squared, **CHAINS)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_weights_that_one_minibatch_or_neither_mode_uses_are_no_reason(batch_size: int) -> None:
    est = estimate_llc(Experts(), DATA, squared, batch_size=batch_size, **CHAINS)
    assert not any("training mode" in reason for reason in est.reasons)
