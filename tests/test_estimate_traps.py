"""One call for a module: what the tools before it got wrong."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_slt import (
    SGLD,
    estimate_llc,
)
from lightning_slt.functional import default_nbeta
from tests.cases.problems import regular
from tests.estimates import Normed, ones, same, tiny
from tests.sampling.helpers import gen, mean_squared, mlp, regression, seeded


@pytest.mark.parametrize("method", ["sequential", "batched"])
def test_running_statistics_of_batch_norm_do_not_move(method: str) -> None:
    module = seeded(Normed)
    module(regression().tensors[0])  # statistics of its own, in training mode
    before = {k: v.clone() for k, v in module.named_buffers()}
    estimate = tiny(module, method=method)
    assert estimate.method == method and estimate.trace.abs().max() > 0
    assert len(before) == 3 and all(torch.equal(v, before[k]) for k, v in module.named_buffers())
    assert module.training and int(before["net.1.num_batches_tracked"]) == 1


def test_frozen_parameters_do_not_move_and_do_not_count() -> None:
    """A regular model of which 4 of 10 directions are free: the exact value is that of a 4-dimensional one."""
    case = regular(eigenvalues=[1.0] * 10, n=400)

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = case.module.weight.detach()
            self.free, self.frozen = nn.Parameter(weight[:, :4].clone()), nn.Parameter(weight[:, 4:].clone())
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.cat([self.free, self.frozen], dim=1).T

    seen: list[Tensor] = []

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        seen.append(module.frozen.detach().clone())
        return case.loss_fn(module, batch)

    module = Split()
    before = module.frozen.detach().clone()
    estimate = estimate_llc(module, case.dataset, loss_fn, localization=1.0, num_draws=100, method="sequential")
    nbeta = default_nbeta(400)
    truth = 0.5 * 4 * nbeta / (nbeta + 1.0)  # X'X / n is the identity, and so is any block of it
    assert estimate.num_weights == 4
    assert estimate.mean == pytest.approx(truth, abs=max(0.05 * truth, 2 * estimate.se))
    assert all(torch.equal(s, before) for s in seen) and torch.equal(module.frozen, before)


def random_state() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


class DrawsGlobally(Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        noise = random.random() + float(np.random.rand())  # noqa: NPY002
        return torch.rand(5) + noise, torch.zeros(3)


@pytest.mark.parametrize("data", [regression(), DrawsGlobally(), DataLoader(DrawsGlobally(), 8, shuffle=True)])
def test_global_generators_are_untouched(data: Any) -> None:
    def noisy(module: nn.Module, batch: Any) -> Tensor:
        return mean_squared(module, batch) + 0.0 * (torch.rand(()) + random.random() + float(np.random.rand()))  # noqa: NPY002

    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    before = random_state()
    tiny(mlp(), data, noisy)
    assert random_state() == before
    with pytest.raises(ZeroDivisionError):
        tiny(mlp(), data, lambda m, b: 1 / 0)
    assert random_state() == before


def one_weight() -> nn.Module:
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    return module


@pytest.mark.parametrize("method", ["sequential", "batched"])
def test_a_chain_that_meets_nan_is_left_out_and_not_averaged(method: str) -> None:
    """The loss is NaN beyond w = 1.4, which some of 16 chains reach and others do not."""

    def fragile(module: nn.Module, batch: Any) -> Tensor:
        return mean_squared(module, batch) + torch.where(module.weight > 1.4, torch.nan, 0.0).sum()

    estimate = tiny(
        one_weight(), ones(), fragile, method=method, num_chains=16, num_draws=60, sampler=SGLD(lr=5e-3), nbeta=20.0
    )
    bad = torch.isnan(estimate.per_chain)
    assert 2 <= int(bad.sum()) <= 14 and estimate.num_bad_chains == int(bad.sum())
    assert estimate.finite_share == pytest.approx(1 - float(bad.double().mean()))
    good = estimate.trace[~bad].double()
    assert bool(torch.isfinite(good).all()) and estimate.mean == pytest.approx(float(good.mean()), rel=1e-5)
    if int(bad.sum()) > 4:
        assert not estimate.valid and any("non-finite" in reason for reason in estimate.reasons)


@pytest.mark.parametrize("seed", [2, 3])
def test_a_sample_without_a_finite_loss_is_named_before_the_chains_that_it_ends(seed: int) -> None:
    """One NaN in 24 minibatches, of which the first shows none: chains end at it (seeds 2 and 3; seeds 0 to 5 hold)."""
    x, y = (t.clone() for t in regression().tensors)
    x[3] = math.nan
    settings: dict[str, Any] = {"num_draws": 20, "num_burnin_steps": 20, "batch_size": 4, "nbeta": 10.0}
    estimate = estimate_llc(mlp(), TensorDataset(x, y), mean_squared, seed=seed, **settings)
    assert not estimate.valid
    assert estimate.reasons[0].startswith("the loss at the current weights is not finite for 1 of the ")
    whole = estimate_llc(mlp(), regression(), mean_squared, seed=seed, **settings)
    assert not any("not finite" in reason for reason in whole.reasons)


def test_a_sample_without_a_finite_loss_says_nothing_of_the_size_of_the_weights() -> None:
    """The search shrinks the step to 1e-57 then, and beside that weights of any size are coarse."""
    x, y = (t.clone() for t in regression().tensors)
    x[-1] = math.nan
    estimate = estimate_llc(mlp(), TensorDataset(x, y), mean_squared, num_draws=20, batch_size=4, nbeta=10.0, seed=2)
    assert estimate.step_size < 1e-20 and not estimate.valid
    assert estimate.kinds[0] == "NOT_FINITE" and "WEIGHTS_TOO_COARSE" not in estimate.kinds


def test_no_chain_left_is_nan_and_not_valid() -> None:
    def breaks(module: nn.Module, batch: Any) -> Tensor:
        return mean_squared(module, batch) + torch.where((module.weight - 1).abs() > 1e-4, torch.nan, 0.0).sum()

    estimate = tiny(one_weight(), ones(), breaks)
    assert math.isnan(estimate.mean) and math.isnan(estimate.se) and not estimate.valid
    assert estimate.finite_share == 0.0 and "no chain" in estimate.reasons[0]


@pytest.mark.parametrize("lr", [0.5, 10.0, 1e30])
@pytest.mark.parametrize("method", ["sequential", "batched"])
def test_a_huge_step_never_gives_an_answer_that_claims_to_be_valid(lr: float, method: str) -> None:
    case = regular(eigenvalues=[1.0] * 10, n=400)
    estimate = estimate_llc(
        case.module, case.dataset, case.loss_fn, sampler=SGLD(lr=lr), num_draws=50, num_burnin_steps=50, method=method
    )
    assert not estimate.valid and estimate.reasons
    assert math.isnan(estimate.mean) or abs(estimate.mean) < 1e4


def test_a_tiny_step_never_gives_an_answer_that_claims_to_be_valid() -> None:
    case = regular(eigenvalues=[1.0] * 10, n=400)
    estimate = estimate_llc(
        case.module, case.dataset, case.loss_fn, sampler=SGLD(lr=1e-8), num_draws=100, num_burnin_steps=100
    )
    assert not estimate.valid and any("not reached" in reason or "drift" in reason for reason in estimate.reasons)


def noisy_labels(noise: float) -> tuple[nn.Module, TensorDataset]:
    """Five regular directions, at the exact minimum: an LLC of 2.5 at the most, whatever the noise of the labels."""
    generator = gen(0)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    y = x.sum(dim=1, keepdim=True) + noise * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    module = nn.Linear(5, 1, bias=False)
    module.weight.data = torch.linalg.lstsq(x, y).solution.T.float()
    return module, TensorDataset(x.float(), y.float())


def half_squared(module: nn.Module, batch: Any) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("noise", [10.0, 30.0])
def test_minibatches_of_noise_never_give_an_answer_that_claims_to_be_valid(noise: float, seed: int) -> None:
    """Their step is too small to arrive with; the estimate had been 8 to 59, of chains that the first steps had thrown
    wide and that were not put back."""
    module, data = noisy_labels(noise)
    estimate = estimate_llc(module, data, half_squared, batch_size=4, num_draws=40, seed=seed, method="batched")
    assert estimate.mean < 2.5
    assert not estimate.valid and "a larger batch_size" in " ".join(estimate.reasons)


@pytest.mark.parametrize(
    ("num_chains", "seed"),
    [pytest.param(8, 0, marks=pytest.mark.slow), pytest.param(8, 1, marks=pytest.mark.slow), (8, 2), (1, 1)],
)
def test_chains_wider_than_the_posterior_are_not_valid(
    num_chains: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are left where a large step has thrown them."""
    monkeypatch.setattr("lightning_slt.sampling.step_size.SCORCHED", 0.0)
    module, data = noisy_labels(10.0)
    estimate = estimate_llc(module, data, half_squared, batch_size=4, num_draws=40, num_chains=num_chains, seed=seed)
    assert estimate.mean > 5 and estimate.virial > 1.4
    assert not estimate.valid and any("wider than the posterior" in reason for reason in estimate.reasons)


