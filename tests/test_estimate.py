"""One call for a module: what is given, what is reported, what is left alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_slt import (
    Estimate,
    estimate_llc,
)
from lightning_slt.estimate import default_localization
from tests.cases.problems import regular
from tests.estimates import Normed, ones, same, tiny
from tests.sampling.helpers import cross_entropy, gen, mean_squared, mlp, regression, seeded

# ----------------------------------------------------------------------------------------------------- what is given


def test_weights_as_a_state_dict_or_a_lightning_checkpoint(tmp_path: Path) -> None:
    module, other = mlp(), mlp()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=gen(5)))
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": other.state_dict(), "epoch": 3, "global_step": 7}, path)
    expected = tiny(other)
    assert same(tiny(module, weights=other.state_dict()), expected)
    assert same(tiny(module, weights=torch.load(path, weights_only=True)), expected)
    assert not same(tiny(module), expected)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), mlp().parameters(), strict=True))


@pytest.mark.parametrize("method", ["sequential", "batched"])
def test_the_module_is_unchanged(method: str) -> None:
    module = seeded(lambda: Normed(0.1))
    module.net[1].eval()
    mean_squared(module, regression().tensors).backward()
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    flags = [m.training for m in module.modules()]
    tiny(module, method=method)
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), grads, strict=True))  # type: ignore[arg-type]
    assert [m.training for m in module.modules()] == flags


def test_the_data_is_unchanged() -> None:
    data = regression()
    before = [t.clone() for t in data.tensors]
    tiny(mlp(), data, method="batched")
    assert all(torch.equal(a, b) for a, b in zip(before, data.tensors, strict=True))


@pytest.mark.parametrize("method", ["sequential", "batched"])
def test_the_same_seed_gives_the_same_answer_and_another_seed_another(method: str) -> None:
    def run(seed: int) -> Estimate:
        return estimate_llc(mlp(), regression(), mean_squared, seed=seed, num_draws=20, num_chains=3, method=method)

    first, other = run(1), run(2)
    assert same(first, run(1)) and not same(first, other)
    assert first.seed == 1 and first.mean != other.mean


def test_the_callers_generators_do_not_matter() -> None:
    torch.manual_seed(1)
    first = tiny(mlp())
    torch.manual_seed(2)
    assert same(first, tiny(mlp()))


def test_a_second_estimate_does_not_remember_the_first() -> None:
    module = mlp()
    first = tiny(module)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2.0)
    moved = tiny(module)
    with torch.no_grad():
        for p in module.parameters():
            p.div_(2.0)
    assert not same(first, moved) and same(first, tiny(module))


class Logs(LightningModule):
    """A step as users write them: it logs, reads the trainer, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 4)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        self.log_dict({"epoch": float(self.trainer.current_epoch), "again": float(self.current_epoch)})
        self.logger.experiment.add_scalar("x", 1.0, self.global_step)
        return {"loss": loss}


def test_a_lightning_module_without_a_trainer() -> None:
    data = TensorDataset(torch.randn(64, 5, generator=gen(1)), torch.randint(4, (64,), generator=gen(2)))
    module = seeded(Logs)
    estimate = tiny(module, data, None)
    plain = tiny(module.net, data, cross_entropy)
    torch.testing.assert_close(estimate.trace, plain.trace, rtol=1e-5, atol=1e-6)
    assert module._trainer is None


def test_a_loss_a_sample_is_averaged() -> None:
    def each(module: nn.Module, batch: Any) -> Tensor:
        return 0.5 * (module(batch[0]) - batch[1]).square().sum(-1)

    torch.testing.assert_close(tiny(mlp(), loss_fn=each).trace, tiny(mlp()).trace, rtol=1e-5, atol=1e-6)


def test_full_batch_sees_all_the_data_at_every_step() -> None:
    sizes: set[int] = set()

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        sizes.add(len(batch[0]))
        return mean_squared(module, batch)

    estimate = tiny(mlp(), regression(90), loss_fn, full_batch=True)
    assert sizes == {90} and estimate.batch_size == 90
    expected = float(mean_squared(mlp(), regression(90).tensors).detach())
    assert estimate.init_loss == pytest.approx(expected, rel=1e-5)