def test_bfloat16_weights_do_not_round_the_noise_away() -> None:
    """True value 4.9; a chain in bfloat16 gives 11.3 at this step."""
    gamma, nbeta, h = 1.0, 100.0, 0.5
    case = regular(eigenvalues=[h] * 10, n=400, nbeta=nbeta, gamma=gamma)
    module = copy.deepcopy(case.module).bfloat16()
    x = case.dataset.tensors[0].bfloat16()
    data = TensorDataset(x, module.float()(x.float()).detach().bfloat16())  # the rounded weights fit the rounded data
    estimate = estimate_llc(
        module.bfloat16(),
        data,
        case.loss_fn,
        sampler=SGLD(lr=1e-4),
        nbeta=nbeta,
        localization=gamma,
        num_burnin_steps=1500,
        num_draws=200,
        num_steps_bw_draws=10,
        num_chains=16,
    )
    assert case.truth == pytest.approx(4.9, abs=0.01)
    assert estimate.mean == pytest.approx(4.9, rel=0.10)
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())


def test_dropout_is_off() -> None:
    with_dropout, without = seeded(lambda: Normed(0.5)), seeded(Normed)
    with_dropout.train()
    assert same(tiny(with_dropout, seed=3), tiny(without, seed=3))
    assert with_dropout.net[3].training