def test_what_is_reported() -> None:
    estimate = tiny(mlp(), num_steps_bw_draws=2)
    assert estimate.trace.shape == (2, 5) and estimate.per_chain.shape == (2,)
    assert (estimate.num_chains, estimate.num_draws, estimate.num_steps_bw_draws) == (2, 5, 2)
    assert (estimate.num_samples, estimate.num_weights, estimate.batch_size) == (96, 66, 16)
    assert (estimate.nbeta, estimate.localization, estimate.step_size) == (20.0, 1.0, 1e-3)
    assert (estimate.method, estimate.method_reason) == ("sequential", "asked for")
    assert estimate.chain_loss == pytest.approx(estimate.init_loss + estimate.mean / 20.0)
    assert estimate.mean == pytest.approx(float(estimate.trace.double().mean()), rel=1e-5)
    assert estimate.seconds > 0


def test_default_localization_is_the_weights_own_scale() -> None:
    assert default_localization(torch.full((100,), 0.5)) == pytest.approx(4.0)
    assert default_localization(torch.zeros(7)) == 1.0
    assert default_localization(torch.full((100,), 10.0)) == 1.0
    assert default_localization(torch.full((100,), 1e-3)) == 100.0


def test_restriction_gives_the_component_its_own_coefficient() -> None:
    """Two independent regressions in one module: restricted to one, the value is that one's."""
    case = regular(eigenvalues=[2.0] * 6, n=400)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = copy.deepcopy(case.module), copy.deepcopy(case.module)

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return case.loss_fn(module.a, batch) + case.loss_fn(module.b, batch)

    def run(restrict: str | None) -> Estimate:
        return estimate_llc(
            Two(), case.dataset, loss_fn, restrict=restrict, localization=1.0, method="sequential", num_draws=100
        )

    assert case.truth is not None
    part, whole = run("a"), run(None)
    assert part.num_weights == 6 and whole.num_weights == 12
    assert part.mean == pytest.approx(case.truth, abs=max(0.05 * case.truth, 2 * part.se))
    assert whole.mean == pytest.approx(2 * case.truth, abs=max(0.05 * 2 * case.truth, 2 * whole.se))


class Adapted(nn.Module):
    """An adapter of low rank as it starts: its second factor is zero, and the loss does not depend on its first."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 3)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("batch_size", [16, 32])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_weights_that_the_loss_does_not_depend_on_have_a_coefficient_of_nothing(seed: int, batch_size: int) -> None:
    """Below zero by the last digit of a loss is not downhill, and that digit is the error."""
    module = seeded(Adapted, seed)
    found = estimate_llc(
        module, regression(outputs=3), mean_squared, restrict="down", batch_size=batch_size, seed=seed, num_draws=50
    )
    assert found.valid and found.reasons == ()
    assert abs(found.mean) <= 2 * found.se < 1e-4 and found.chain_se > 0


def test_a_saddle_is_negative_and_not_valid() -> None:
    class Saddle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        u, v = module.w
        return batch[0].mean() * (u * u - v * v + 0.25 * v**4)

    estimate = estimate_llc(Saddle(), ones(), loss_fn, nbeta=50.0, localization=1.0, num_draws=100)
    assert estimate.mean < -5 and not estimate.valid
    assert any("negative" in reason for reason in estimate.reasons)


# ----------------------------------------------------------------------------------------------------------- tolerance


def calibrated(tolerance: float | str | None, num_draws: int = 25) -> Estimate:
    case = regular(dim=10, n=400)
    return estimate_llc(
        case.module,
        case.dataset,
        case.loss_fn,
        nbeta=case.nbeta,
        localization=5.0,
        num_draws=num_draws,
        tolerance=tolerance,
        method="batched",
    )


def steps_of(e: Estimate) -> int:
    return e.num_burnin_steps + e.num_draws * e.num_steps_bw_draws


def test_a_wider_tolerance_is_reached_in_fewer_steps_and_kept() -> None:
    """The error that stops the chains is that of the trace before the heat is taken off: 10 % of room.

    The seed is fixed; both held for 12 of 12 seeds (125 to 500 steps, median 150, against 175 to 1075, median 375).
    """
    wide, narrow = calibrated("15%"), calibrated("4%")
    assert wide.se <= 1.1 * 0.15 * wide.mean and narrow.se <= 1.1 * 0.04 * narrow.mean
    assert steps_of(wide) < steps_of(narrow)


def test_a_tolerance_in_units_of_the_llc_is_the_share_that_it_is() -> None:
    share = calibrated("8%")
    units = calibrated(0.08 * (share.mean + share.step_bias))
    assert same(units, share)


def test_without_a_tolerance_it_is_three_per_cent() -> None:
    assert same(calibrated(None), calibrated("3%"))


@pytest.mark.parametrize("tolerance", ["5", "abc%", "-3%", "0%", "nan%", "", 0.0, -1.0, math.nan, math.inf])
def test_a_tolerance_that_says_nothing_is_named(tolerance: float | str) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        calibrated(tolerance)