MEMORY = """
    import json, resource, sys
    import torch
    from torch.utils.data import Dataset
    torch.set_num_threads(1)
    from lightning_slt import SGLD, estimate_llc
    from lightning_slt.sampling import batches

    class Lazy(Dataset):
        def __init__(self, n): self.n = n
        def __len__(self): return self.n
        def __getitem__(self, index):
            g = torch.Generator().manual_seed(index)
            return torch.randn(25_000, generator=g), torch.zeros(1)  # 100 kB

    def loss(module, batch):
        return (module(batch[0]) - batch[1]).square().mean()

    def run(n, steps):
        estimate_llc(torch.nn.Linear(25_000, 1), Lazy(n), loss, sampler=SGLD(lr=1e-9), num_chains=2,
                     num_draws=steps, num_burnin_steps=0, batch_size=8, method=METHOD, localization=1.0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    CAP = 16 * 2**20
    d = list(  # the cap is a default argument, bound at definition
        batches.DatasetSource.__init__.__defaults__)
    d[d.index(batches.MAX_RESIDENT_BYTES)] = CAP
    batches.DatasetSource.__init__.__defaults__ = tuple(d)
    base = run(40, 30)
    print(json.dumps({"rise": run(4000, 120) - base, "cap": CAP}))
"""


@pytest.mark.parametrize("method", ["sequential", pytest.param("batched", marks=pytest.mark.slow)])
def test_a_large_dataset_is_not_kept_in_memory(method: str) -> None:
    """400 MB of samples made at access, read for 120 steps of 0.8 MB (96 MB in all), 16 MB allowed at once.

    Allowed on top: as much again while a window is stacked, and 16 MB of what the allocator does.
    """
    source = textwrap.dedent(MEMORY).replace("METHOD", repr(method))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["rise"] < 2 * out["cap"] + 16 * 2**20, f"{out['rise'] / 2**20:.0f} MB"
